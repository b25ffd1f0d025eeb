"""How one density is shared over places: one idea per file."""
