"""What a sync did: divergence, bytes and waits, recorded and drawn."""
