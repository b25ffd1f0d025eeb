"""allocations: one idea per file."""
