"""A model's files on every rank's host."""
