"""What `heliostat submit` sends: a command whose spec and files were checked on this machine."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.base.config import apply_overrides, flatten
from cluster.base.errors import SpecError
from cluster.jobs.job import Submission
from cluster.jobs.working_dir_package import list_packaged_files
from trainers.run_folder import unique_name
from trainers.spec import RunSpec, find_spec, resolve

ReadSpec = Callable[[str, list[str]], tuple[str, RunSpec]]
"""From the name of a spec, and overrides: the spec's short name and the checked spec."""


def read_run_spec(name: str, overrides: list[str]) -> tuple[str, RunSpec]:
    """Read and check the spec `name` of a run; see `ReadSpec`."""
    stem, data = find_spec(name)
    return stem, resolve(apply_overrides(data, overrides), RunSpec)[0]


def plan_submission(
    args: argparse.Namespace, command: tuple[str, ...], read_spec: ReadSpec = read_run_spec
) -> Submission:
    """The job for a verb with a spec, with paths that hold on the cluster.

    `command` is the verb and its arguments. Raises SpecError as the verb itself would, and for
    files that the cluster would not have.
    """
    if "resume" in args and args.resume:
        name = Path(args.resume).name
        if not Path(args.resume).is_absolute():  # an absolute path is one on the cluster
            command = tuple(name if word == args.resume else word for word in command)
        return Submission(name, command)
    if not args.spec:
        raise SpecError(f"{command[0]}: needs a spec, or --resume NAME")
    folder = Path.cwd()
    stem, spec = read_spec(args.spec, args.set)
    storage = Path(spec.storage)
    exclude = () if storage.is_absolute() else (f"/{storage.as_posix().strip('/')}",)
    needed: tuple[Path, ...] = ()
    if Path(args.spec).is_file():
        file = Path(args.spec).resolve()
        if not file.is_relative_to(folder.resolve()):
            raise SpecError(f"{args.spec}: is not in the working folder, and only that is sent")
        needed = (file.relative_to(folder.resolve()),)
        command = tuple(str(needed[0]) if word == args.spec else word for word in command)
    written = apply_overrides(find_spec(args.spec)[1], args.set)  # its paths are still relative
    _check_sources(flatten(written.get("data") or {}, "data."), folder, exclude)
    named = "name" in args  # other verbs have no --name, but their jobs need a name, too
    kind = "" if command[0] == "train" else f"-{command[0]}"
    name = (args.name if named else None) or unique_name(stem + kind)
    if named and not args.name:
        command = (*command, "--name", name)
    return Submission(name, command, needed, exclude)


def _check_sources(data: Mapping[str, Any], folder: Path, exclude: tuple[str, ...]) -> None:
    """Raise SpecError for data at a relative path that exists here and is not sent along.

    An absolute path may be storage that this machine shares with the cluster; the run itself
    checks it there.
    """
    sent: list[Path] | None = None
    for field, value in data.items():
        if not isinstance(value, str) or Path(value).is_absolute() or "://" in value:
            continue
        if not value or not (folder / value).exists():
            continue
        sent = list_packaged_files(folder, exclude) if sent is None else sent
        source = Path(value)
        if not any(path == source or source in path.parents for path in sent):
            raise SpecError(
                f"{field}: {value} is on this machine and is not sent along (git ignores it, or "
                "it is outside of the working folder); put it on storage that the cluster sees, "
                "and give its path or URI there"
            )
