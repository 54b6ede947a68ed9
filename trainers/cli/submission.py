"""What `heliostat submit` sends: a command whose spec and files were checked on this machine."""

import argparse
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.base.config import apply_overrides, flatten
from cluster.base.errors import SpecError
from cluster.jobs.job import Submission
from cluster.jobs.working_dir_package import is_left_out, list_packaged_files
from trainers.checkpoints.user_code import user_modules
from trainers.run_folder import display_path, run_files, unique_name
from trainers.spec import RunSpec, find_spec, resolve
from trainers.workload import load_workload

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
    left_out = tuple(getattr(args, "exclude", ()))
    if "resume" in args and args.resume:
        name = Path(args.resume).name
        if not Path(args.resume).is_absolute():  # an absolute path is one on the cluster
            command = tuple(name if word == args.resume else word for word in command)
        return Submission(name, command, exclude_patterns=left_out)
    if not args.spec:
        raise SpecError(f"{command[0]}: needs a spec, or --resume NAME")
    folder = Path.cwd()
    stem, spec = read_spec(args.spec, args.set)
    exclude = (*run_files(spec.storage), *left_out)
    needed: tuple[Path, ...] = ()
    if Path(args.spec).is_file():
        places = (Path(os.path.normpath(folder / args.spec)), Path(args.spec).resolve())  # a link
        inside = [each.relative_to(folder) for each in places if each.is_relative_to(folder)]
        if not inside:
            raise SpecError(f"{args.spec}: is not in the working folder, and only that is sent")
        needed = (inside[0],)
        command = tuple(str(needed[0]) if word == args.spec else word for word in command)
    written = apply_overrides(find_spec(args.spec)[1], args.set)  # its paths are still relative
    sent = {*list_packaged_files(folder, exclude), *needed}
    _check_code(spec.workload, folder, sent)
    _check_sources(written, folder, sent, exclude)
    named = "name" in args  # other verbs have no --name, but their jobs need a name, too
    kind = "" if command[0] == "train" else f"-{command[0]}"
    name = (args.name if named else None) or unique_name(stem + kind)
    if named and not args.name:
        command = (*command, "--name", name)
    return Submission(name, command, needed, exclude)


def _check_code(workload: str, folder: Path, sent: Collection[Path]) -> None:
    """Raise SpecError for a module of the workload that the cluster would not have.

    Modules that are installed here, from a folder of their own, may be installed there, too.
    """
    if ":" not in workload:
        return
    there = {(folder / path).resolve() for path in sent}
    search_path = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    own = [folder.resolve(), *(Path(each).resolve() for each in search_path)]
    for name, file in user_modules(load_workload(workload)).items():
        if file not in there and any(file.is_relative_to(each) for each in own):
            raise SpecError(
                f"workload: the module {name} is in {display_path(file)}, which is not sent (git "
                "ignores it, --exclude names it, or it is outside of the working folder)"
            )


def _check_sources(
    written: Mapping[str, Any], folder: Path, sent: Collection[Path], exclude: Collection[str]
) -> None:
    """Raise SpecError for data at a relative path that exists here and is not sent along.

    `written` is the spec as the user wrote it. An absolute path may be storage that this machine
    shares with the cluster; the run itself checks it there.
    """
    searched = flatten(written.get("sweep") or {}, "sweep.")
    fields = flatten(written.get("data") or {}, "data.")
    fields |= {name: value for name, value in searched.items() if ".data." in name}
    for field, values in fields.items():
        for value in _texts(values):
            if not value or Path(value).is_absolute() or "://" in value:
                continue
            missing = _not_sent(folder, Path(os.path.normpath(value)), sent, exclude)
            if missing:
                raise SpecError(
                    f"{field}: {missing} is on this machine and is not sent along (git ignores it, "
                    "or it is outside of the working folder); put it on storage that the cluster "
                    "sees, and give its path or URI there"
                )


def _not_sent(
    folder: Path, source: Path, sent: Collection[Path], exclude: Collection[str]
) -> Path | None:
    """The file or folder `source`, or the first file in it, that exists here and is not sent."""
    place = folder / source
    if not place.exists():
        return None
    if not any(source in (path, *path.parents) for path in sent):
        return source
    if source == Path():  # the whole working folder, of which git tells what belongs to it
        return None
    inside = sorted(each.relative_to(folder) for each in place.rglob("*") if each.is_file())
    return next((p for p in inside if p not in sent and not is_left_out(p, exclude)), None)


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value of a spec, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, Mapping):
        yield from _texts([*value.values()])
