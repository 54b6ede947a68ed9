"""Training runs: what a run is, the loop, its checkpoints and its tracking.

`Workload`, `Spec` and `table` are what a user's own workload needs; `load_model` gives back the
trained network of a run.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.config import Spec
    from cluster.errors import DataError
    from trainers.data import table
    from trainers.export import load_model
    from trainers.random import SampleRandom
    from trainers.workloads.base import Batch, PartedWorkload, Workload

__all__ = [
    "Batch",
    "DataError",
    "PartedWorkload",
    "SampleRandom",
    "Spec",
    "Workload",
    "load_model",
    "table",
]

_HOMES = {
    "Spec": "cluster.config",
    "table": "trainers.data",
    "load_model": "trainers.export",
    "SampleRandom": "trainers.random",
    "Batch": "trainers.workloads.base",
    "DataError": "cluster.errors",
    "PartedWorkload": "trainers.workloads.base",
    "Workload": "trainers.workloads.base",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'trainers' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
