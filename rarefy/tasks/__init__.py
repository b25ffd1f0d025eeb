"""Small training problems, one per file."""
