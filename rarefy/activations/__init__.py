"""Which activations matter: parts that make exact zeros of the others."""
