"""statistics: one idea per file."""
