"""testing: one idea per file."""
