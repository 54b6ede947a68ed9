"""One training run. May import `cluster`; never `tuning`.

The modules here define what a run is: its spec, workload, device, worker, run folder, stores and
random numbers. The rooms below them use these; begin with `spec.py` and `workload.py`.

A user's own workload imports `Workload`, `Spec` and `table` from here; `load_model` returns the
trained network of a run.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.base.config import Spec
    from cluster.base.errors import DataError
    from trainers.checkpoints.export import load_model
    from trainers.counter_rng import SampleRandom
    from trainers.data.tables import table
    from trainers.workload import Batch, PartitionedWorkload, Workload

__all__ = [
    "Batch",
    "DataError",
    "PartitionedWorkload",
    "SampleRandom",
    "Spec",
    "Workload",
    "load_model",
    "table",
]

_HOMES = {
    "Spec": "cluster.base.config",
    "table": "trainers.data.tables",
    "load_model": "trainers.checkpoints.export",
    "SampleRandom": "trainers.counter_rng",
    "Batch": "trainers.workload",
    "DataError": "cluster.base.errors",
    "PartitionedWorkload": "trainers.workload",
    "Workload": "trainers.workload",
}

_OLD_NAMES = {"PartedWorkload": "PartitionedWorkload"}
"""Names that were renamed, and that workloads of users and exported models still import."""


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line starts without torch."""
    name = _OLD_NAMES.get(name, name)
    if name not in _HOMES:
        raise AttributeError(f"module 'trainers' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
