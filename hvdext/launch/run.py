"""`hvd.run(func, np=4)`: runs a function on several ranks from Python or a notebook.

Horovod's own runner starts the ranks, in a process of its own (`hvdext.launch.driver`): it forks, replaces
signal handlers and imports the main script again, none of which a notebook or a process that has used
TensorFlow survives unharmed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cloudpickle

from hvdext.common import launcher
from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import require_whole
from hvdext.engine.record import horovod_folder, installed_record

_SECONDS_TO_END = 15.0
_DRIVER = "import sys; from hvdext.launch.driver import main; main(sys.argv[1])"


class RankError(RuntimeError):
    """A job of `hvd.run` has failed.

    Attributes:
        rank: the rank that failed first; None if no rank's function raised an error.
    """

    def __init__(self, message: str, rank: int | None = None):
        super().__init__(message)
        self.rank = rank


@suggests_keywords
def run(
    func: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    num_proc: int = 1,
    min_num_proc: int | None = None,
    max_num_proc: int | None = None,
    slots: int | None = None,
    reset_limit: int | None = None,
    cooldown_range: Sequence[int] | None = None,
    hosts: str | None = None,
    hostfile: str | os.PathLike | None = None,
    host_discovery_script: str | None = None,
    start_timeout: int | None = None,
    ssh_port: int | None = None,
    ssh_identity_file: str | None = None,
    disable_cache: bool | None = None,
    output_filename: str | None = None,
    verbose: bool | None = None,
    use_gloo: bool | None = None,
    use_mpi: bool | None = None,
    mpi_args: str | None = None,
    network_interface: str | None = None,
    network_interfaces: Sequence[str] | None = None,
    executable: str | None = None,
    np: int | None = None,
    min_np: int | None = None,
    max_np: int | None = None,
) -> list:
    """Runs `func` on each rank of a job of its own and returns what the ranks return.

    Each rank is a new process, whatever this one has done with TensorFlow; `func` calls `hvd.init()`, this
    process need not. What the ranks print is printed here, with the rank in front.

    Args:
        func: called as `func(*args, **kwargs)`. It may be a lambda, or defined in a notebook: it and its
            arguments travel as cloudpickle packs them.
        args: positional arguments, the same on every rank.
        kwargs: keyword arguments, the same on every rank.
        num_proc: how many ranks.
        min_num_proc: elastic jobs: how many ranks are enough to go on.
        max_num_proc: elastic jobs: how many ranks are started at most.
        slots: elastic jobs: ranks per host, where the discovery script names none.
        reset_limit: elastic jobs: how often the ranks may change.
        cooldown_range: elastic jobs: for how many seconds a host that failed is left out: (least, most).
        hosts: `"name:slots,..."`, how many ranks each host takes; default: all ranks on this one. Other
            hosts are reached by ssh without a password and see the same files.
        hostfile: a file with one `name slots=...` per line, in place of `hosts`.
        host_discovery_script: elastic jobs: a program that prints the hosts there are.
        start_timeout: seconds until all hosts must have answered; default: HOROVOD_START_TIMEOUT, or 30.
        ssh_port: where the hosts listen for ssh.
        ssh_identity_file: the private key for them.
        disable_cache: checks the hosts again, even if they passed within the last hour.
        output_filename: a folder that also gets each rank's output.
        verbose: prints how the ranks are started.
        use_gloo: Gloo brings the ranks together; the default without MPI in the engine.
        use_mpi: mpirun starts the ranks; the default with MPI in the engine.
        mpi_args: more arguments for mpirun.
        network_interface: names separated by commas, in place of `network_interfaces`.
        network_interfaces: the interfaces to use; default: those that all hosts have in common.
        executable: the Python that runs the ranks; default: this one.
        np: another name of `num_proc`.
        min_np: another name of `min_num_proc`.
        max_np: another name of `max_num_proc`.

    Returns:
        The ranks' results, in rank order; of an elastic job, those of the first `min_num_proc` ranks.

    Raises:
        TypeError, ValueError: if an argument breaks its rule.
        ImportError: without Horovod; the message says how to build it.
        RankError: if a rank raises an error, with that rank's traceback; if a rank dies, or the job does not
            start. The other ranks have then been ended.
        RuntimeError: in a process that is a rank itself.
    """
    num_proc = _one_of("num_proc", num_proc, "np", np, unset=1)
    min_num_proc = _one_of("min_num_proc", min_num_proc, "min_np", min_np)
    max_num_proc = _one_of("max_num_proc", max_num_proc, "max_np", max_np)
    options = {
        "num_proc": num_proc,
        "min_num_proc": min_num_proc,
        "max_num_proc": max_num_proc,
        "slots": slots,
        "reset_limit": reset_limit,
        "cooldown_range": cooldown_range,
        "hosts": hosts,
        "hostfile": None if hostfile is None else os.fspath(hostfile),
        "host_discovery_script": host_discovery_script,
        "start_timeout": start_timeout,
        "ssh_port": ssh_port,
        "ssh_identity_file": ssh_identity_file,
        "disable_cache": disable_cache,
        "output_filename": output_filename,
        "verbose": verbose,
        "use_gloo": use_gloo,
        "use_mpi": use_mpi,
        "mpi_args": mpi_args,
        "network_interfaces": _interfaces(network_interface, network_interfaces),
        "executable": executable,
    }
    _check_call(func, args, kwargs)
    _check_options(options)
    _check_place(use_mpi)
    try:
        call = cloudpickle.dumps((func, tuple(args), dict(kwargs or {})))
    except Exception as error:
        raise TypeError(
            "`func`, `args` and `kwargs` must pickle, to travel to the ranks; open files and locks do not. "
            f"Received: {error}"
        ) from error
    return [pickle.loads(result) for result in _results({"call": call, "options": options})]


def _results(request):
    """Has the driver run the request; returns one pickle per rank."""
    with tempfile.TemporaryDirectory(prefix="hvdext-run-") as folder:
        Path(folder, "request").write_bytes(pickle.dumps(request))
        # The open standard input tells the driver that this process lives.
        driver = subprocess.Popen(
            [sys.executable, "-c", _DRIVER, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": _python_path()},
            text=True,
            errors="replace",
            start_new_session=True,  # an interrupt in the terminal is for this process to pass on
        )
        printers = [
            threading.Thread(target=_print_lines, args=pair, daemon=True)
            for pair in ((driver.stdout, sys.stdout), (driver.stderr, sys.stderr))
        ]
        for printer in printers:
            printer.start()
        try:
            driver.wait()
        finally:
            _end(driver)
            for printer in printers:
                printer.join(_SECONDS_TO_END)
        outcome = Path(folder, "outcome")
        if not outcome.exists():
            raise RankError(f"hvd.run: the launcher ended with exit code {driver.returncode}.")
        found = pickle.loads(outcome.read_bytes())
    if "results" in found:
        return found["results"]
    raise RankError(*_explained(found["error"], found["failures"]))


def _explained(error: str, failures: Sequence[tuple[int, str]]) -> tuple[str, int | None]:
    """What to tell about a failed job, and the rank that failed first."""
    if not failures:
        return f"hvd.run: no rank's function raised an error, but the job failed: {error}", None
    (rank, text), *others = failures
    message = f"hvd.run: rank {rank} failed:\n\n{text.rstrip()}"
    if others:
        last = [f"rank {other}: {_last_line(text)}" for other, text in others]
        message += "\n\nAfter that, as a consequence or by themselves:\n  " + "\n  ".join(last)
    return message, rank


def _last_line(text):
    return text.strip().splitlines()[-1][:200]


def _end(driver):
    """Has the driver end its ranks, if it still runs."""
    driver.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        driver.wait(_SECONDS_TO_END)
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()


def _print_lines(lines, screen):
    for line in lines:
        screen.write(line)
        screen.flush()


def _python_path():
    """Where this process finds modules, apart from what every Python finds by itself."""
    own = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    places = [Path(place or os.getcwd()) for place in sys.path]
    return os.pathsep.join(
        str(place)
        for place in places
        if place.suffix != ".zip" and not any(place.is_relative_to(folder) for folder in own)
    )


# -- what an argument must be --------------------------------------------------------------------------


def _one_of(name, value, other_name, other, unset=None):
    """The value of an argument with two names."""
    if other is None or value == other:
        return value
    if value != unset:
        raise ValueError(
            f"`{name}` and `{other_name}` are one argument: pass one of them. "
            f"Received: {name}={value!r}, {other_name}={other!r}."
        )
    return other


def _interfaces(names, interfaces):
    if names is not None and interfaces is not None:
        raise ValueError(
            "`network_interface` and `network_interfaces` are one argument: pass one of them. "
            f"Received: network_interface={names!r}, network_interfaces={interfaces!r}."
        )
    if isinstance(interfaces, str):
        raise TypeError(
            f"`network_interfaces` must be a list of names. Received: network_interfaces={interfaces!r}."
        )
    return names.split(",") if names else interfaces


def _check_call(func, args, kwargs):
    if not callable(func):
        raise TypeError(f"`func` must be a function. Received: func={func!r}.")
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"`args` must be a tuple or list of arguments. Received: args={args!r}.")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"`kwargs` must be a dict of arguments. Received: kwargs={kwargs!r}.")


def _check_options(options):
    for name in ("num_proc", "min_num_proc", "max_num_proc", "slots", "start_timeout"):
        value = options[name]
        if value is None and name != "num_proc":
            continue
        options[name] = require_whole(name, value, 1)
    least, number, most = (options[name] for name in ("min_num_proc", "num_proc", "max_num_proc"))
    if (least or number) > number or (most or number) < number:
        raise ValueError(
            "`num_proc` must lie between `min_num_proc` and `max_num_proc`. "
            f"Received: num_proc={number}, min_num_proc={least}, max_num_proc={most}."
        )
    for first, second in (("hosts", "hostfile"), ("use_gloo", "use_mpi")):
        if options[first] and options[second]:
            raise ValueError(
                f"`{first}` and `{second}` exclude each other. "
                f"Received: {first}={options[first]!r}, {second}={options[second]!r}."
            )
    if options["hostfile"] is not None and not os.path.isfile(options["hostfile"]):
        raise ValueError(f"`hostfile` must be an existing file. Received: hostfile={options['hostfile']!r}.")


def _check_place(use_mpi):
    number = launcher.started(os.environ)
    if number > 1:
        raise RuntimeError(
            "hvd.run starts ranks, so call it in a process that no launcher started: `python script.py` "
            f"instead of horovodrun or mpirun. Received: one of {number} processes of a launcher."
        )
    if horovod_folder() is None:
        raise ImportError("hvd.run needs Horovod, which is not installed. Build it: hvdext build-horovod")
    record = installed_record()
    if use_mpi and record is not None and "mpi" not in record["transports"]:
        raise ValueError(
            "`use_mpi` needs an engine with MPI: hvdext build-horovod --with-mpi. Received: use_mpi=True "
            "and an engine without."
        )
