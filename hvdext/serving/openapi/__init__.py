"""The OpenAPI document that describes the server."""
