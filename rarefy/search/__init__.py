"""Search over what can be done to a model together: which weights stay, how many bits they take, which activations are skipped."""
