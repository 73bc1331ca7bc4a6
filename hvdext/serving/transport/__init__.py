"""Frames between the front and the workers."""
