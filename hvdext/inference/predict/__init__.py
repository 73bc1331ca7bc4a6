"""Predictions over shards, in input order, and evaluation."""
