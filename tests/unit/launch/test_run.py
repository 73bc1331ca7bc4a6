"""`hvd.run` up to the start of the ranks, and what a rank does with its call."""

import inspect
import os
import pickle
import sys
import threading

import cloudpickle
import pytest

import hvdext as hvd
from hvdext.comm.kv_store import KeyValueStore, open_server
from hvdext.launch import driver, run

runner = pytest.importorskip("horovod.runner", reason="Horovod starts the ranks", exc_type=ImportError)


@pytest.fixture(autouse=True)
def requests(monkeypatch):
    """What `hvd.run` asks its driver for; no rank is started."""
    asked = []
    monkeypatch.setattr(run, "_results", lambda request: asked.append(request) or [])
    return asked


def four():
    return 4


def test_the_arguments_are_horovods():
    ours = inspect.signature(hvd.run).parameters
    theirs = inspect.signature(runner.run).parameters

    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


def test_every_argument_reaches_horovod(requests):
    given = {
        "slots": 3,
        "reset_limit": 1,
        "cooldown_range": (1, 2),
        "hosts": "a:2,b:2",
        "host_discovery_script": "hosts.sh",
        "start_timeout": 40,
        "ssh_port": 23,
        "ssh_identity_file": "key",
        "disable_cache": True,
        "output_filename": "out",
        "verbose": True,
        "use_gloo": True,
        "mpi_args": "-q",
        "executable": "python3",
    }
    hvd.run(four, np=4, min_np=2, max_np=6, network_interface="eth0,eth1", **given)

    (request,) = requests
    options = request["options"]
    assert options.items() >= given.items()
    assert (options["num_proc"], options["min_num_proc"], options["max_num_proc"]) == (4, 2, 6)
    assert options["network_interfaces"] == ["eth0", "eth1"]
    # Nothing that Horovod warns about, and nothing that it does not know.
    assert not {"np", "min_np", "max_np", "network_interface"} & set(options)
    inspect.signature(runner.run).bind(four, **options)


def test_one_process_is_the_default(requests):
    hvd.run(four)
    hvd.run(four, num_proc=3, np=3)

    assert [request["options"]["num_proc"] for request in requests] == [1, 3]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"func": 4}, TypeError, "`func` must be a function. Received: func=4"),
        ({"args": "ab"}, TypeError, "`args` must be a tuple or list .* Received: args='ab'"),
        ({"kwargs": [1]}, TypeError, "`kwargs` must be a dict .* Received"),
        ({"num_proc": 0}, ValueError, "`num_proc` must be an integer of at least 1. Received: num_proc=0"),
        ({"np": 2.5}, ValueError, "`num_proc` must be an integer of at least 1. Received: num_proc=2.5"),
        ({"num_proc": None}, ValueError, "`num_proc` must be an integer of at least 1"),
        ({"start_timeout": -1}, ValueError, "`start_timeout` must be an integer of at least 1"),
        ({"num_proc": 2, "np": 3}, ValueError, "one argument.* Received: num_proc=2, np=3"),
        ({"min_num_proc": 2, "min_np": 1}, ValueError, "Received: min_num_proc=2, min_np=1"),
        ({"np": 2, "min_np": 3}, ValueError, "`num_proc` must lie between"),
        ({"np": 4, "max_np": 3}, ValueError, "`num_proc` must lie between"),
        ({"hosts": "a:1", "hostfile": "x"}, ValueError, "`hosts` and `hostfile` exclude each other"),
        ({"use_gloo": True, "use_mpi": True}, ValueError, "`use_gloo` and `use_mpi` exclude"),
        ({"hostfile": "no/such/file"}, ValueError, "`hostfile` must be an existing file"),
        ({"network_interfaces": "eth0"}, TypeError, "`network_interfaces` must be a list"),
        ({"network_interface": "a", "network_interfaces": ["b"]}, ValueError, "one argument"),
        ({"args": (threading.Lock(),)}, TypeError, "must pickle.* Received: cannot pickle"),
        ({"nproc": 2}, TypeError, "Did you mean `num_proc`"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused(requests, wrong, error, message):
    with pytest.raises(error, match=message):
        hvd.run(**{"func": four, **wrong})
    assert requests == []


def test_use_mpi_needs_an_engine_with_mpi(monkeypatch, requests):
    monkeypatch.setattr(run, "installed_record", lambda: {"transports": ["gloo"]})
    with pytest.raises(ValueError, match="hvdext build-horovod --with-mpi"):
        hvd.run(four, np=2, use_mpi=True)

    monkeypatch.setattr(run, "installed_record", lambda: {"transports": ["gloo", "mpi"]})
    hvd.run(four, np=2, use_mpi=True)
    assert len(requests) == 1


def test_without_horovod_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(run, "horovod_folder", lambda: None)

    with pytest.raises(ImportError, match="hvdext build-horovod"):
        hvd.run(four, np=2)


def test_a_rank_does_not_start_ranks(monkeypatch):
    monkeypatch.setenv("HOROVOD_SIZE", "2")

    with pytest.raises(RuntimeError, match="one of 2 processes"):
        hvd.run(four, np=2)


def test_the_ranks_find_this_process_s_modules(monkeypatch):
    monkeypatch.setattr(sys, "path", ["", "/mine", *sys.path])

    places = run._python_path().split(os.pathsep)

    assert places[:2] == [os.getcwd(), "/mine"]
    assert os.path.dirname(os.__file__) not in places  # each Python has its own


@pytest.fixture
def store():
    """A store's addresses and a function that makes a task for a call."""
    addresses = tuple(open_server())

    def task(func, *args):
        return driver.Task(cloudpickle.dumps((func, args, {})), ("127.0.0.1:9", *addresses), "job")

    return KeyValueStore(addresses[0], "job"), task


def test_a_task_returns_its_result_as_a_pickle(store):
    _, task = store
    ten = 10

    assert pickle.loads(task(lambda x: x + ten, 5)()) == 15


def test_the_first_to_fail_comes_first_with_its_traceback(store, monkeypatch):
    place, task = store
    for rank, fail in ((2, lambda: 1 / 0), (0, lambda: sys.exit(0))):
        monkeypatch.setenv("HOROVOD_RANK", str(rank))
        monkeypatch.setenv("HOROVOD_SIZE", "4")
        with pytest.raises((ZeroDivisionError, SystemExit)):
            task(fail)()

    failures = driver._failures(place, range(4))

    assert [rank for rank, _ in failures] == [2, 0]
    message, rank = run._explained("RuntimeError: one process", failures)
    assert rank == 2
    assert message.startswith("hvd.run: rank 2 failed:\n\nTraceback")
    assert "ZeroDivisionError: division by zero" in message
    assert "launch_driver" not in message  # the user's own lines only
    assert message.endswith("  rank 0: SystemExit: 0")


def test_a_rank_that_dies_silently_leaves_the_launchers_word():
    message, rank = run._explained("RuntimeError: Process name: 1 Exit code: 7", [])

    assert rank is None
    assert "Exit code: 7" in message
