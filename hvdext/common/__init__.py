"""Small things that every room uses: checks of arguments, launchers' variables, signals, background work."""
