"""weights: one idea per file."""
