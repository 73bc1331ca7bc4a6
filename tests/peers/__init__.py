"""The tests of others, run on hvdext: `make test-peers`. Nothing of theirs is part of this project."""
