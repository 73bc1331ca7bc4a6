"""The wheel cache."""

from hvdext.engine import cache
from hvdext.engine.target import Options, Target

TARGET = Target("2.21.0", "cp311", "linux_x86_64", Options(), "0" * 64)
WHEEL = "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"


def test_place_follows_xdg_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert cache.cache_folder(TARGET) == tmp_path / "hvdext" / "engine" / TARGET.key


def test_place_without_xdg_cache_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    assert cache.cache_folder(TARGET).is_relative_to(tmp_path / ".cache")


def test_a_stored_wheel_is_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wheel = tmp_path / WHEEL
    wheel.write_bytes(b"first")

    assert cache.cached_wheel(TARGET) is None
    stored = cache.store(wheel, TARGET)

    assert cache.cached_wheel(TARGET) == stored
    assert stored.read_bytes() == b"first"


def test_a_second_build_replaces_the_first_and_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wheel = tmp_path / WHEEL
    wheel.write_bytes(b"first")
    cache.store(wheel, TARGET)
    wheel.write_bytes(b"second")
    stored = cache.store(wheel, TARGET)

    assert stored.read_bytes() == b"second"
    assert [path.name for path in stored.parent.iterdir()] == [WHEEL]


def test_a_half_written_wheel_is_not_found(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache.cache_folder(TARGET)
    folder.mkdir(parents=True)
    (folder / f".{WHEEL}.4711").write_bytes(b"half")

    assert cache.cached_wheel(TARGET) is None
