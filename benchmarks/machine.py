"""What a measurement was taken on, and whether others compute there."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path

QUIET = 0.1  # of all processors, busy while nothing of ours runs


def description() -> dict[str, str]:
    """Processor, memory, system and versions, by name."""
    cores = len(os.sched_getaffinity(0))
    found = {
        "processor": f"{_first('/proc/cpuinfo', 'model name')}, {cores} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": platform.platform(),
        "Python": platform.python_version(),
    }
    return found | {name: _version(name) for name in ("tensorflow", "keras", "horovod", "hvdext")}


def busy(seconds: float = 3.0) -> float:
    """The share of all processors that is taken, by whomever, while this process waits.

    What the hypervisor takes away counts. The load average would not do: it remembers for minutes what this
    process's own programs have done.
    """
    before = _times()
    time.sleep(seconds)
    passed = [after - start for after, start in zip(_times(), before, strict=True)]
    idle = passed[3] + passed[4]  # waiting for a disk is idling
    return 1 - idle / max(1, sum(passed))


def wait_until_quiet(limit: float = 300.0) -> float:
    """Returns the share that is taken once it is low.

    Raises:
        SystemExit: if it is not within `limit` seconds: what would be measured is what others do.
    """
    end = time.monotonic() + limit
    while (share := busy()) > QUIET:
        if time.monotonic() > end:
            raise SystemExit(
                f"Others compute on this machine: {share:.0%} of its processors are taken while nothing is "
                f"measured, for {limit:.0f} s; at most {QUIET:.0%} may be. Nothing is reported."
            )
    return share


def _times():
    return [int(ticks) for ticks in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]


def _first(path, key):
    for line in Path(path).read_text().splitlines():
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return "unknown"


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
