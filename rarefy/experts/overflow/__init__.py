"""overflow: one idea per file."""
