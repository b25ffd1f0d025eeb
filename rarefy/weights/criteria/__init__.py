"""criteria: one idea per file."""
