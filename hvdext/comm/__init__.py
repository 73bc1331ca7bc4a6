"""How ranks talk: the communicator, and what all ranks know of each other."""
