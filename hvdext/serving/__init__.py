"""`hvdext serve`: models on several ranks behind one HTTP address.

The HTTP side (protocols, page, metrics) talks to the models through `service.Service` only.
"""
