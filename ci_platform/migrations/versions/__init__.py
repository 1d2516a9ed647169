"""One module per step of the path, oldest first."""
