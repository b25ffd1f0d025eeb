"""One model into another."""
