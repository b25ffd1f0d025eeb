"""Values as pure functions of progress, one idea per file."""
