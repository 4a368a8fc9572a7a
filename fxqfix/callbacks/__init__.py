"""`Monitor` as a callback of a training library: a file each, imported by its users alone."""
