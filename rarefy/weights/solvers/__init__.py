"""solvers: one idea per file."""
