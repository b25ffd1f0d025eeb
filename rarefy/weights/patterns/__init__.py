"""patterns: one idea per file."""
