"""A process that holds models and computes."""
