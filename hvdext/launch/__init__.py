"""A job: ranks that start, join, know where they are, and leave."""
