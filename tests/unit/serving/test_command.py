"""The arguments of `hvdext serve`, refused alike on every rank."""

import argparse

import pytest

from hvdext import cli
from hvdext.serving import command, options

TWO = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"}
BOARD = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": "1"}


def check(*arguments, environ=None):
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return options.check(parser.parse_args(arguments), environ or {})


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        ([], {}, "a model or --repository must be given"),
        (["a/m.keras", "b/m.keras"], {}, "both m:1"),
        (["m.keras", "--mode", "both"], {}, "`mode` must be one of 'replicas', 'pipeline'"),
        (["m.keras", "--mode", "pipeline"], {}, "2 ranks or more"),
        (["m.keras", "--port", "70000"], {}, "--port must be 0 to 65535. Received: 70000"),
        (["m.keras", "--max-batch-size", "0"], {}, "`max_batch_size` must be an integer of at least 1"),
        (["m.keras", "--batch-sizes", "1,8", "--max-batch-size", "16"], {}, "end with max_batch_size, 16"),
        (["m.keras", "--timeout", "nan"], {}, "`timeout` must be more than 0"),
        (["m.keras", "--drain-seconds", "-1"], {}, "--drain-seconds must be more than 0 seconds"),
        (["m.keras", "--tls-cert", "c.pem"], {}, "belong together. Received: --tls-cert only"),
        (["m.keras", "--threads", "0"], {}, "must be 1 or more. Received: 0"),
        (["m.keras"], {"HVDEXT_SERVE_THREADS": "many"}, "must be 1 or more. Received: 'many'"),
        (["m.keras"], TWO, "give --coordinator HOST:PORT"),
        (["m.keras", "--coordinator", "host"], TWO, "must be HOST:PORT. Received: 'host'"),
        (["m.keras", "--coordinator", "host:99"], TWO, "16 characters or more in .*Received: 0 characters"),
        (["m.keras"], {"HOROVOD_RANK": "2", "HOROVOD_SIZE": "2"}, "below its number of ranks"),
    ],
)
def test_arguments_are_checked(arguments, environ, message):
    with pytest.raises(options.ServeError, match=message):
        check(*arguments, environ=environ)


def test_what_the_arguments_mean():
    arguments = ["m=a.keras", "--batch-sizes", "1,8,64", "--max-delay-ms", "5", "--max-queue-bytes", "2MiB"]
    job = check(*arguments, "--threads", "3", environ=TWO | BOARD)
    assert job.settings.max_batch_size == 64
    assert job.settings.batch_sizes == (1, 8, 64)
    assert job.settings.max_delay == 0.005
    assert job.settings.max_queue_bytes == 2 << 20
    assert (job.where.rank, job.settings.size, job.threads) == (1, 2, 3)
    assert check("m.keras", environ={"HVDEXT_SERVE_THREADS": "5"}).threads == 5
    other = check("m.keras", "--coordinator", "host:99", environ=TWO | {options.TOKEN: "x" * 16})
    assert options.where_front_listens(other.args) == ("host", 99)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.keras"], "missing.keras"),
        (["--repository", "missing"], "--repository must be a folder. Received: 'missing'"),
        (["model.h5"], ".keras file"),
        (["--host", "203.0.113.9", "model.keras"], "cannot listen at 203.0.113.9:0"),
        (["model.keras", "--api-key-file", "missing.txt"], "missing.txt"),
        (["model.keras", "--tls-cert", "model.keras", "--tls-key", "model.keras"], "PEM"),
    ],
)
def test_rank_0_says_what_is_missing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.keras").write_text("model")
    (tmp_path / "model.h5").write_text("model")
    assert cli.main(["serve", "--port", "0", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(command, "_PACKAGES", ("starlette", "no_such_package"))
    assert cli.main(["serve", "model.keras"]) == 1
    assert "no_such_package is missing. Install it: pip install 'hvdext[serve]'" in capsys.readouterr().err
