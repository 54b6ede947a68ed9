"""Heliostat: training runs on Ray Train and sweeps on Ray Tune, with all results in MLflow.

This package holds the names that users import, and `main`, the entry of the command line.
It may import every other package; nothing imports it. Begin reading with `main`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers import (
        Batch,
        DataError,
        PartitionedWorkload,
        SampleRandom,
        Spec,
        Workload,
        load_model,
        table,
    )

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


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line starts without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'heliostat' has no attribute {name!r}")
    import trainers

    return getattr(trainers, name)
