"""Speed, measured on a quiet machine and committed with what it was measured on: `python -m benchmarks.run`, then `python -m benchmarks.page`."""
