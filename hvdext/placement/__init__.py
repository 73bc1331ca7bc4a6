"""Model parallelism: whole layers in different places, or one layer's weights cut over ranks."""
