"""A model cut into stages, one or more on each rank, trained with micro-batches."""
