"""The decisions around a build; nothing is compiled here."""

import pytest

from hvdext.engine import EngineError, build, cache, record
from hvdext.engine.target import Options, TensorFlowInstall, current_target

WHEEL = "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """Replaces compiling and installing; what was asked for is listed."""
    done = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "find_tensorflow", lambda: TensorFlowInstall("2.21.0", tmp_path))

    def compile_it(target, tensorflow):
        done.append("build")
        wheel = tmp_path / WHEEL
        wheel.write_bytes(b"")
        return cache.store(wheel, target)

    monkeypatch.setattr(build, "_build", compile_it)
    monkeypatch.setattr(build, "install_wheel", lambda wheel: done.append("install"))
    monkeypatch.setattr(record, "horovod_folder", lambda: tmp_path / "horovod")
    (tmp_path / "horovod").mkdir()
    return done


def install_record(folder, **options):
    target = current_target("2.21.0", Options(**options))
    record.write_record(folder, target)


def test_the_first_time_builds_and_installs(steps):
    assert build.build_horovod().name == WHEEL
    assert steps == ["build", "install"]


def test_a_cached_wheel_is_only_installed(steps):
    build.build_horovod(install=False)
    build.build_horovod()

    assert steps == ["build", "install"]


def test_other_options_are_another_engine(steps):
    build.build_horovod(install=False)
    build.build_horovod(with_mpi=True, install=False)

    assert steps == ["build", "build"]


def test_an_installed_engine_is_left_alone(steps, tmp_path, capsys):
    install_record(tmp_path / "horovod")

    assert build.build_horovod() is None
    assert steps == []
    assert "installed already" in capsys.readouterr().err


def test_an_installed_engine_with_other_options_is_replaced(steps, tmp_path):
    install_record(tmp_path / "horovod", mpi=True)
    build.build_horovod()

    assert steps == ["build", "install"]


def test_force_builds_again(steps, tmp_path):
    install_record(tmp_path / "horovod")
    build.build_horovod(install=False)
    build.build_horovod(force=True)

    assert steps == ["build", "build", "install"]


def test_a_source_that_does_not_fit_is_not_recorded(tmp_path):
    (tmp_path / "horovod").mkdir()

    with pytest.raises(EngineError, match="nothing will be built"):
        build.prepare_source(tmp_path, current_target("2.21.0", Options()))

    assert not (tmp_path / "horovod" / record.RECORD_FILE).exists()


@pytest.mark.slow
def test_a_failed_installation_shows_what_pip_said(tmp_path):
    with pytest.raises(EngineError, match=r"pip could not install .*no-such"):
        build.install_wheel(tmp_path / "no-such.whl")
