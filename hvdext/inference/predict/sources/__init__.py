"""Where rows to predict come from, each rank reading its own."""
