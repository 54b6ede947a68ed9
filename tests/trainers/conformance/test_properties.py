"""Models of drawn parts: as a plain loop on any workers, to the bit after any kill."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainers.conformance import plain
from tests.trainers.conformance.columns import (
    Found,
    check_equal,
    check_same_bits,
    found_by,
)
from tests.trainers.conformance.runs import Answer, Job, Pair, run_job
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_split
from trainers.spec import RunSpec, resolve
from trainers.worker import Worker

from wild_models.drawn import PARTS  # isort: skip

RULES: list[dict[str, Any]] = [
    {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
    {"name": "sgd", "lr": 0.1, "weight_decay": 0.01, "momentum": 0.9},
    {"name": "sgd", "lr": 0.1, "weight_decay": 0.0, "momentum": 0.0},
]
CLIP = 1.0


@st.composite
def runs(draw: st.DrawFn, shares: int) -> dict[str, Any]:
    """A run: the plain data of its spec, its shares of a batch, and the steps before its kills."""
    parts = draw(st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=4))
    each, micro = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    steps = draw(st.integers(2, 7))
    train = {"steps": steps, "global_batch": shares * micro * each, "micro_batch": each}
    recomputed = draw(st.booleans())
    data = {"train": draw(st.integers(3, 30)), "val": draw(st.integers(1, 9))}
    return {
        "workload": "wild_models.drawn:Drawn",
        "data": data,
        "model": {"parts": parts},
        "optimizer": {
            **draw(st.sampled_from(RULES)),
            "schedule": {"name": "cosine", "warmup": 0.25},
        },
        "train": {
            **train,
            "seed": draw(st.integers(0, 2**31 - 1)),
            "precision": "fp64",
            "clip_norm": CLIP,
            "evaluate_every_epochs": draw(st.sampled_from([0.5, 1, 2])),
            "activation_checkpointing": recomputed,
        },
        "checkpoint": {"every_steps": draw(st.integers(1, steps)), "keep": 1},
        "tracking": {"every_steps": 1},
    }


def kills(steps: int) -> st.SearchStrategy[list[int]]:
    """After how many steps in all a run is killed, each time."""
    return st.lists(st.integers(1, steps), max_size=2)


class Trainer:
    """Trains in this process, or in two."""

    def __init__(self, root: Path) -> None:
        torch.set_num_threads(1)
        self.root = root
        self._pair: Pair | None = None

    def close(self) -> None:
        if self._pair is not None:
            self._pair.close()

    def train(self, data: dict[str, Any], killed: list[int]) -> Found:
        """A run to its end, started again after each kill."""
        _, workload = resolve(data, RunSpec)
        dataset = prepare_dataset(workload, self.root)
        folder = self.root / secrets.token_hex(6)
        found = Found({}, {}, {})
        for after in [*killed, None]:
            job = Job(data, dataset, folder, after)
            answer = self._run(job)
            if answer.error:
                found_by(job, answer)
            found.losses |= answer.losses
            found.evaluations |= answer.evaluations
        found.state = found_by(job, answer).state
        return found

    def _run(self, job: Job) -> Answer:
        if job.data.get("scale", {}).get("workers", 1) == 1:
            return run_job(job, Worker())
        if self._pair is None:
            self._pair = Pair(self.root)
        self._pair.submit(job)
        return self._pair.result()

    def plain(self, data: dict[str, Any], found: Found) -> plain.Plain:
        spec, workload = resolve(data, RunSpec)
        dataset = prepare_dataset(workload, self.root)
        splits = {split: open_split(dataset, split) for split in ("train", "val")}
        shares = spec.scale.max_workers
        assert spec.train.steps is not None
        assert spec.train.micro_batch is not None
        return plain.train(
            workload,
            splits["train"],
            splits["val"],
            steps=spec.train.steps,
            batch=spec.train.global_batch,
            evaluated=set(found.evaluations),
            rule=data["optimizer"],
            clip=CLIP,
            seed=spec.train.seed,
            shares=shares,
            parts=spec.train.global_batch // shares // spec.train.micro_batch,
        )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    trainer = Trainer(tmp_path_factory.mktemp("drawn"))
    yield trainer
    trainer.close()


def check(trainer: Trainer, data: dict[str, Any], killed: list[int]) -> None:
    """The run that is killed gives what the plain loop gives, and the bits of one that is not."""
    found = trainer.train(data, killed)
    check_equal(found, trainer.plain(data, found), 1e-9)
    if killed:
        check_same_bits(found, trainer.train(data, []), "killed and resumed")


def bounded(examples: int) -> settings:
    """The same examples at every call, and no limit on their time."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@bounded(12)
@given(st.data())
def test_one_worker(trainer: Trainer, data: st.DataObject) -> None:
    run = data.draw(runs(1))
    check(trainer, run, data.draw(kills(run["train"]["steps"])))


@bounded(8)
@given(st.data())
def test_two_workers(trainer: Trainer, data: st.DataObject) -> None:
    run = data.draw(runs(2))
    run["scale"] = {"workers": 2, "parallel": data.draw(st.sampled_from(["ddp", "fsdp"]))}
    check(trainer, run, data.draw(kills(run["train"]["steps"])))


@pytest.mark.slow
@bounded(60)
@given(st.data())
def test_many_runs_of_one_worker(trainer: Trainer, data: st.DataObject) -> None:
    run = data.draw(runs(1))
    check(trainer, run, data.draw(kills(run["train"]["steps"])))


@pytest.mark.slow
@bounded(40)
@given(st.data())
def test_many_runs_of_two_workers(trainer: Trainer, data: st.DataObject) -> None:
    run = data.draw(runs(2))
    run["scale"] = {"workers": 2, "parallel": data.draw(st.sampled_from(["ddp", "fsdp"]))}
    check(trainer, run, data.draw(kills(run["train"]["steps"])))
