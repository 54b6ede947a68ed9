"""Training runs: what a run is, the loop, its checkpoints and its tracking.

`Workload`, `Spec` and `table` are what a user's own workload needs; `load_model` gives back the
trained network of a run.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.base.config import Spec
    from cluster.base.errors import DataError
    from trainers.checkpoints.export import load_model
    from trainers.counter_rng import SampleRandom
    from trainers.data.dataset import table
    from trainers.workload import Batch, PartedWorkload, Workload

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
    "Spec": "cluster.base.config",
    "table": "trainers.data.dataset.dataset",
    "load_model": "trainers.checkpoints.export",
    "SampleRandom": "trainers.counter_rng",
    "Batch": "trainers.workload",
    "DataError": "cluster.base.errors",
    "PartedWorkload": "trainers.workload",
    "Workload": "trainers.workload",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'trainers' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
