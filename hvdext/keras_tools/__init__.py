"""All that knows Keras from the inside: the only room in which its private names may stand."""
