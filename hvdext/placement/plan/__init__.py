"""Which layers go where: costs, the best partition, its table, drawing and file."""
