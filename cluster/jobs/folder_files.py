"""The files of a folder that git does not ignore.

For git a submodule, another repository in the folder and a link to a folder are one name each.
Their files are listed too, each by the rules of the repository in which they are.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.base.errors import SpecError

LIST = ("ls-files", "-z", "--exclude-standard")

REPOSITORY_VARIABLES = (
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX"),
    *("GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE"),
)
"""Variables that name another repository than the folder's; git sets some of them for hooks."""

LeftOut = Callable[[Path], bool]
"""Whether a path, relative to the folder, is left out whatever git says."""


def files_below(folder: Path, left_out: LeftOut) -> list[Path]:
    """The files below `folder` that git does not ignore, relative to it, sorted.

    Raises SpecError for what cannot be listed: a submodule that is not checked out, a link to a
    folder that contains it, a folder that cannot be read, a repository that git does not read.
    """
    try:
        return sorted({*_files(folder, Path(), left_out, (folder.resolve(),))})
    except OSError as error:
        raise SpecError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _files(top: Path, inside: Path, left_out: LeftOut, above: tuple[Path, ...]) -> Iterator[Path]:
    """The files below `top / inside`, relative to `top`; `above` are the folders it is within."""
    for name in _names(above[-1], lambda path: left_out(inside / path)):
        path = inside / name
        place = top / path
        if not name or path == inside or left_out(path):
            continue
        if place.is_file():  # neither deleted, nor a link to nothing, nor a pipe
            yield path
        elif place.is_dir():
            target = place.resolve()
            if any(each.is_relative_to(target) for each in (*above, place.parent.resolve())):
                raise SpecError(
                    f"{path}: is a link to a folder that contains it; remove it, name it in "
                    ".gitignore or give submit --exclude"
                )
            if not place.is_symlink() and not any(place.iterdir()):
                raise SpecError(
                    f"{path}: is a submodule that is not checked out; run git submodule update "
                    f"--init {path}, or give submit --exclude"
                )
            yield from _files(top, path, left_out, (*above, target))


def _names(folder: Path, left_out: LeftOut) -> list[str]:
    """What git lists in a folder: files, links, and the folders of other repositories.

    A folder outside of a repository gets a temporary one. So does a folder that its repository
    ignores: it is the one to be listed, so only the rules within it count.
    """
    try:
        if _git(folder, "rev-parse", "--is-inside-work-tree") != "true\n":
            return _untracked(folder)
        tracked = _git(folder, *LIST, "--cached").split("\0")
        is_ignored = bool(_git(folder, "check-ignore", "--no-index", "."))
        if is_ignored or "./" in tracked:  # "./": a submodule's folder with files of its own
            return [*tracked, *_untracked(folder)]
        return [*tracked, *_git(folder, *LIST, "--others").split("\0")]
    except FileNotFoundError:
        return _names_without_git(folder, left_out)


def _untracked(folder: Path) -> list[str]:
    """What the rules in a folder do not ignore, as if it were a new repository."""
    with tempfile.TemporaryDirectory() as empty:
        _git(folder, "init", "--quiet", "--bare", empty)
        options = (f"--git-dir={empty}", f"--work-tree={folder}", "-c", "core.bare=false")
        return _git(folder, *options, *LIST, "--others").split("\0")


def _git(folder: Path, *arguments: str) -> str:
    """Git's output; empty if it says no, or that the folder is in no repository."""
    kept = {name: each for name, each in os.environ.items() if name not in REPOSITORY_VARIABLES}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, env={**kept, "LC_ALL": "C"}
    )
    message = os.fsdecode(done.stderr).strip()
    unread = re.search(r"could not open directory '(.*)'", message)
    if unread:
        raise SpecError(f"{folder / unread[1]}: cannot be read")
    if done.returncode not in (0, 1) and "not a git repository" not in message:
        raise SpecError(f"git: {' '.join(message.split())}")
    return os.fsdecode(done.stdout)


def _names_without_git(folder: Path, left_out: LeftOut) -> list[str]:
    names: list[str] = []
    for parent, folders, files in os.walk(folder):
        place = Path(parent).relative_to(folder)
        if ".gitignore" in files:
            raise SpecError("git: is needed to read .gitignore; install it")
        links = [name for name in folders if (folder / place / name).is_symlink()]
        folders[:] = [name for name in folders if not left_out(place / name)]
        names += [str(place / name) for name in (*links, *files)]
    return names
