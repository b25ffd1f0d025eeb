"""Gates: one idea per file."""
