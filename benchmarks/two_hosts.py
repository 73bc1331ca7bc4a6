"""Two hosts on one machine: starts ranks on both, whose only link is capped.

    python benchmarks/two_hosts.py --rate 200 --ranks 2 python script.py

Each "host" is a network namespace and a namespace of process ids, as a container has; a pair of virtual
devices joins them, capped in each direction. Ranks are started with the variables that horovodrun would set,
host by host. Needs root, and `ip`, `tc`, `unshare` and `nsenter` (Debian, Ubuntu:
`apt-get install iproute2 util-linux`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from capped_link import BURST, run

LINK = "between"  # what the device is called on both
_ADDRESSES = ("10.231.77.1", "10.231.77.2")
_INSIDE = "HVDEXT_TWO_HOSTS_NAME"


def unavailable() -> str | None:
    """Why there can be no two hosts here; None if there can."""
    missing = [tool for tool in ("ip", "tc", "unshare", "nsenter") if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)} must be installed (Debian, Ubuntu: apt-get install iproute2 util-linux)"
    if os.geteuid():
        return "namespaces of their own need root"
    try:
        with _hosts(f"probe-{os.getpid()}", 100):
            return None
    except RuntimeError as error:
        return str(error)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=int, help="Mbit/s; default: not capped")
    parser.add_argument("--ranks", type=int, default=2, help="on each host")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends the ranks, removes the namespaces
    if _INSIDE in os.environ:
        sys.exit(_start(os.environ[_INSIDE], options))
    if reason := unavailable():
        sys.exit(f"no two hosts: {reason}")
    name = f"host-{os.getpid()}"
    with _hosts(name, options.rate):
        # The launcher answers the ranks of both: it is on the first host itself.
        again = ["ip", "netns", "exec", f"{name}-0", sys.executable, *sys.argv]
        launcher = subprocess.Popen(again, env=os.environ | {_INSIDE: name})
        try:
            code = launcher.wait()
        finally:
            launcher.terminate()  # of one that has ended, nothing
            launcher.wait()
    sys.exit(code)


@contextmanager
def _hosts(name: str, rate: int | None) -> Iterator[None]:
    with ExitStack() as stack:
        for host in range(2):
            run(["ip", "netns", "add", f"{name}-{host}"])
            stack.callback(run, ["ip", "netns", "delete", f"{name}-{host}"])
        ends = [["name", LINK, "netns", f"{name}-{host}"] for host in range(2)]
        run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]])
        for host, address in enumerate(_ADDRESSES):
            inside = ["ip", "netns", "exec", f"{name}-{host}"]
            run([*inside, "ip", "address", "add", f"{address}/24", "dev", LINK])
            for device in ("lo", LINK):
                run([*inside, "ip", "link", "set", "dev", device, "up"])
            if rate is not None:
                bucket = ["tbf", "rate", f"{rate}mbit", "burst", BURST, "latency", "500ms"]
                run([*inside, "tc", "qdisc", "add", "dev", LINK, "root", *bucket])
        yield


def _start(name, options):
    """Starts all ranks and waits for them; the exit code of the first that failed."""
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.http.http_server import RendezvousServer

    slots = get_host_assignments(
        parse_hosts(f"host0:{options.ranks},host1:{options.ranks}"), 2 * options.ranks
    )
    server = RendezvousServer(0)
    port = server.start()
    server.init(slots)
    with ExitStack() as stack:
        entries = [_process_ids(stack, f"{name}-{host}") for host in range(2)]
        ranks = [
            subprocess.Popen(
                [*entries[int(slot.hostname[-1])], *options.command],
                env=os.environ | _variables(slot, port),
                start_new_session=True,
            )
            for slot in slots
        ]
        stack.callback(_end, ranks)
        while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
            time.sleep(0.2)
        code = next((rank.returncode for rank in ranks if rank.returncode), 0)
    server.stop()
    return code


def _process_ids(stack, namespace):
    """Makes a namespace of process ids; what to put before a command to be in it and in `namespace`."""
    holder = subprocess.Popen(
        [
            *["ip", "netns", "exec", namespace],
            *["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sleep", "infinity"],
        ]
    )
    stack.callback(holder.wait)
    stack.callback(holder.kill)
    end = time.monotonic() + 10
    while not (children := _children(holder.pid)):
        if time.monotonic() > end:
            raise RuntimeError(f"unshare made no namespace of process ids in {namespace} within 10 s.")
        time.sleep(0.05)
    return ["nsenter", "--target", children[0], "--pid", "--mount", "--net"]


def _children(process):
    with open(f"/proc/{process}/task/{process}/children") as file:
        return file.read().split()


def _variables(slot, port):
    return {
        "HOROVOD_HOSTNAME": slot.hostname,
        "HOROVOD_RANK": str(slot.rank),
        "HOROVOD_SIZE": str(slot.size),
        "HOROVOD_LOCAL_RANK": str(slot.local_rank),
        "HOROVOD_LOCAL_SIZE": str(slot.local_size),
        "HOROVOD_CROSS_RANK": str(slot.cross_rank),
        "HOROVOD_CROSS_SIZE": str(slot.cross_size),
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": _ADDRESSES[0],
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_GLOO_IFACE": LINK,
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
    }


def _end(ranks):
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()


if __name__ == "__main__":
    main()
