"""What Horovod's tests use of the package of this name."""

import functools
import sys


class parameterized:
    """Only its `expand`."""

    @staticmethod
    def expand(cases):
        """Makes one test method for each of `cases`, which are lists of arguments."""

        def decorate(test):
            methods = sys._getframe(1).f_locals
            for i, case in enumerate(cases):
                method = functools.partialmethod(test, *case)
                methods[f"{test.__name__}_{i}"] = _plain(method, test)
            return None

        return decorate


def _plain(method, test):
    @functools.wraps(test)
    def run(self):
        method.__get__(self)()

    return run
