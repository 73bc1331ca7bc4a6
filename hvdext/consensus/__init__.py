"""Warm-up and cool-down: ranks that are made unlike, made one, and agree in the end."""
