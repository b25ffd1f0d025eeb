"""Which stored entries make room for which new ones, one idea per file."""
