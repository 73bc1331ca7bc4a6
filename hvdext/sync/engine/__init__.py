"""How a sync runs: fragments, transfers, and the steps at which they begin and end."""
