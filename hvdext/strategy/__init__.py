"""The whole distributed set-up as one YAML file.

A file is a tree of calls: each mapping names a class or function of the Python way, and its keys are that
one's arguments. Keys, types and checks therefore come from the signatures; there is no second list of them.
"""

from hvdext.strategy.strategy import Strategy

__all__ = ["Strategy"]
