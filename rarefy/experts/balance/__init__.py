"""balance: one idea per file."""
