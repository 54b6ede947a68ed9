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
from typing import Any, Literal

from filelock import FileLock, Timeout

from cluster.base.config import read_yaml, write_yaml
from cluster.base.errors import SpecError
from cluster.base.files import write_atomic

SPEC, ENVIRONMENT, MODEL, LOG = "spec.yaml", "environment.json", "model", "ray.log"
CHECKPOINTS, TRACKING, LEDGER = "checkpoints", "track", "ledger.jsonl"
TRIALS = "trials"
"""The folder in a sweep's folder that holds its trials' folders."""
STOP, WHOLE = "stop", "all"
"""The folder with the requests of other processes to stop, each an empty file, and the name of the
request to end all. Those to end one trial of a sweep are named by its number."""
RESUMABLE = ("train", "sweep")
Kind = Literal["train", "sweep", "plan", "scaling"]
"""What a folder is of: the verb that made it."""
KIND_BY_FILE: dict[str, Kind] = {
    **dict.fromkeys((TRIALS, "tune", "journal.jsonl"), "sweep"),
    "probes.json": "plan",
    "scaling.png": "scaling",
}


def create_run_folder(
    storage: Path, name: str, data: Mapping[str, Any], kind: Kind = "train"
) -> Path:
    """Create the folder of a new run or sweep, with its spec and its environment.

    Raises SpecError if there is one of that name.
    """
    folder = storage / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.is_dir() or any(folder.iterdir()):
            raise name_taken_error(folder) from None
    except OSError as error:
        raise SpecError(f"storage: cannot create {folder}: {error.strerror}") from None
    write_yaml(data, folder / SPEC)
    write_environment(folder, kind)
    return folder


def read_spec(folder: Path) -> dict[str, Any]:
    """The spec in a run's folder, as plain data, with its `present_paths`."""
    return present_paths(read_yaml(folder / SPEC), folder)


def present_paths(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A spec from a run's folder, if the project was moved or copied since it was written.

    It names the folder of all runs, and a SQLite file beside it, by absolute paths. They become
    those of the present place.
    """
    storage, here = Path(data.get("storage", "")), folder.absolute().parent
    same = storage == here or (storage.exists() and storage.samefile(here))
    if same or not storage.is_absolute():
        return data
    data = {**data, "storage": str(here)}
    tracking = data.get("tracking", {})
    before, uri = f"sqlite:///{storage.parent}/", str(tracking.get("uri"))
    moved = here.parent / uri.removeprefix(before)
    if uri.startswith(before) and moved.exists():
        data["tracking"] = {**tracking, "uri": f"sqlite:///{moved}"}
    return data


def write_environment(folder: Path, kind: Kind) -> None:
    """Write what a folder is of, and the versions of everything."""
    write_atomic(folder / ENVIRONMENT, json.dumps({"kind": kind, **environment()}, indent=1))


def name_taken_error(folder: Path) -> SpecError:
    """The error for the name of a folder that exists, and what to do."""
    taken = f"--name {folder.name}: {folder} already exists"
    if not (folder / SPEC).is_file():
        return SpecError(f"{taken}, and is no run")
    verb = folder_kind(folder)
    ways = [f"heliostat {verb} --resume {folder.name} continues it"] if verb in RESUMABLE else []
    return SpecError(f"{taken}; {', '.join([*ways, f'heliostat remove {folder.name} removes it'])}")


def folder_kind(folder: Path) -> Kind:
    """What a folder is of: by its files, or where it has none yet, as its environment says."""
    for file, kind in KIND_BY_FILE.items():
        if (folder / file).exists():
            return kind
    try:
        written: Kind = json.loads((folder / ENVIRONMENT).read_text()).get("kind", "train")
    except (OSError, ValueError):  # a start that was killed
        return "train"
    return written


def require_kind(folder: Path, kind: Kind) -> None:
    """Raise SpecError if a folder that is to be resumed by one verb is of another."""
    found = folder_kind(folder)
    if found == kind:
        return
    what = {"train": "a single run", "sweep": "a sweep", "plan": "a plan"}
    advice = f"; use heliostat {found} --resume" if found in RESUMABLE else ""
    raise SpecError(f"--resume {folder.name}: is {what.get(found, 'a scaling study')}{advice}")


def unique_name(stem: str) -> str:
    """A name from a stem, the time and a random suffix: unique even within one second."""
    return f"{stem}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def find_run_folder(name: str, storage: Path) -> Path:
    """The folder of an earlier run or sweep, by its name under `storage` or by its path."""
    for folder in (storage / name, Path(name)):
        if (folder / SPEC).is_file():
            return folder.absolute()
    raise SpecError(f"--resume {name}: no such run in {display_path(storage)}")


def request_stop(folder: Path, what: str = WHOLE) -> None:
    """Ask the process that works on the run or sweep in `folder` to end it, or a trial of it."""
    (folder / STOP).mkdir(exist_ok=True)
    (folder / STOP / what).touch()


def stop_requests(folder: Path) -> set[str]:
    """What is to end: WHOLE, and numbers of trials."""
    try:
        return {path.name for path in (folder / STOP).iterdir()}
    except FileNotFoundError:
        return set()


def withdraw_stop(folder: Path) -> None:
    """Take back the request to end all."""
    (folder / STOP / WHOLE).unlink(missing_ok=True)


def run_files(storage: str) -> tuple[str, ...]:
    """Patterns for the files that runs write into the working folder: they are no code."""
    here = Path.cwd()
    named = here / storage
    places = (Path(os.path.normpath(named)), named.resolve())  # it may be a link
    inside = {each.relative_to(here) for each in places if each.is_relative_to(here)} - {Path()}
    return tuple(f"/{each.as_posix()}" for each in sorted(inside))


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


def display_place(place: str | None) -> str:
    """A path, as `display_path` has it, or a URI; none without one."""
    if place is None:
        return "none"
    return place if "://" in place else display_path(Path(place))


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
