"""horovodrun, without the ten seconds in which it imports TensorFlow twice to learn what is built in."""

import sys

if __name__ == "__main__":  # the processes between it and its ranks import this file, but do not need these
    from horovod.runner.launch import run_commandline

    from hvdext.launch.driver import tell_what_is_built

    tell_what_is_built()
    sys.exit(run_commandline())
