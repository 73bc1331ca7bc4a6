"""Requests and responses as bytes: the Open Inference Protocol (v2) and TensorFlow Serving's."""
