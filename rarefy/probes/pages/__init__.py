"""One page a kind of folder: what its record says, drawn."""
