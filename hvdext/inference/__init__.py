"""Inference on many ranks: `hvd.predict`, `hvd.evaluate`, `hvd.deploy` and the service `hvdext serve`."""
