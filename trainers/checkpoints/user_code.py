"""A user's own code in an exported model: what the model needs of it, and its import from there.

The code of a workload is the module that defines it, the user's other modules that it imports,
directly or not, and the files that building the network reads from the user's folder.
"""

import ast
import contextlib
import functools
import importlib.machinery
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from trainers.checkpoints.manifest import is_pickle
from trainers.workload import Workload, imported_names, parse_source

OWN_PACKAGES = ("cluster", "trainers", "tuning", "heliostat")
"""Heliostat's: they are installed where a model is loaded, or come with it from MLflow."""
LIBRARIES = tuple(
    Path(sysconfig.get_path(kind)).resolve()
    for kind in ("stdlib", "platstdlib", "purelib", "platlib")
)


WORKING_FOLDER = "working_folder.txt"
"""In `code`: says that it is the working folder while a model is built."""
MODULE_SUFFIXES = (".py", ".so", ".pyd")
SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/usr", "/lib", sys.prefix, sys.base_prefix)
INSTALLED = (*map(Path, SYSTEM), *LIBRARIES)
"""Where files are that belong to a machine or to an installation of Python."""


class UserCode:
    """The user's code that a workload needs, as it is now."""

    def __init__(self, workload: type[Workload]) -> None:
        self.modules = user_modules(workload)
        """The files of the user's own modules, by name."""
        roots = (_root(name, path) for name, path in self.modules.items())
        self._folders = [Path.cwd(), *dict.fromkeys(roots)]

    def copy_modules(self, code: Path) -> None:
        """Copy the modules to `code` so that they can be imported from there.

        With a package come the other files in it, but for modules and pickles.
        """
        for name, path in self.modules.items():
            self._copy(path, code / place_of(name, path))
            if path.name == "__init__.py":
                for other in path.parent.iterdir():
                    if other.is_file() and _is_data(other):
                        self._copy(other, code / place_of(name, path).parent / other.name)

    def copy_missing(self, error: Exception, code: Path) -> bool:
        """Copy the user's file that an import from `code` asked for in vain; False without one.

        The file is at its place relative to the modules, or to the working folder.
        """
        if isinstance(error, ModuleNotFoundError) and error.name not in self.modules:
            path = _user_file(error.name or "")
            if path is None:
                return False
            self.modules[error.name or ""] = path
            self.copy_modules(code)
            return True
        named = [getattr(error, "filename", None), *re.findall(r"[^\s'\"`:,;()\[\]]+", str(error))]
        for text in filter(None, named):
            wanted = Path(os.fsdecode(text))
            inside = wanted.is_relative_to(code)
            if inside:
                wanted = wanted.relative_to(code)
            if wanted.is_absolute() or ".." in wanted.parts:
                continue
            if (code / wanted).exists():
                if not inside and wanted.name and not (code / WORKING_FOLDER).exists():
                    self._read_from(code)
                    return True
                continue
            for source in (folder / wanted for folder in self._folders):
                if source.is_dir() or (source.is_file() and not is_pickle(source)):
                    self._copy(source, code / wanted)
                    if not inside:
                        self._read_from(code)
                    return True
        return False

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[set[str]]:
        """In here the user's folder is neither the working folder nor where modules come from.

        Yields the set of the files that this thread opens in here.
        """
        path, before = list(sys.path), Path.cwd()
        own = {str(folder) for folder in self._folders if folder != _HERE}
        hidden = {name: sys.modules[name] for name in [*sys.modules] if self._is_own(name)}
        with tempfile.TemporaryDirectory() as empty, _opened_files() as opened:
            for name in hidden:
                del sys.modules[name]
            sys.path[:] = [each for each in path if str(Path(each).resolve()) not in own]
            os.chdir(empty)
            try:
                yield opened
            finally:
                os.chdir(before)
                sys.path[:] = path
                sys.modules.update(hidden)

    def outside(self, opened: Iterable[str], model: Path) -> list[Path]:
        """The files among those opened that neither a model nor each machine has."""
        paths = {Path(each) for each in opened}
        return sorted(
            path
            for path in paths
            if path.is_file()
            and not path.is_relative_to(model)
            and not any(path.is_relative_to(folder) for folder in INSTALLED)
            and not any(path.is_relative_to(_HERE / package) for package in OWN_PACKAGES)
        )

    def copy_named(self, files: Iterable[Path], sections: dict[str, Any], code: Path) -> bool:
        """Copy those of the files that the spec names, and name the copies; False if it does not.

        `sections` are those of the spec, which are changed.
        """
        copied = False
        for path in files:
            if not is_pickle(path) and _replace(sections, str(path), path.name):
                self._copy(path, code / path.name)
                self._read_from(code)
                copied = True
        return copied

    def _read_from(self, code: Path) -> None:
        """Note that the code reads files by paths that are relative to the working folder."""
        (code / WORKING_FOLDER).write_text("While a model is built, this is its working folder.\n")

    def _is_own(self, name: str) -> bool:
        file = getattr(sys.modules[name], "__file__", None) or ""
        inside = any(file.startswith(str(folder)) for folder in self._folders)
        return inside and _user_file(name) is not None

    def _copy(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_file():
            shutil.copyfile(source, target)
        else:
            shutil.copytree(source, target, ignore=_pickles, dirs_exist_ok=True)


def user_modules(workload: type[Workload]) -> dict[str, Path]:
    """The user's own modules that a workload needs, and their files, by name.

    They are found by the imports in their source; where one imports by a name that it computes,
    all modules that were imported from the same folder are taken.
    """
    found: dict[str, Path] = {}
    waiting = [workload.__module__]
    while waiting:
        name = waiting.pop()
        path = None if name in found else _user_file(name)
        if path is None:
            continue
        found[name] = path
        parts = name.split(".")
        waiting += [".".join(parts[:count]) for count in range(1, len(parts))]
        if path.suffix != ".py":
            continue
        try:
            tree = parse_source(path)
        except SyntaxError:  # never imported
            continue
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        waiting += imported_names(tree, package)
        if _imports_by_name(tree):
            root = _root(name, path)
            files = {other: _user_file(other) for other in [*sys.modules]}
            waiting += [other for other, file in files.items() if file and root in file.parents]
    return found


def place_of(name: str, path: Path) -> Path:
    """The path of a module below the folder that it is imported from."""
    parts = name.split(".")
    if path.name == "__init__.py":
        return Path(*parts, path.name)
    return Path(*parts[:-1], path.name)


@contextlib.contextmanager
def importing_from(code: Path) -> Iterator[None]:
    """In here modules in `code` are imported from there, even if others of their names are loaded.

    So a model is built by the code that it was trained with, and two versions of the code can be
    used in one process. What was loaded before is back afterwards. If the code reads files by
    relative paths, `code` is the working folder of this process in here.
    """
    if not code.is_dir():
        yield
        return
    modules = [path.relative_to(code) for path in code.rglob("*") if path.suffix in MODULE_SUFFIXES]
    tops = {path.parts[0].partition(".")[0] for path in modules}

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in tops]

    hidden: dict[str, ModuleType] = {name: sys.modules.pop(name) for name in loaded()}
    path, before, writes = list(sys.path), Path.cwd(), sys.dont_write_bytecode
    sys.path[:0] = [str(code), str(before)]
    sys.dont_write_bytecode = True  # a model's folder stays as it is
    try:
        if (code / WORKING_FOLDER).exists():
            os.chdir(code)
        importlib.invalidate_caches()
        yield
    finally:
        os.chdir(before)
        sys.path[:], sys.dont_write_bytecode = path, writes
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(hidden)


def _user_file(name: str) -> Path | None:
    """The file of a module if it is the user's own: of no library, and not of Heliostat."""
    top = name.partition(".")[0]
    if top in OWN_PACKAGES or top in sys.stdlib_module_names or top == "__main__":
        return None
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None) if module else _find(name)
    if file is None or not Path(file).is_file():
        return None
    path = Path(file).resolve()
    if any(library in path.parents for library in LIBRARIES):
        return None
    return None if {"site-packages", "dist-packages"} & {*path.parts} else path


def _find(name: str) -> str | None:
    """The file of a module that is not loaded; nothing is imported to find it."""
    parts, path = name.split("."), None
    for count in range(1, len(parts) + 1):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:count]), path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    return spec.origin if spec and spec.has_location else None


def _imports_by_name(tree: ast.AST) -> bool:
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return bool(names & {"import_module", "__import__"})


def _root(name: str, path: Path) -> Path:
    """The folder that a module was imported from."""
    return path.parents[len(place_of(name, path).parts) - 1]


_HERE = Path(__file__).resolve().parents[2]
"""The folder that Heliostat's packages are in."""
_watching: tuple[int, set[str]] | None = None
"""The thread whose opened files are noted now, and those files."""


@contextlib.contextmanager
def _opened_files() -> Iterator[set[str]]:
    """The files that this thread opens in here. Python never lets go of the hook that tells."""
    global _watching
    _add_hook()
    _watching = threading.get_ident(), set()
    try:
        yield _watching[1]
    finally:
        _watching = None


@functools.cache
def _add_hook() -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _watching is not None and event == "open" and _watching[0] == threading.get_ident():
            path = arguments[0]
            if isinstance(path, str | bytes | os.PathLike):
                _watching[1].add(str(Path(os.fsdecode(path)).absolute()))

    sys.addaudithook(hook)


def _replace(section: Any, value: str, by: str) -> bool:
    """Put `by` in the place of each `value` at any depth; False if there is none."""
    items = section.items() if isinstance(section, dict) else enumerate(section)
    found = False
    for key, held in [*items]:
        if held == value:
            section[key], found = by, True
        elif isinstance(held, dict | list):
            found |= _replace(held, value, by)
    return found


def _pickles(folder: str, names: list[str]) -> list[str]:
    """Those of a folder's names that are not copied."""
    paths = [Path(folder) / name for name in names]
    return [p.name for p in paths if p.name == "__pycache__" or (p.is_file() and is_pickle(p))]


def _is_data(path: Path) -> bool:
    return (
        path.suffix not in (*MODULE_SUFFIXES, ".pyc")
        and path.name[0] != "."
        and not is_pickle(path)
    )
