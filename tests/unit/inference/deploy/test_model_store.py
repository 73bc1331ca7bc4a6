"""Manifests, chunks and the cache of a host."""

import hashlib
import os
import subprocess
import sys
import threading
import time

import pytest

from hvdext.inference.deploy import manifest as manifests
from hvdext.inference.deploy import model_store
from hvdext.inference.deploy.manifest import DamagedModel, File, Manifest, chunks, describe
from hvdext.inference.deploy.model_store import Store

DATA = {
    "saved_model.pb": b"graph" * 100,
    "assets/vocabulary.txt": b"",
    "variables/variables.data-00000-of-00001": bytes(range(256)) * 5,
    "variables/variables.index": b"i",
}


@pytest.fixture
def folder(tmp_path):
    """A folder that looks like a SavedModel; one of its files is empty."""
    path = tmp_path / "source"
    for name, data in DATA.items():
        place = path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return path


def _receive(store, path, manifest, size=7):
    with store.receive(manifest) as writer:
        for chunk in chunks(path, manifest, size):
            writer.write(chunk)
    return writer.path


def _assert_refused(store, manifest, parts, message):
    with pytest.raises(DamagedModel, match=message), store.receive(manifest) as writer:
        list(map(writer.write, parts))


def _contents(path):
    files = [place for place in path.rglob("*") if place.is_file()]
    return {place.relative_to(path).as_posix(): place.read_bytes() for place in files}


def test_a_manifest_describes_every_file(folder):
    manifest = describe(folder)
    assert manifest.kind == "saved_model"
    assert {f.name: (f.size, f.sha256) for f in manifest.files} == {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in DATA.items()
    }
    assert manifest.size == 500 + 1280 + 1
    assert Manifest.from_json(manifest.to_json()) == manifest
    (folder / "variables/variables.index").write_bytes(b"j")
    assert describe(folder).digest != manifest.digest


def test_a_file_is_the_same_under_any_name(tmp_path):
    for name in ("first.keras", "second.keras"):
        (tmp_path / name).write_bytes(b"archive")
    (tmp_path / "x.weights.h5").write_bytes(b"archive")
    first, second = describe(tmp_path / "first.keras"), describe(tmp_path / "second.keras")
    assert first.digest == second.digest
    assert first.digest != describe(tmp_path / "x.weights.h5").digest


@pytest.mark.parametrize("size", [1, 7, 500, 1781, 5000])
def test_chunks_are_the_bytes_in_order(folder, size):
    manifest = describe(folder)
    parts = list(chunks(folder, manifest, size))
    assert len(parts) == manifest.chunks(size) == -(-1781 // size)
    assert all(len(part) == size for part in parts[:-1])
    assert b"".join(parts) == b"".join(DATA[file.name] for file in manifest.files)


@pytest.mark.parametrize("size", [1, 7, 5000])
def test_a_received_model_equals_its_source(folder, tmp_path, size):
    store, manifest = Store(tmp_path / "cache"), describe(folder)
    assert store.find(manifest) is None
    path = _receive(store, folder, manifest, size)
    assert path == store.find(manifest) == tmp_path / "cache" / manifest.digest / "saved_model"
    assert _contents(path) == DATA
    assert not list((tmp_path / "cache" / ".partial").iterdir())


def test_an_empty_file_arrives(tmp_path):
    source = tmp_path / "x.keras"
    source.write_bytes(b"")
    store, manifest = Store(tmp_path / "cache"), describe(source)
    assert manifest.chunks() == 0
    assert _receive(store, source, manifest).read_bytes() == b""


@pytest.mark.parametrize("damage", ["changed", "short", "missing", "more"])
def test_a_damaged_entry_is_noticed_and_received_again(folder, tmp_path, damage):
    store, manifest = Store(tmp_path / "cache"), describe(folder)
    path = _receive(store, folder, manifest)
    index = path / "variables/variables.index"
    if damage == "changed":
        index.write_bytes(b"j")
    elif damage == "short":
        index.write_bytes(b"")
    elif damage == "missing":
        index.unlink()
    else:
        (path / "assets.extra").mkdir()
        (path / "assets.extra" / "more").write_bytes(b"")
    assert store.find(manifest) is None
    assert _receive(store, folder, manifest) == store.find(manifest)
    assert _contents(path) == DATA


def test_corrupted_bytes_leave_nothing_behind(folder, tmp_path):
    store, manifest = Store(tmp_path / "cache"), describe(folder)
    parts = list(chunks(folder, manifest, 100))
    parts[7] = bytes([parts[7][0] ^ 1]) + parts[7][1:]
    _assert_refused(store, manifest, parts, r"variables\.data-00000-of-00001' is damaged")
    assert store.find(manifest) is None
    assert not list((tmp_path / "cache" / ".partial").iterdir())


def test_missing_and_additional_bytes_are_errors(folder, tmp_path):
    store, manifest = Store(tmp_path / "cache"), describe(folder)
    data = b"".join(chunks(folder, manifest, 5000))
    _assert_refused(store, manifest, [data[:-1]], r"index' has not come to its end: 1 bytes are missing")
    _assert_refused(store, manifest, [data + b"x"], "1 bytes too many")
    assert store.find(manifest) is None


def test_a_file_that_changes_while_it_is_read(folder):
    manifest = describe(folder)
    (folder / "saved_model.pb").write_bytes(b"longer" * 100)
    with pytest.raises(DamagedModel, match=r"'saved_model\.pb' has changed"):
        list(chunks(folder, manifest, 100))


def test_two_receivers_at_once(folder, tmp_path):
    store, manifest = Store(tmp_path / "cache"), describe(folder)
    data = b"".join(chunks(folder, manifest, 5000))
    with store.receive(manifest) as one, store.receive(manifest) as other:
        one.write(data)
        other.write(data)
    assert _contents(store.find(manifest)) == DATA
    assert not list((tmp_path / "cache" / ".partial").iterdir())


def test_what_a_killed_process_leaves_is_removed(folder, tmp_path):
    store, manifest = Store(tmp_path / "cache"), describe(folder)
    program = (
        "import os, sys; from hvdext.inference.deploy.model_store import Store; "
        "from hvdext.inference.deploy.manifest import describe; "
        "w = Store(sys.argv[1]).receive(describe(sys.argv[2])); w.write(b'graph'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "cache", folder], timeout=60, check=False)
    partial = tmp_path / "cache" / ".partial"
    (left,) = [place for place in partial.iterdir() if place.is_dir()]
    with store.receive(manifest) as writer:
        assert not left.exists()
        writer.write(b"".join(chunks(folder, manifest)))
    assert not list(partial.iterdir())


def test_no_room_on_the_disk(folder, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(model_store.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"has 1,781 bytes and the disk of its cache 1,000 left"):
        Store(tmp_path / "cache").receive(describe(folder))


def test_one_receives_and_the_others_wait(folder, tmp_path):
    manifest, received = describe(folder), []

    def program():
        store = Store(tmp_path / "cache")
        with store.lock(manifest):
            if store.find(manifest) is None:
                time.sleep(0.2)
                received.append(_receive(store, folder, manifest))

    threads = [threading.Thread(target=program) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(received) == 1


def test_a_lock_names_its_holder(folder, tmp_path):
    store, manifest = Store(tmp_path / "cache"), describe(folder)
    second = Store(tmp_path / "cache").lock(manifest, timeout=0.1)
    with store.lock(manifest), pytest.raises(TimeoutError, match=f"process {os.getpid()}"), second:
        pass


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "", ".", "a//b", "a/./b", "a\\b", "a\0", 3, None])
def test_names_cannot_lead_out_of_the_folder(name):
    with pytest.raises(ValueError, match="must be a path within the model"):
        File(name, 1, "0" * 64)


def test_manifests_from_elsewhere_are_checked():
    good = File("saved_model.pb", 1, "0" * 64)
    with pytest.raises(ValueError, match="must be a number of bytes"):
        File("x", -1, "0" * 64)
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        File("x", 1, "0" * 63 + "G")
    with pytest.raises(ValueError, match="each once"):
        Manifest("saved_model", (good, good))
    with pytest.raises(ValueError, match="must list one file"):
        Manifest("keras", (good,))
    with pytest.raises(ValueError, match="kind must be one of"):
        Manifest("pickle", (good,))
    for text in ("", "[]", '{"kind": "keras"}', '{"kind": "keras", "files": [{"name": "x"}]}'):
        with pytest.raises(ValueError, match="must be JSON with kind and files"):
            Manifest.from_json(text)


def test_what_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError):
        describe(tmp_path / "missing.keras")
    with pytest.raises(ValueError, match=r"folder .* without one"):
        describe(tmp_path)
    (tmp_path / "model.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.keras file, a \.weights\.h5 file or a SavedModel"):
        describe(tmp_path / "model.h5")


def test_links_are_refused(folder):
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="files only"):
        describe(folder)


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("HVDEXT_CACHE", raising=False)
    assert str(Store().folder) == "/somewhere/hvdext/models"
    monkeypatch.setenv("HVDEXT_CACHE", str(tmp_path))
    assert Store().folder == tmp_path


def test_tensorflow_is_not_needed():
    program = "import sys, hvdext.inference.deploy.model_store; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert manifests.CHUNK_BYTES == 8 << 20
