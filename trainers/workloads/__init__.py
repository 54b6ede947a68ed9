"""The shipped workloads, a package each; a spec names one by its package, as in `vision`.

May import the modules of `trainers` itself and `trainers.data`. Nobody imports a workload:
`trainers.workload.load_workload` does, by name. Begin with a package's `workload.py`.
"""

import importlib
from collections.abc import Callable
from typing import Any


def names_of_workload(package: str) -> Callable[[str], Any]:
    """A package's `__getattr__` that finds names in its `workload.py`, imported on first use.

    Before the workloads were packages, `trainers.workloads.vision:Vision` was where a class was:
    specs, exported models and workloads of users name it so.
    """

    def find(name: str) -> Any:
        if not name.startswith("_"):
            module = importlib.import_module(f"{package}.workload")
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
