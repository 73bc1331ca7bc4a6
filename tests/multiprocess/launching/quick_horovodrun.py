"""horovodrun, without the ten seconds in which it imports TensorFlow twice to learn what is built in."""

import sys

from horovod.runner.launch import run_commandline

from hvdext.launch.driver import tell_what_is_built

if __name__ == "__main__":
    tell_what_is_built()
    sys.exit(run_commandline())
