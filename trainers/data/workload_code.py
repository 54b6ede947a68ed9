"""The code that a workload consists of: its own modules, and the packages that these import."""

import contextlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from trainers.workload import PartitionedWorkload, Workload, imported_names, parse_source

HELIOSTAT = ("cluster", "heliostat", "trainers", "tuning")
"""Packages that are no part of a user's workload."""
SHIPPED = "trainers.workloads."
INSTALLED = {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class WorkloadCode:
    """What a workload's code consists of."""

    files: tuple[Path, ...]
    """The modules that define the workload; of a shipped one, all modules of its package. Of a
    user's own also the modules that these import, if they are not installed as a package."""
    versions: dict[str, str]
    """The packages that a user's own modules import anywhere, and their installed versions. The
    shipped workloads name theirs in `made_with`."""


def workload_code(workload: type[Workload]) -> WorkloadCode:
    """Find the code of a workload. It is read, not imported."""
    files: dict[Path, None] = {}
    waiting: list[tuple[Path, str]] = []
    for parent in workload.__mro__:
        if not issubclass(parent, Workload) or parent in (Workload, PartitionedWorkload):
            continue
        source = inspect.getsourcefile(parent)
        if source is None:
            continue
        if parent.__module__.startswith(SHIPPED):
            files |= dict.fromkeys(sorted(Path(source).parent.glob("*.py")))
        else:
            waiting.append((Path(source), parent.__module__))
    packages: dict[str, str] = {}
    while waiting:
        path, module = waiting.pop(0)
        if path in files:
            continue
        files[path] = None
        for name in _imported_modules(path, module):
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names or top in HELIOSTAT:
                continue
            installed = _is_installed(_find_module(top))
            if top not in packages:
                packages[top] = _version(top, installed)
            if not installed and (own := _file_of(_find_module(name))) is not None:
                waiting.append((own, name))
    return WorkloadCode(tuple(files), {name: packages[name] for name in packages if packages[name]})


def _imported_modules(path: Path, module: str) -> Iterator[str]:
    """What the module in a file imports, see `imported_names`; nothing if it is no Python code."""
    if path.suffix != ".py":
        return
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    yield from imported_names(parse_source(path), package)


def _find_module(name: str) -> ModuleSpec | None:
    """Where a module is, found without importing it."""
    top, *rest = name.split(".")
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    for depth in range(len(rest)):
        if found is None or found.submodule_search_locations is None:
            return None
        below = ".".join([top, *rest[: depth + 1]])
        found = PathFinder.find_spec(below, list(found.submodule_search_locations))
    return found


def _file_of(found: ModuleSpec | None) -> Path | None:
    return Path(found.origin) if found and found.has_location and found.origin else None


def _is_installed(found: ModuleSpec | None) -> bool:
    """Whether a module comes with an installed package, or cannot be found at all."""
    if found is None:
        return True
    places = [found.origin] if found.has_location else [*(found.submodule_search_locations or [])]
    return not places or any(INSTALLED & set(Path(place or "").parts) for place in places)


def _version(package: str, installed: bool) -> str:
    """The public version of the distribution that a package is from; empty if it has none."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package).partition("+")[0]
    if not installed:
        return ""
    version = getattr(sys.modules.get(package), "__version__", None)
    if version is None:  # its distribution has another name
        named = f"\n{package}/__init__.py,"
        found = (
            each.version
            for each in importlib.metadata.distributions()
            if named in "\n" + (each.read_text("RECORD") or "")
        )
        version = next(found, "")
    return str(version).partition("+")[0]
