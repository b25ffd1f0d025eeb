"""Published ways to gate activations, as values."""
