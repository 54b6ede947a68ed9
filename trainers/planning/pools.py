"""Pools: the nodes of a cluster by kind, the workers that fit there, and probes of them."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from cluster.cost.catalog import ray_resource
from trainers.planning.step_time import (
    Measurement,
    Placement,
    Prediction,
    StepTimeModel,
    Unknown,
    fit,
)
from trainers.spec import RunSpec


@dataclass(frozen=True)
class Pool:
    """Nodes of one kind: workers computing on their CPUs, or on one kind of accelerator."""

    accelerator: str
    """The value of `scale.accelerator` that selects the pool: cpu, or Ray's name of the type."""
    slots: tuple[int, ...]
    """Workers that fit on each node, the largest node first."""
    cores: float
    """CPUs of the smallest node."""
    host: str = ""
    """The name of one of the nodes."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray's labels that all nodes share; they tell the price."""

    @property
    def total(self) -> int:
        return sum(self.slots)

    @property
    def on_cpus(self) -> bool:
        return self.accelerator == "cpu"

    def nodes_for(self, workers: int) -> int | None:
        """The number of nodes that the workers take; Ray fills nodes. None if they do not fit."""
        capacities = enumerate(itertools.accumulate(self.slots), start=1)
        return next((nodes for nodes, capacity in capacities if capacity >= workers), None)

    def placement(self, workers: int, batch: int) -> Placement | None:
        """The placement of a step over `batch` samples; None if the workers do not fit."""
        nodes = self.nodes_for(workers)
        if nodes is None:
            return None
        return Placement(workers, nodes, batch / workers, self.cores if self.on_cpus else None)

    def worker_counts(self, batch: int) -> list[int]:
        """The numbers of workers that fit and that divide `batch` evenly."""
        return [count for count in range(1, self.total + 1) if batch % count == 0]

    def counts_to_probe(self, batch: int) -> list[int]:
        """Numbers of workers for the model: one, two, a full node, two and four nodes, and all."""
        full = [sum(self.slots[:nodes]) for nodes in (1, 2, 4, len(self.slots))]
        wanted = {1, 2, *full} if self.total > 1 else {1}
        possible = self.worker_counts(batch)
        found = {max((c for c in possible if c <= count), default=1) for count in wanted}
        return sorted(found)


@dataclass(frozen=True)
class ProbeResult:
    """Measurements of a few seconds of the ordinary loop, on one number of workers."""

    place: Placement
    batch: int
    """The global batch."""
    step_s: float
    spread: float
    """Relative; see `Measurement`."""
    start_s: float
    """Seconds from the request for workers to the end of the first step."""
    evaluation_s: float
    """Seconds of one pass over the validation split."""
    test_s: float
    """Seconds of one pass over the test split; 0 if there is none."""
    save_s: float
    """Seconds that one checkpoint blocks training."""
    end_s: float
    """Seconds from the end of the loop until the model is exported and the workers have ended."""
    shares: Mapping[str, float]
    """Shares of a step's time: data, compute, communication, other."""
    flops: float | None
    """Model operations of one sample; None if they cannot be counted."""
    device: str
    """The device's name in the catalogue, otherwise its driver's name for it."""
    mfu: float | None
    """Share of the device's peak; None if the peak is unknown."""
    peak_memory_bytes: float | None = None

    @property
    def samples_per_s(self) -> float:
        return self.batch / self.step_s


@dataclass(frozen=True)
class ProbedPool:
    """A pool and its probes, from which step times of other numbers of workers are predicted."""

    pool: Pool
    probes: tuple[ProbeResult, ...]
    batch: int
    """The global batch of the run in question."""

    @cached_property
    def step_time_model(self) -> StepTimeModel:
        return fit([Measurement(each.place, each.step_s, each.spread) for each in self.probes])

    def predict(self, workers: int) -> Prediction | Unknown:
        """The run's step time on `workers`."""
        place = self.pool.placement(workers, self.batch)
        if place is None:
            return Unknown(f"the cluster has no room for {workers} workers")
        return self.step_time_model.predict(place)

    def nearest(self, workers: int) -> ProbeResult:
        """The probe at the run's own batch whose number of workers is nearest to `workers`."""
        own = [each for each in self.probes if each.batch == self.batch]
        return min(own, key=lambda each: abs(each.place.workers - workers))

    @property
    def single_worker(self) -> ProbeResult:
        return self.nearest(1)


def probed_pool(pool: Pool, probes: Sequence[ProbeResult], batch: int) -> ProbedPool:
    """The pool with its probes, and with the number of cores that the probes saw."""
    cores = [each.place.cores for each in probes if each.place.cores is not None]
    return ProbedPool(replace(pool, cores=min(cores, default=pool.cores)), tuple(probes), batch)


def find_pools(nodes: Iterable[Mapping[str, Any]], spec: RunSpec) -> list[Pool]:
    """The pools that fit the spec's workers, from `ray.nodes()`; accelerators come last.

    A node with accelerators also counts for its CPUs, where a run may be faster.
    `scale.accelerator` narrows the choice down.
    """
    scale, found = spec.scale, defaultdict(list)
    for node in nodes:
        resources = node["Resources"]
        on_cpus = int(resources.get("CPU", 0.0) // scale.cpus_per_worker)
        if not node["Alive"] or not on_cpus:
            continue
        if scale.accelerator in ("auto", "cpu"):
            found["cpu"].append((on_cpus, node))
        for name in resources:
            kind = name.removeprefix("accelerator_type:")
            if kind != name and scale.accelerator in ("auto", "gpu", kind):
                slots = min(on_cpus, int(resources.get(ray_resource(kind), 0)))
                if slots:
                    found[kind].append((slots, node))
    return [_pool(kind, members) for kind, members in found.items()]


def _pool(kind: str, members: list[tuple[int, Mapping[str, Any]]]) -> Pool:
    nodes = [node for _, node in members]
    labels = [node.get("Labels", {}).items() for node in nodes]
    return Pool(
        accelerator=kind,
        slots=tuple(sorted((slots for slots, _ in members), reverse=True)),
        cores=min(node["Resources"]["CPU"] for node in nodes),
        host=nodes[0].get("NodeManagerHostname", ""),
        labels=dict(set(labels[0]).intersection(*labels[1:])),
    )
