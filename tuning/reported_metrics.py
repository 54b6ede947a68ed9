"""Whether a workload reports the metrics by which a sweep compares its trials."""

from pathlib import Path

import torch

from cluster.base.config import did_you_mean
from cluster.base.errors import SpecError
from trainers.counter_rng import random_state_kept
from trainers.data.remote import local_dataset
from trainers.data.splits import open_split
from trainers.engine.evaluate import evaluate
from trainers.modeling.build import build_network
from trainers.modeling.forward import Forward
from trainers.spec import RunSpec
from trainers.worker import Worker
from trainers.workload import Workload
from tuning.trials.constraints import parse_constraint
from tuning.trials.space import SweepSpec

MAX_WEIGHTS = 20_000_000
"""A larger model is not built to look at its metrics: the first evaluation of a trial names a
metric that is missing, too."""
SAMPLES = 2
ALWAYS = "val/loss"
"""A metric that every workload has, unless its `summary` leaves it out."""


def check_metrics(spec: RunSpec, workload: Workload, sweep: SweepSpec, dataset: Path) -> None:
    """Raise SpecError if a metric of the sweep is none that the workload reports.

    Evaluates a new model on two samples, if a metric other than the loss is asked for. Where that
    is not possible nothing is checked.
    """
    asked = {sweep.metric: "sweep.metric"}
    asked |= {objective.partition(" ")[0]: "sweep.objective" for objective in sweep.objective}
    for text in sweep.constraints:
        asked.setdefault(parse_constraint(text).metric, "sweep.constraints")
    asked = {name: place for name, place in asked.items() if name.startswith("val/")}
    if asked.keys() <= {ALWAYS}:
        return
    known = reported_metrics(spec, workload, dataset)
    for name, place in asked.items():
        if known is not None and name not in known:
            raise SpecError(f"{place}: the workload has no {name}{did_you_mean(name, known)}")


def reported_metrics(spec: RunSpec, workload: Workload, dataset: Path) -> set[str] | None:
    """The metrics of an evaluation, as `val/NAME`; None where they cannot be known now."""
    try:
        with torch.device("meta"), random_state_kept():
            weights = sum(weight.numel() for weight in workload.build().parameters())
        if weights > MAX_WEIGHTS:
            return None
        split = open_split(local_dataset(dataset, spec), "val")
        samples = {name: values[:SAMPLES] for name, values in split.items()}
        with random_state_kept():
            forward = Forward(workload, build_network(spec.train, workload))
            found = evaluate(spec, workload, forward, samples, Worker())
    except Exception:  # of the user's code, which the first trial reports
        return None
    return {f"val/{name}" for name in found}
