"""What the matrix takes for wrong, and for refused."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.trainers.conformance.columns import Found, Refused, Wrong, check_equal, found_by
from tests.trainers.conformance.plain import Plain, SampleNumbers, order, seed_of
from tests.trainers.conformance.runs import Answer, Job
from trainers.counter_rng import SampleRandom, combine_seeds
from trainers.data.sampling import SampleStream

Change = Callable[[Found], object]
LINEAR = nn.Linear(2, 2).double()
RIGHT = Plain(LINEAR, [1.0, 0.5], {2: {"loss": 0.4, "accuracy": 0.9}})


def found() -> Found:
    state = copy.deepcopy(dict(LINEAR.state_dict()))
    return Found({1: 1.0, 2: 0.5}, {2: {"loss": 0.4, "accuracy": 0.9}}, state)


def test_what_is_equal_passes() -> None:
    check_equal(found(), RIGHT, 1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.losses.update({2: 0.5 + 2e-9}), "train/loss at step 2"),
        (lambda f: f.losses.pop(1), "train/loss at step 1 is nan"),
        (lambda f: f.evaluations[2].update(loss=0.41), "val/loss at step 2"),
        (lambda f: f.evaluations[2].pop("accuracy"), "metrics are"),
        (lambda f: f.evaluations.pop(2), "evaluated after"),
        (lambda f: f.state["weight"][1, 1].add_(1e-6), "weight is"),
        (lambda f: f.state.update(bias=torch.zeros(3)), "bias is torch.float32"),
        (lambda f: f.state.pop("bias"), "names of weights"),
    ],
)
def test_a_difference_is_seen(change: Change, message: str) -> None:
    other = found()
    change(other)
    with pytest.raises(Wrong, match=message):
        check_equal(other, RIGHT, 1e-9)


def test_only_a_sentence_before_the_first_step_is_a_refusal(tmp_path) -> None:
    job = Job({}, tmp_path, tmp_path)
    with pytest.raises(Refused):
        found_by(job, Answer({}, {}, 0, "no blocks", refused=True))
    for answer in (Answer({}, {}, 1, "no blocks", refused=True), Answer({}, {}, 0, "KeyError: 1")):
        with pytest.raises(Wrong):
            found_by(job, answer)


def test_the_plain_loop_draws_what_is_documented() -> None:
    """Seeds, the order of samples and a sample's numbers, by code that is not Heliostat's."""
    assert [seed_of(3), seed_of(3, 2**31), seed_of(0, 5, 1, 0)] == [
        combine_seeds(3),
        combine_seeds(3, 2**31),
        combine_seeds(0, 5, 1, 0),
    ]
    stream = SampleStream({"x": torch.zeros(7)}, 4, 3)
    found = torch.cat([stream.positions_and_indices(step)[1] for step in range(5)])
    assert order(4, 7, 15).equal(found)
    ours, plain = SampleRandom(9, torch.arange(5, 9)), SampleNumbers(9, range(5, 9))
    for _ in range(2):
        assert ours.uniform(3, 2).equal(plain.uniform(3, 2))
