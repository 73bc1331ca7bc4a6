"""One rank's model reaches every host once and is loaded by all. Ranks are threads, hosts pretended."""

import keras
import numpy as np
import pytest

from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import current, use
from hvdext.inference.deploy import deploy as module
from hvdext.inference.deploy import hosts
from hvdext.inference.deploy.deploy import deploy
from hvdext.inference.deploy.manifest import describe
from hvdext.inference.deploy.model_store import Store, Writer
from hvdext.inference.deploy.relay import relay
from hvdext.testing import run_ranks

HOSTS = "aabbcb"
X = np.random.default_rng(0).normal(size=(7, 6)).astype("float32")


def _model(seed=1):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(40, activation="tanh"), keras.layers.Dense(3)], name="net"
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with the model in all forms, and what it says."""
    folder, model = tmp_path_factory.mktemp("saved"), _model()
    model.compile("adam", "mse")
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    model.export(folder / "exported", verbose=False)
    return folder, model.predict(X, verbose=0)


@pytest.fixture
def on_hosts(tmp_path, monkeypatch):
    """Calls `program(cache)` on ranks that are on the given hosts; each host has a cache of its own."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 1000)

    def run(names, program):
        monkeypatch.setattr(hosts, "host_name", lambda: names[current().rank])
        return run_ranks(len(names), lambda comm: program(comm, tmp_path / f"cache {names[comm.rank]}"))

    return run


def _chunk_bytes(comm):
    """Bytes of the model's files that this rank has sent."""
    entry = comm.ledger.entry("hvdext.deploy.chunk", comm.ranks)
    return int(entry.sent.numpy())


def test_leaders():
    assert hosts.leaders(["a", "b", "a", "b", "c"], 0) == [0, 1, 0, 1, 4]
    assert hosts.leaders(["a", "b", "a", "b", "c"], 3) == [0, 3, 0, 3, 4]


@pytest.mark.parametrize("route", [[0, 1], [2, 0, 3], [1, 0, 2, 3]])
@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_chunks_go_from_hand_to_hand(route, count):
    data = [bytes([i]) * (i + 1) for i in range(count)]

    def program(comm):
        source, received, most = iter(data), [], []
        relay(comm, route, count, lambda: next(source), lambda c: received.append(c.tobytes()), most.append)
        return received, _chunk_bytes(comm), most

    for rank, (received, sent, steps) in enumerate(run_ranks(4, program)):
        assert received == (data if rank in route[1:] else [])
        assert sent == (sum(map(len, data)) if rank in route[:-1] else 0)
        assert steps == list(range(1, count + len(route) - 1 if count else 1))


@pytest.mark.parametrize("root", [0, 2])
@pytest.mark.slow
def test_each_host_receives_the_file_once(saved, on_hosts, root):
    folder, says = saved
    path = folder / "model.keras"

    def program(comm, cache):
        mine = path if comm.rank == root else "only the root has it.keras"
        sent = []
        for _ in range(2):
            before = _chunk_bytes(comm)
            model = deploy(mine, root_rank=root, cache=cache, verbose=0)
            sent.append(_chunk_bytes(comm) - before)
        return model.predict_on_batch(X), sent, cache.exists()

    ranks = on_hosts(HOSTS, program)
    size = path.stat().st_size
    assert sum(sent[0] for _, sent, _ in ranks) == 2 * size  # two other hosts
    assert all(sent[0] in (0, size) for _, sent, _ in ranks)  # handed on, not sent twice by the root
    assert all(sent[1] == 0 for _, sent, _ in ranks)
    for answer, _, _ in ranks:
        np.testing.assert_allclose(answer, says, atol=1e-6)
    kept = [exists for _, _, exists in ranks]
    assert kept == (
        [False, False, True, True, True, True] if root == 0 else [True, True, False, False, True, False]
    )


def test_a_damaged_entry_is_received_again(saved, on_hosts):
    folder, says = saved
    path, manifest = folder / "model.keras", describe(folder / "model.keras")

    def program(comm, cache):
        deploy(path, cache=cache, verbose=0)
        before = _chunk_bytes(comm)
        if comm.rank == 2:
            entry = Store(cache).path_of(manifest)
            data = bytearray(entry.read_bytes())
            data[len(data) // 2] ^= 1
            entry.write_bytes(data)
        model = deploy(path, cache=cache, verbose=0)
        return model.predict_on_batch(X), _chunk_bytes(comm) - before

    ranks = on_hosts(["a", "b", "c"], program)
    assert [sent for _, sent in ranks] == [path.stat().st_size, 0, 0]  # to the third only
    np.testing.assert_allclose(ranks[2][0], says, atol=1e-6)


@pytest.mark.slow
def test_saved_models_and_weights(saved, on_hosts):
    folder, says = saved
    models = [_model(seed) for seed in (5, 6)]

    def program(comm, cache):
        exported = deploy(folder / "exported", cache=cache, verbose=0)
        given = models[comm.rank]
        results = [exported(X).numpy()]
        for name in ("model.weights.h5", "model.keras"):
            given.set_weights([0 * weight for weight in given.get_weights()])
            assert deploy(folder / name, model=given, cache=cache, verbose=0) is given
            results.append(given.predict_on_batch(X))
        return results, exported.predict(X, batch_size=3, verbose=0)

    for results, predicted in on_hosts(["a", "b"], program):
        for answer in (*results, predicted):
            np.testing.assert_allclose(answer, says, atol=1e-6)


def test_compiled_as_it_was_saved(saved, on_hosts):
    folder, _ = saved

    def program(comm, cache):
        plain = deploy(folder / "model.keras", cache=cache, verbose=0)
        compiled = deploy(folder / "model.keras", compile=True, cache=cache, verbose=0)
        return plain.compiled, compiled.compiled

    assert on_hosts(["a", "b"], program) == [(False, True)] * 2


def test_alone(saved, tmp_path):
    folder, says = saved
    with use(SoloComm()):
        model = deploy(folder / "model.keras", cache=tmp_path / "cache", verbose=0)
    np.testing.assert_allclose(model.predict_on_batch(X), says, atol=1e-6)
    assert not (tmp_path / "cache").exists()


def _errors(on_hosts, names, action):
    """Kind and text of each rank's error; all ranks must have the same."""

    def program(comm, cache):
        with pytest.raises(Exception) as caught:
            action(comm, cache)
        return caught.type, str(caught.value)

    (error,) = set(on_hosts(names, program))
    return error


def test_no_file_is_told_to_all(tmp_path, on_hosts):
    kind, text = _errors(on_hosts, "ab", lambda comm, cache: deploy(tmp_path / "x.keras", cache=cache))
    assert kind is FileNotFoundError
    assert "rank 0 has no model to deploy" in text
    assert str(tmp_path / "x.keras") in text


def test_a_full_disk_is_told_to_all(saved, on_hosts, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("hvdext.inference.deploy.model_store.shutil.disk_usage", lambda folder: usage)
    path = saved[0] / "model.keras"
    kind, text = _errors(on_hosts, "aab", lambda comm, cache: deploy(path, cache=cache, verbose=0))
    assert kind is OSError
    assert "rank 2: " in text
    assert "10 left" in text


def test_a_user_without_a_cache_is_told_to_all(saved, on_hosts, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("hvdext.inference.deploy.model_store.default_cache", homeless)
    path = saved[0] / "model.keras"
    kind, text = _errors(on_hosts, "ab", lambda comm, cache: deploy(path, verbose=0))
    assert kind is RuntimeError
    assert "rank 1: RuntimeError: Could not determine home directory." in text


@pytest.mark.parametrize("where", ["a link", "a disk", "the source"])
def test_damage_on_the_way_is_told_to_all(saved, on_hosts, monkeypatch, where):
    path = saved[0] / "model.keras"
    if where == "a disk":

        def broken(self, chunk, write=Writer.write):
            write(self, chunk)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Writer, "write", broken)
    elif where == "a link":

        def noisy(path, manifest, size, real=module.chunks):
            for number, chunk in enumerate(real(path, manifest, size)):
                yield chunk if number != 1 else bytes([chunk[0] ^ 4]) + chunk[1:]

        monkeypatch.setattr(module, "chunks", noisy)
    else:

        def unreadable(path, manifest, size, real=module.chunks):
            yield next(real(path, manifest, size))
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(module, "chunks", unreadable)
    kept = []

    def action(comm, cache):
        kept.append(Store(cache))
        deploy(path, cache=cache, verbose=0)

    kind, text = _errors(on_hosts, "abc", action)
    assert kind is OSError
    assert "has not arrived" in text
    expected = {
        "a link": "ranks 1, 2: DamagedModel: 'model.keras' is damaged: its SHA-256 is",
        "a disk": "ranks 1, 2: OSError: [Errno 28] No space left on device",
        "the source": "rank 0: OSError: [Errno 5] Input/output error",
    }
    assert expected[where] in text
    assert all(store.find(describe(path)) is None for store in kept)


def test_a_model_that_does_not_load_is_told_to_all(tmp_path, on_hosts):
    code = keras.Sequential([keras.Input((6,)), keras.layers.Lambda(lambda x: x + 1)])
    code.save(tmp_path / "code.keras")
    kind, text = _errors(
        on_hosts, "ab", lambda c, cache: deploy(tmp_path / "code.keras", cache=cache, verbose=0)
    )
    assert kind is ValueError
    assert "safe_mode" in text


def test_weights_of_another_model_are_told_to_all(saved, on_hosts):
    other = [keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)]) for _ in range(2)]
    path = saved[0] / "model.weights.h5"
    _, text = _errors(
        on_hosts, "ab", lambda comm, cache: deploy(path, model=other[comm.rank], cache=cache, verbose=0)
    )
    assert "could not be loaded" in text


def test_a_file_that_changes_meanwhile(tmp_path, on_hosts, monkeypatch):
    path = tmp_path / "model.keras"
    _model().save(path)

    def changed(place, *rest, real=module._load):
        if place == path:
            path.write_bytes(path.read_bytes())
        return real(place, *rest)

    monkeypatch.setattr(module, "_load", changed)
    _, text = _errors(on_hosts, "ab", lambda comm, cache: deploy(path, cache=cache, verbose=0))
    assert "rank 0: " in text
    assert "changed while it was deployed" in text


def test_arguments(saved, on_hosts):
    folder, _ = saved
    path = folder / "model.keras"

    def error(**arguments):
        return _errors(on_hosts, "ab", lambda comm, cache: deploy(path, cache=cache, **arguments))

    assert error(root_rank=2)[1].startswith("`root_rank` must be one of the ranks [0, 1].")
    assert error(model="net")[1].startswith("`model` must be a Keras model, or None.")
    assert error(compile=1)[1].startswith("`compile` must be True or False.")
    assert error(verbose="auto")[1].startswith("`verbose` must be 0 or 1.")
    assert error(custom_objects=[1])[1].startswith("`custom_objects` must be a dict")
    differ = _errors(on_hosts, "ab", lambda comm, cache: deploy(path, root_rank=comm.rank, cache=cache))
    assert differ[1] == "The ranks disagree about hvd.deploy:\n  root_rank: rank 0: 0; rank 1: 1"
    weights = _errors(on_hosts, "ab", lambda comm, cache: deploy(folder / "model.weights.h5", cache=cache))
    assert "`model` must be given with weights" in weights[1]
    given = _model()
    both = _errors(on_hosts, "ab", lambda comm, cache: deploy(folder / "exported", model=given, cache=cache))
    assert "`model` must be None with a SavedModel" in both[1]


def test_progress_is_shown_by_rank_0_only(saved, on_hosts, capsys):
    path = saved[0] / "model.keras"
    on_hosts("abb", lambda comm, cache: deploy(path, root_rank=1, cache=cache) and None)
    shown = capsys.readouterr().out
    chunks = -(-path.stat().st_size // 1000)
    assert shown.count("model.keras: to 1 of 2 hosts") == 1
    assert f"{chunks}/{chunks}" in shown
    on_hosts("abb", lambda comm, cache: deploy(path, root_rank=1, cache=cache) and None)
    assert capsys.readouterr().out == ""
