"""routers: one idea per file."""
