"""banks: one idea per file."""
