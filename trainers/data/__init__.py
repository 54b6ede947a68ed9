"""From a workload to a stream of batches whose order is a function of (seed, position).

May import the modules of `trainers` itself. Begin with `dataset.py` (builds the files), then
`splits.py` (reads them), `sampling.py` (orders the samples) and `prefetch.py` (feeds the device).
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """`trainers.data.table`, as older workloads of users import it; now `trainers.table`."""
    if name == "table":
        from trainers.data.tables import table

        return table
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
