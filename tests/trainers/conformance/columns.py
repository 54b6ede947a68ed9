"""The columns of the matrix: each trains a small model in one way, beside the plain loop."""

import copy
import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.base.errors import HeliostatError
from tests.trainers.conformance import plain
from tests.trainers.conformance.runs import Answer, Job, run_job
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.export import export_model, load_model
from trainers.checkpoints.state import load_model_weights
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_split
from trainers.devices import Cpu
from trainers.engine.evaluate import evaluate
from trainers.engine.metrics import MetricsError
from trainers.modeling.build import build_network
from trainers.modeling.forward import Forward
from trainers.spec import RunSpec, resolve
from trainers.worker import Worker
from tuning.programs.program import Program
from tuning.programs.program_signature import Variant
from tuning.programs.vmap_rewrites import NotFusibleError

from wild_models.base import Wild  # isort: skip

STEPS, BATCH, CLIP = 8, 8, 1.0
SAVES, KILLED_AFTER = {"every_steps": 3}, 7


class Refused(Exception):  # noqa: N818
    """Heliostat does not do it, and said so in a sentence before the first step."""


class Wrong(Exception):  # noqa: N818
    """Other numbers than the plain loop's, or an error that is no refusal."""


@dataclass
class Found:
    """What a run of Heliostat reported and left."""

    losses: dict[int, float]
    evaluations: dict[int, dict[str, float]]
    state: dict[str, Any]
    """The final model's state_dict."""


class Row:
    """A small model, its data set, and its runs by column."""

    def __init__(self, kind: type[Wild], root: Path) -> None:
        self.kind, self.root = kind, root / kind.__name__
        self.plain = functools.cache(self._plain)
        data_of = kind if kind.dataset is not Wild.dataset else Wild
        self.dataset = prepare_dataset(resolve(self.data(data_of), RunSpec)[1], root)

    def data(self, kind: type[Wild] | None = None, **sections: dict[str, Any]) -> dict[str, Any]:
        """The plain data of a spec; `sections` are added to its own."""
        kind = kind or self.kind
        train = {"steps": STEPS, "global_batch": BATCH, "clip_norm": CLIP}
        data: dict[str, Any] = {
            "workload": f"{kind.__module__}:{kind.__qualname__}",
            "optimizer": {**kind.optimizer, "schedule": {"name": "cosine", "warmup": 0.25}},
            "train": {**train, "precision": kind.precision},
            "tracking": {"every_steps": 1},
        }
        for name, fields in sections.items():
            data[name] = {**data.get(name, {}), **fields}
        return data

    @functools.cached_property
    def _alone(self) -> "Found | Refused | Wrong":
        job = self.job("alone", checkpoint=SAVES)
        try:
            return found_by(job, run_job(job, Worker()), self.kind.told_after)
        except (Refused, Wrong) as error:
            return error

    def alone(self) -> "Found":
        """What one worker finds; trained once."""
        if isinstance(self._alone, Exception):
            raise self._alone
        return self._alone

    def job(self, column: str, killed_after: int | None = None, **sections: dict[str, Any]) -> Job:
        folder = self.root / column.replace(" ", "-")
        return Job(self.data(**sections), self.dataset, folder, killed_after)

    def splits(self) -> dict[str, dict[str, Tensor]]:
        """The splits as tensors of their own memory."""
        splits = {split: open_split(self.dataset, split) for split in ("train", "val")}
        return {
            split: {name: values.clone() for name, values in columns.items()}
            for split, columns in splits.items()
        }

    @functools.cached_property
    def evaluated(self) -> set[int]:
        """The steps after which there is an evaluation: after each epoch, and at the end."""
        samples = len(self.splits()["train"]["y"])
        ends = {math.ceil(epoch * samples / BATCH) for epoch in range(1, STEPS * BATCH)}
        return {step for step in ends if step < STEPS} | {STEPS}

    def _plain(self, shares: int = 1, parts: int = 1) -> plain.Plain:
        _, workload = resolve(self.data(), RunSpec)
        splits = self.splits()
        return plain.train(
            workload,
            splits["train"],
            splits["val"],
            steps=STEPS,
            batch=BATCH,
            evaluated=self.evaluated,
            rule=self.kind.optimizer,
            clip=CLIP,
            shares=shares,
            parts=parts,
        )


def newest_checkpoint(folder: Path) -> Path:
    newest = Checkpoints(folder / "checkpoints").latest()
    assert newest is not None
    return newest


def found_by(job: Job, answer: Answer, told_after: int = 0) -> Found:
    """What a job left; raises Refused or Wrong if it has failed, see `Wild.told_after`."""
    if answer.error:
        refused = answer.refused and answer.steps <= told_after
        raise (Refused if refused else Wrong)(answer.error)
    spec, workload = resolve(job.data, RunSpec)
    network = build_network(spec.train, workload)
    load_model_weights(newest_checkpoint(job.folder), network)
    return Found(answer.losses, answer.evaluations, network.state_dict())


def check_equal(found: Found, right: plain.Plain, tolerance: float) -> None:
    """Raise Wrong, which names the first difference to the plain loop."""

    def check(name: str, value: Any, wanted: Any) -> None:
        if not isinstance(wanted, Tensor):
            if not isinstance(wanted, float):
                if value != wanted:
                    raise Wrong(f"{name} is {value}, in the plain loop {wanted}")
                return
            double = torch.float64
            value, wanted = torch.tensor(value, dtype=double), torch.tensor(wanted, dtype=double)
        kind = torch.complex128 if wanted.is_complex() else torch.float64
        if value.shape != wanted.shape or value.is_complex() != wanted.is_complex():
            raise Wrong(f"{name} is {value.dtype} {[*value.shape]}, not {[*wanted.shape]}")
        value, wanted = value.detach().to(kind).flatten(), wanted.detach().to(kind).flatten()
        close = torch.isclose(value, wanted, rtol=tolerance, atol=tolerance)
        if not close.all():
            place = int(close.int().argmin())
            raise Wrong(f"{name} is {value[place]:.12g}, in the plain loop {wanted[place]:.12g}")

    for step, loss in enumerate(right.losses, start=1):
        check(f"train/loss at step {step}", found.losses.get(step, math.nan), loss)
    if found.evaluations.keys() != right.evaluations.keys():
        raise Wrong(f"evaluated after {sorted(found.evaluations)}: {sorted(right.evaluations)}")
    for step, wanted in right.evaluations.items():
        if found.evaluations[step].keys() != wanted.keys():
            raise Wrong(f"metrics are {sorted(found.evaluations[step])}, not {sorted(wanted)}")
        for name, value in wanted.items():
            check(f"val/{name} at step {step}", found.evaluations[step][name], value)
    state = right.network.state_dict()
    if found.state.keys() != state.keys():
        raise Wrong(f"names of weights: {sorted(found.state.keys() ^ state.keys())}")
    for name, value in state.items():
        check(name, found.state[name], value)


def check_same_bits(found: Found, other: Found, what: str) -> None:
    """Raise Wrong unless two runs reported and left the same."""
    if (found.losses, found.evaluations) != (other.losses, other.evaluations):
        raise Wrong(f"{what}: other losses or metrics")
    for name, value in other.state.items():
        same = found.state[name]
        if not (same.equal(value) if isinstance(value, Tensor) else same == value):
            raise Wrong(f"{what}: {name} has other bits")


def check_losses(row: Row, found: Found, shares: int = 1, parts: int = 1) -> None:
    check_equal(found, row.plain(shares, parts), row.kind.tolerance)


# One worker: columns that run in this process.


def trained(row: Row, column: str, **sections: dict[str, Any]) -> Found:
    job = row.job(column, **sections)
    return found_by(job, run_job(job, Worker()), row.kind.told_after)


def alone(row: Row) -> Found:
    found = row.alone()
    check_losses(row, found)
    return found


def micro_batches(row: Row) -> None:
    found = trained(row, "micro-batches", train={"micro_batch": BATCH // 2})
    check_losses(row, found, parts=2)


def recomputed(row: Row) -> None:
    check_losses(row, trained(row, "recomputed", train={"activation_checkpointing": True}))


def killed_and_resumed(row: Row) -> None:
    """Killed between two saves, then resumed: to the bit the run that was not killed."""
    before = run_job(row.job("killed", KILLED_AFTER, checkpoint=SAVES), Worker())
    job = row.job("killed", checkpoint=SAVES)
    if before.error:
        found_by(job, before, row.kind.told_after)
    found = found_by(job, run_job(job, Worker()))
    found.losses = before.losses | found.losses
    found.evaluations = before.evaluations | found.evaluations
    check_losses(row, found)
    check_same_bits(found, row.alone(), "killed and resumed")


def exported(row: Row) -> None:
    """Loaded twice while the global generators are elsewhere, then evaluated by the plain loop."""
    row.alone()
    spec, workload = resolve(row.data(), RunSpec)
    folder, right = row.root / "alone", row.plain()
    try:
        export_model(folder / "model", spec, workload, newest_checkpoint(folder))
    except HeliostatError as error:
        raise Refused(str(error)) from error
    loaded = []
    for seed in (11, 12):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        network = load_model(folder / "model")
        if any(module.training for module in network.modules()):
            raise Wrong("loaded in training mode")
        state = {name: copy.deepcopy(value) for name, value in network.state_dict().items()}
        last = plain.evaluate(workload, [network.double()], row.splits()["val"])
        evaluations = {**right.evaluations, STEPS: last}
        loaded.append(Found(dict(enumerate(right.losses, start=1)), evaluations, state))
    check_losses(row, loaded[0])
    check_same_bits(*loaded, "loaded twice")


def fused(row: Row) -> None:
    """In the second of two slots, beside a trial of another seed."""
    (spec, workload), (other, neighbour) = (
        resolve(row.data(train={"seed": seed}), RunSpec) for seed in (0, 1)
    )
    variant, beside = Variant(spec, workload, STEPS), Variant(other, neighbour, STEPS)
    try:
        program = Program(variant, 2, open_split(row.dataset, "train"), Cpu(), {})
        for slot, each in enumerate((beside, variant)):
            network = build_network(each.spec.train, each.workload)
            if not program.fits(each, network):
                raise Refused("trials of other seeds do not fit into the program")
            program.load_trial(slot, each, network)
        losses: dict[int, float] = {}
        evaluations = {}
        val = open_split(row.dataset, "val")
        for step in range(STEPS):
            losses[step + 1] = program.run([0, 1], 1)[0][1]
            if step + 1 in row.evaluated:
                network = program.network_with(program.state_of(1).copy())
                forward = Forward(workload, network)
                evaluations[step + 1] = evaluate(spec, workload, forward, val, Worker())
    except MetricsError as error:
        raise Refused(str(error.error)) from error
    except (NotFusibleError, HeliostatError) as error:
        raise Refused(str(error)) from error
    state = program.network_with(program.state_of(1)).state_dict()
    check_losses(row, Found(losses, evaluations, state))


ALONE: dict[str, Callable[[Row], object]] = {
    "1 worker": alone,
    "micro-batches": micro_batches,
    "activation checkpointing": recomputed,
    "kill and resume": killed_and_resumed,
    "export and load": exported,
    "fused": fused,
}
PAIRED: dict[str, dict[str, Any]] = {
    "2 workers, ddp": {"scale": {"workers": 2, "parallel": "ddp"}},
    "2 workers, fsdp": {"scale": {"workers": 2, "parallel": "fsdp"}},
}


def check_paired(row: Row, job: Job, answer: Answer) -> None:
    """Check the answer of two workers to a job of a column in `PAIRED`."""
    check_losses(row, found_by(job, answer, row.kind.told_after), shares=2)
