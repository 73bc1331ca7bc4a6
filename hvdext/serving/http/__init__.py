"""The HTTP side: routes, limits, errors, pages, metrics."""
