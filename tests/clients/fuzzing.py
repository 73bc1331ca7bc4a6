"""Schemathesis makes requests from a server's OpenAPI description, good ones and bad ones."""

import re
import subprocess
import sys
from pathlib import Path

# A description in JSON Schema cannot say that data fits its shape, or that inputs have equally many rows:
# "positive_data_acceptance" would take the 400 for a fault.
_CHECKS = ("--checks", "all", "--exclude-checks", "positive_data_acceptance")


def fuzz(url, folder, *arguments, timeout=300):
    """Runs it against a server.

    Args:
        url: of the server, without a slash at the end.
        folder: for what it writes.
        *arguments: of its command line.
        timeout: seconds.

    Returns:
        The number of requests it made.

    Raises:
        AssertionError: if it found a fault: a status of 5xx, one that is not described, an answer that does
            not fit its schema, a bad request that was accepted. The message is its report.
    """
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{url}/openapi.json", *_CHECKS]
    command += ["--no-color", "--generation-deterministic", *arguments]
    ended = subprocess.run(command, cwd=folder, timeout=timeout, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return int(re.search(r"(\d+) generated", ended.stdout)[1])
