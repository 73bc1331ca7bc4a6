"""Where predictions go: memory, files, nowhere."""
