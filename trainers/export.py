"""The loader of models that an earlier release registered in MLflow: it was in this module.

New models name `trainers.checkpoints.export`.
"""

from typing import Any


def _load_pyfunc(path: str) -> Any:
    from trainers.checkpoints.export import _load_pyfunc as load

    return load(path)
