"""What a server is told to serve."""

from pathlib import Path

import pytest

from hvdext.serving.scheduler.model_names import Named, in_repository, parse_model, parse_models
from hvdext.serving.settings import Settings


@pytest.mark.parametrize(
    ("text", "name", "version", "path"),
    [
        ("model.keras", "model", 1, "model.keras"),
        ("out/my.model.keras", "my.model", 1, "out/my.model.keras"),
        ("digits=model.keras", "digits", 1, "model.keras"),
        ("digits:7=a/b.keras", "digits", 7, "a/b.keras"),
        ("digits=x=y.keras", "digits", 1, "x=y.keras"),
        ("/runs/lr=0.1/model.keras", "model", 1, "/runs/lr=0.1/model.keras"),
        ("m=/runs/lr=0.1/model.keras", "m", 1, "/runs/lr=0.1/model.keras"),
        ("m:2=/runs/a:b=1/model.keras", "m", 2, "/runs/a:b=1/model.keras"),
        ("/runs/lr=0.1/3", None, None, None),
        ("saved/digits", "digits", 1, "saved/digits"),
        ("saved/digits/3", "digits", 3, "saved/digits/3"),
        ("saved/digits/3/", "digits", 3, "saved/digits/3"),
        ("digits:0=a.keras", None, None, None),
        ("digits:x=a.keras", None, None, None),
        ("digits:=a.keras", None, None, None),
        ("../etc=a.keras", None, None, None),
        ("=a.keras", None, None, None),
        ("digits=", None, None, None),
        ("", None, None, None),
        ("my model.keras", None, None, None),
    ],
)
def test_models_have_names(text, name, version, path):
    if name is None:
        with pytest.raises(ValueError, match="Received"):
            parse_model(text)
    else:
        assert parse_model(text) == Named(name, version, Path(path))


def test_a_path_that_is_there_has_no_label(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1" / "digits" / "1").mkdir(parents=True)
    assert parse_model("lr=0.1/digits/1") == Named("digits", 1, Path("lr=0.1/digits/1"))
    assert parse_model("lr=0.2/digits/1") == Named("lr", 1, Path("0.2/digits/1"))


def test_a_name_stands_for_one_model():
    with pytest.raises(ValueError, match=r"'a/m.keras' and 'b/m.keras', both m:1"):
        parse_models(["a/m.keras", "b/m.keras"])
    assert len(parse_models(["a/m.keras", "m:2=b/m.keras"])) == 2


def test_a_repository(tmp_path):
    for file in ("one.keras", "two/1/model.keras", "two/3/saved_model.pb", "two/x/model.keras", "no.txt"):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "empty" / "2").mkdir(parents=True)
    held = [
        (model.name, model.version, str(model.path.relative_to(tmp_path)))
        for model in in_repository(tmp_path)
    ]
    assert held == [("one", 1, "one.keras"), ("two", 1, "two/1/model.keras"), ("two", 3, "two/3")]
    (tmp_path / "two.keras").touch()
    with pytest.raises(ValueError, match="each version once"):
        in_repository(tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mode": "both"}, "`mode` must be one of 'replicas', 'pipeline'"),
        ({"mode": "pipeline"}, "2 ranks or more"),
        ({"max_batch_size": 0}, "`max_batch_size` must be an integer of at least 1"),
        ({"batch_sizes": (1, 8)}, "end with max_batch_size, 32"),
        ({"batch_sizes": (32, 8)}, "each larger than the last"),
        ({"batch_sizes": (0, 32)}, "1 or more"),
        ({"max_delay": -1.0}, "0 seconds or more"),
        ({"max_delay": float("nan")}, "0 seconds or more"),
        ({"timeout": 0.0}, "`timeout` must be more than 0 seconds. Received: timeout=0.0"),
        ({"max_queue": True}, "`max_queue` must be an integer of at least 1"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        Settings(**setting)
