"""recipes: one idea per file."""
