"""Heliostat: training runs on Ray Train and sweeps on Ray Tune, with all results in MLflow.

This package holds the names that users import, which are those of `trainers`, and `main`, the
entry of the command line. It may import every other package; nothing imports it.
Begin reading with `main`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line starts without torch."""
    import trainers

    if name not in trainers.__all__:
        raise AttributeError(f"module 'heliostat' has no attribute {name!r}")
    return getattr(trainers, name)
