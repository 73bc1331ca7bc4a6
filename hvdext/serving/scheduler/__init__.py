"""Which request is computed when and where: batches, versions, replicas."""
