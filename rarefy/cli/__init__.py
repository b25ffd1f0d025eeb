"""The command line: thin. Names become objects here and nowhere else."""
