"""Requests whose rows must not be computed with others': whole, by themselves, not filled up."""

import asyncio

import numpy as np
import pytest

from hvdext.serving.scheduler.batching import Waiting, make_request
from hvdext.serving.service import InvalidRequest, UnknownModel
from hvdext.serving.settings import Settings
from tests.unit.serving.serving_ranks import Model, serve

REASON = "its answer to a row depends on the other rows of the batch (output 'y')"


class Centred(Model):
    """Subtracts the mean of the rows that come together."""

    def __init__(self, alone=REASON):
        super().__init__(alone=alone)

    def run(self, inputs):
        self.calls.append(len(inputs["x"]))
        return {"y": inputs["x"] - inputs["x"].mean(0)}


def centred(path, stage, stages):
    return Centred()


def test_each_request_gets_what_it_gets_alone(tmp_path):
    async def program(cluster):
        async def client(number):
            for step in range(5):
                first = float(100 * number + step)
                assert await cluster.ask(first, first + 4) == [-2, 2]

        await asyncio.gather(*(client(number) for number in range(8)))
        assert cluster.core.find("m").signature.alone == REASON
        (status,) = cluster.core.status()["models"]
        assert (status["alone"], status["batch_sizes"], status["padded_rows"]) == (REASON, {"2": 40}, 0)
        notes = [note for note in cluster.notes if REASON in note]
        assert notes == [f"m:1: each request is computed by itself: {REASON}"]

    # Neither filled up to one of these sizes, nor waiting for others.
    serve(tmp_path, program, load=centred, batch_sizes=(4, 8), max_batch_size=8, max_delay=5.0)


def test_a_request_is_not_cut(tmp_path):
    async def program(cluster):
        assert await cluster.ask(0, 2, 4, 6) == [-3, -1, 1, 3]
        with pytest.raises(InvalidRequest, match=r"at most 4 rows.*depends on the other rows.*Received: 5"):
            await cluster.ask(0, 2, 4, 6, 8)

    serve(tmp_path, program, load=centred, max_batch_size=4)


@pytest.mark.parametrize(
    ("mix", "alone", "said"), [("always", REASON, ""), ("never", "", "mix_requests is 'never'")]
)
def test_who_runs_the_server_may_decide(tmp_path, mix, alone, said):
    async def program(cluster):
        assert cluster.core.find("m").signature.alone == said
        sizes = [len(rows) for rows in await asyncio.gather(*(cluster.ask(1.0, 3.0) for _ in range(4)))]
        assert sizes == [2] * 4
        (status,) = cluster.core.status()["models"]
        assert (status["batch_sizes"] == {"2": 4}) is (mix == "never")

    options = {"load": lambda path, stage, stages: Centred(alone), "mix_requests": mix, "size": 1}
    serve(tmp_path, program, max_delay=0.2, max_batch_size=8, **options)


def test_the_choice_is_checked():
    with pytest.raises(ValueError, match=r"`mix_requests` must be .*'sometimes'"):
        Settings(mix_requests="sometimes")


def test_one_stage_or_one_rank_that_has_found_it_is_enough(tmp_path):
    async def program(cluster):
        assert cluster.core.find("m").signature.alone == REASON

    def load(path, stage, stages):
        return Model(alone=REASON if stage == 1 else "")

    serve(tmp_path, program, load=load, mode="pipeline", size=3)
    loads = iter(["", REASON])
    serve(tmp_path, program, load=lambda path, stage, stages: Model(alone=next(loads)), size=2)


def test_requests_by_other_signatures_wait_in_lines_of_their_own():
    queue = Waiting(4, 1.0)
    rows = np.ones((1, 1), np.float32)
    for signature, alone in (("a", ""), ("b", ""), ("a", ""), ("c", "so"), ("c", "so")):
        for part in make_request({"x": rows}, 4, 0.0, lambda result: None, signature, alone).parts:
            queue.put(part)
    assert queue.full  # whoever goes alone need not wait
    taken = []
    while parts := queue.take():
        taken.append([part.request.signature for part in parts])
    assert sorted(taken) == [["a", "a"], ["b"], ["c"], ["c"]]
    assert queue.rows == len(queue) == 0
    assert queue.due_at() is None


def test_another_signature_is_computed_by_its_own_model(tmp_path):
    class Two(Model):
        def __init__(self):
            super().__init__()
            self.signatures["half"] = self.signatures["serving_default"]
            self.half = Model(0.5)

        def of(self, signature):
            return self.half if signature == "half" else self

    async def program(cluster):
        inputs = {"x": np.array([[4]], np.float32)}
        _, outputs = await cluster.core.infer("m", None, inputs, None, "half")
        assert outputs["y"].tolist() == [[2]]
        assert await cluster.ask(4) == [40]
        with pytest.raises(UnknownModel, match="no signature 'third'"):
            await cluster.core.infer("m", None, inputs, None, "third")

    serve(tmp_path, program, load=lambda path, stage, stages: Two())
