"""solvers: what a router maximises over all rows at once."""
