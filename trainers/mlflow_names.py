"""The names that MLflow accepts for metrics, parameters and tags."""

import posixpath
import re

MAX_NAME_LENGTH = 200
"""Characters; MLflow's own limit is 250."""


def mlflow_name(name: str) -> str:
    """The nearest name that MLflow accepts; several names may have the same one."""
    allowed = re.sub(r"[^/\w.\- :]", "_", name)
    return posixpath.normpath(allowed).lstrip("./")[:MAX_NAME_LENGTH] or "_"
