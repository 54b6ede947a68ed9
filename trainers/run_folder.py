"""The folder of a run or sweep: its files, its lock, and how to find it by name."""

import contextlib
import functools
import json
import os
import platform
import re
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cluster.base.config import write_yaml
from cluster.base.errors import SpecError
from cluster.base.files import write_atomic

SPEC, ENVIRONMENT, MODEL, LOG = "spec.yaml", "environment.json", "model", "ray.log"
CHECKPOINTS, TRACKING, LEDGER = "checkpoints", "track", "ledger.jsonl"
TRIALS = "trials"
"""The folder in a sweep's folder that holds its trials' folders."""


def create_run_folder(storage: Path, name: str, data: Mapping[str, Any]) -> Path:
    """Create the folder of a new run or sweep, with its spec and its environment."""
    folder = storage / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise SpecError(f"--name {name}: {folder} already exists") from None
    except OSError as error:
        raise SpecError(f"storage: cannot create {folder}: {error.strerror}") from None
    write_yaml(data, folder / SPEC)
    write_atomic(folder / ENVIRONMENT, json.dumps(environment(), indent=1))
    return folder


def unique_name(stem: str) -> str:
    """A name from a stem, the time and a random suffix: unique even within one second."""
    return f"{stem}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def find_run_folder(name: str, storage: Path) -> Path:
    """The folder of an earlier run or sweep, by its name under `storage` or by its path."""
    for folder in (storage / name, Path(name)):
        if (folder / SPEC).is_file():
            return folder.absolute()
    raise SpecError(f"--resume {name}: no such run in {display_path(storage)}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder, so that only one process works on the run."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise SpecError(f"{folder.name}: another process is working on this run") from None


def display_path(path: Path) -> str:
    """A path relative to the working folder, if it is inside."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def environment() -> dict[str, Any]:
    """The versions of Python, the system and every package, to be kept with a run."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": dict(_name_and_version(distribution) for distribution in distributions()),
    }


def _name_and_version(distribution: Distribution) -> tuple[str, str]:
    """From the text of the metadata; importlib parses all of it, at ten times the time."""
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    fields = dict(re.findall(r"^(Name|Version): *(\S+)", text.partition("\n\n")[0], re.MULTILINE))
    return fields.get("Name", "unknown"), fields.get("Version", "unknown")


@functools.cache
def git_tags(folder: Path) -> dict[str, str]:
    """The commit of a git checkout as MLflow's own tag; empty outside of one."""
    command = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run(
            [*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*command, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"mlflow.source.git.commit": commit, "heliostat.git.changed": str(bool(changed)).lower()}
