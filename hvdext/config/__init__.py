"""Calls written in YAML: positions in a file, signatures, values read by their types."""
