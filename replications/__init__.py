"""Heavier checks: each file has a slug, a name, the sources it depends on and `run() -> figures, verdict`. `make replicate` runs what is stale."""
