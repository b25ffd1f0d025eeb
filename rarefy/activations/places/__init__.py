"""Where gates go: one idea per file."""
