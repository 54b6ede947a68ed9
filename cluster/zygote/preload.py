"""What a zygote has imported before it forks, and whether it may fork."""

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterable
from importlib.machinery import all_suffixes
from pathlib import Path

from cluster.connection.ray_internals import undrawn_identifiers

RAY_MODULES = (
    "ray._private.workers.default_worker",
    "ray._private.log_monitor",
    "ray.autoscaler._private.monitor",
    "ray.dashboard.dashboard",
    "ray.dashboard.agent",
    "ray._private.runtime_env.agent.main",
    "ray._private.runtime_env.agent.runtime_env_agent",
)
"""What Ray's own Python services import."""
COMMAND_MODULES = (
    "numpy",
    "torch",
    # Our own, by name, since this package is below them.
    "tuning.cli.parser",
    "cluster.cli.jobs",
    "cluster.cli.files",
    "trainers.cli.progress",
    "trainers.runs.execution",
    "trainers.runs.session",
    "rich.progress",
    "ray._private.arrow_serialization",
    "ray._private.workers.default_worker",
    "pydantic.v1",
)
"""What a run's driver and worker import: nothing is forked before."""
LATER_MODULES = (
    "mlflow",
    "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_store",
    "sqlalchemy.dialects.sqlite",
    "trainers.workloads.vision.workload",
    "ray.train.torch",
    "ray.train.v2._internal.execution.controller.controller",
    "torch._dynamo",
    "torch._inductor.standalone_compile",
    "ray.tune",
)
"""What trackers, runs of several workers, compilers and sweeps import: imported between commands,
since nothing is forked meanwhile."""
HARMLESS_THREADS = ("jemalloc_bg_thd",)
"""Threads of other libraries that hold no lock over a fork: pyarrow's allocator handles it."""
ACCELERATORS = ("/dev/nvidia", "/dev/kfd", "/dev/dri")
"""Beginnings of the names of files that are open once CUDA or ROCm has been initialised."""

logger = logging.getLogger(__name__)


def preload(modules: Iterable[str]) -> None:
    """Import modules; those that are not installed are left out."""
    missing = [name for name in modules if name not in sys.modules]
    if not missing:
        return
    with undrawn_identifiers():
        for name in missing:
            try:
                importlib.import_module(name)
            except ImportError as error:
                logger.warning("%s: %s", name, error)
    _end_threads_of_blas()


def _end_threads_of_blas() -> None:
    """Fork once for nothing: OpenBLAS ends its threads before a fork, which its import starts.

    It starts them again when it computes, which a zygote does not.
    """
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def name_process(name: str) -> None:
    """Name this process as `ps` and `top` show it, by its first 15 characters."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def fork_hazard() -> str | None:
    """Why this process must not fork: it has threads, or has used an accelerator."""
    own = str(os.getpid())
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != own]
    names = [(task / "comm").read_text().strip() for task in tasks]
    others = [name for name in names if name not in HARMLESS_THREADS]
    if others:
        return f"it has threads: {', '.join(sorted(others))}"
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(file.readlink())
            if target.startswith(ACCELERATORS):
                return f"it has used an accelerator: {target}"
    return None


def top_level_modules(folder: str) -> set[str]:
    """The names of modules and packages that Python would import from a folder.

    Not those of folders without `__init__.py`: any real package has precedence over them.
    """
    found = set()
    with contextlib.suppress(OSError):
        for entry in Path(folder).iterdir():
            name, dot, _ = entry.name.partition(".")
            is_module = dot and entry.name.endswith(tuple(all_suffixes()))
            if is_module or any((entry / f"__init__{end}").exists() for end in all_suffixes()):
                found.add(name)
    return found
