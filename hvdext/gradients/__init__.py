"""How gradients are combined over the ranks, and what stands in front of Keras' optimizers for it."""
