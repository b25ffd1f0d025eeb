"""What ends a phase, one idea per file."""
