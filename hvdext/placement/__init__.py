"""Model parallelism: layers in different places, or one layer's weights cut."""
