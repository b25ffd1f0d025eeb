"""What leaves a full cache, one idea per file."""
