"""Which GPU a rank takes, on hosts whose GPUs are only reported."""

import types
import warnings

import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.launch.gpus import take_gpu


class Host:
    """What TensorFlow would know of a host with so many GPUs."""

    def __init__(self, monkeypatch, gpus):
        self.gpus = [f"GPU:{i}" for i in range(gpus)]
        self.visible = list(self.gpus)
        self.grows = dict.fromkeys(self.gpus)
        self.error = None
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: self.gpus)
        monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: self.visible)
        monkeypatch.setattr(tf.config, "set_visible_devices", self.see)
        growth = {"get_memory_growth": self.grows.get, "set_memory_growth": self.grows.__setitem__}
        monkeypatch.setattr(tf.config, "experimental", types.SimpleNamespace(**growth))

    def see(self, device, kind):
        if self.error is not None:
            raise self.error
        self.visible = [device]


def rank(local_rank, local_size, **environ):
    numbers = {"RANK": local_rank, "SIZE": local_size, "LOCAL_RANK": local_rank, "LOCAL_SIZE": local_size}
    return {f"HOROVOD_{name}": str(number) for name, number in numbers.items()} | environ


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(("local_rank", "gpu"), [(0, "GPU:0"), (1, "GPU:1"), (3, "GPU:3")])
def test_each_rank_takes_its_own(monkeypatch, quiet, local_rank, gpu):
    host = Host(monkeypatch, gpus=4)
    take_gpu(rank(local_rank, 4))
    assert host.visible == [gpu]
    assert host.grows == dict.fromkeys(host.gpus) | {gpu: True}


def test_ranks_share_what_is_too_little_and_one_says_so(monkeypatch):
    host = Host(monkeypatch, gpus=2)
    with pytest.warns(UserWarning, match=r"3 ranks of this host share 2 GPU\(s\)"):
        take_gpu(rank(0, 3))
    host = Host(monkeypatch, gpus=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_gpu(rank(2, 3))
    assert host.visible == ["GPU:0"]


def test_a_launcher_that_deals_gpus_out_is_followed(monkeypatch, quiet):
    host = Host(monkeypatch, gpus=1)
    take_gpu(rank(0, 2, CUDA_VISIBLE_DEVICES="0"))
    assert host.visible == ["GPU:0"]


def test_what_the_script_has_chosen_stays(monkeypatch, quiet):
    host = Host(monkeypatch, gpus=4)
    host.visible = ["GPU:2", "GPU:3"]
    take_gpu(rank(1, 2))
    assert host.visible == ["GPU:2", "GPU:3"]
    host = Host(monkeypatch, gpus=4)
    host.grows["GPU:1"] = False
    take_gpu(rank(1, 2))
    assert host.grows["GPU:1"] is False


def test_a_tensorflow_that_runs_already_is_told_of(monkeypatch):
    host = Host(monkeypatch, gpus=4)
    host.error = RuntimeError("Visible devices cannot be modified after being initialized")
    with pytest.warns(UserWarning, match="before hvd.init"):
        take_gpu(rank(1, 2))
    assert host.visible == host.gpus


def test_init_alone_leaves_devices_alone(monkeypatch, quiet):
    host = Host(monkeypatch, gpus=4)
    hvd.init()
    hvd.shutdown()
    assert host.visible == host.gpus


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match=r"`gpus` must be one of 'local_rank', None. Received: gpus='local'"):
        hvd.init(gpus="local")
