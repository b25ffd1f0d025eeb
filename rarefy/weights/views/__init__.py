"""What the forward sees in place of a weight, one idea per file."""
