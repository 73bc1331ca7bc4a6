"""`hvdext plan model.keras --places 2`."""

import keras
import pytest

import hvdext as hvd
from hvdext import cli
from hvdext.common.number_of_bytes import number_of_bytes


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    x = keras.Input((4,), name="x")
    h = keras.layers.Dense(4, name="a")(x)
    h = keras.layers.Dense(4, name="b")(h)
    path = tmp_path_factory.mktemp("models") / "model.keras"
    keras.Model(x, keras.layers.Dense(2, name="c")(h), name="three").save(path)
    return str(path)


def test_a_plan_from_the_shell(model_file, tmp_path, capsys):
    files = [str(tmp_path / name) for name in ("plan.yaml", "plan.png")]
    arguments = [
        "--places",
        "2",
        "--balance",
        "memory",
        "--pin",
        "a=0",
        "--pin",
        "[bc]=1",
        "--max-memory",
        "1.5kB",
    ]
    more = ["--batch-size", "4", "--slots", "1", "--crossing", "0.5", "--save", files[0], "--draw", files[1]]

    assert cli.main(["plan", model_file, *arguments, *more]) == 0

    model = keras.models.load_model(model_file)
    plan = hvd.plan(model, 2, "memory", {"a": 0, "[bc]": 1}, 1500, batch_size=4, slots=1, crossing=0.5)
    assert capsys.readouterr().out == plan.table() + "\n"
    assert hvd.Plan.load(files[0]) == plan
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--places", "9"],
            "hvdext plan: error: `places` must be at most the number of layers, 3. Received: places=9.",
        ),
        (["--places", "2", "--max-memory", "1B"], "`max_memory` must be at least "),
        (
            ["--places", "2", "--pin", "a=0", "--pin", "a=1"],
            "`pins` must not contradict each other. Received: 'a'",
        ),
        (["--places", "2", "--import", "no_such_module"], "No module named 'no_such_module'"),
    ],
)
def test_what_cannot_be_planned_is_a_message(model_file, capsys, arguments, message):
    assert cli.main(["plan", model_file, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_file_that_is_none(capsys):
    assert cli.main(["plan", "missing.keras", "--places", "2"]) == 1
    assert "missing.keras" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pin", "a"], "must be LAYERS=PLACE, such as 'encoder/*=0'. Received: 'a'."),
        (["--max-memory", "much"], "must be a number of bytes, such as 500MB or 2GiB. Received: 'much'."),
        (["--max-memory", "1.2.3kB"], "must be a number of bytes"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "model.keras", "--places", "2", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "number"),
    [("500", 500), ("2GiB", 2 * 1024**3), ("1.5 MB", 1_500_000), ("1e6", 10**6), ("7kB", 7000)],
)
def test_bytes(text, number):
    assert number_of_bytes(text) == number
