"""The structure of the code: allowed imports, sizes, private parts, start time, pinned packages."""

import ast
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.layout import (
    CONTRACTS,
    HOME,
    PACKAGES,
    arrows,
    files_of,
    imports,
    nodes,
    size_of,
    sources,
)

MAX_ROOM_FILES, MAX_FILE_LINES, MAX_FUNCTION_LINES = 10, 350, 60
LARGE_ROOMS = {
    "cluster.cost": 11,
    "trainers": 13,
    "trainers.checkpoints": 13,
    "trainers.engine": 13,
    "trainers.modeling": 12,
    "trainers.tracking": 16,
    "tuning.trials": 11,
}
"""Room -> its limit, for rooms with more files than `MAX_ROOM_FILES`. `cluster.cost` has a file for
each source of prices, power and carbon, and `trainers` one for each part of a run's definition."""
EXPORTS = (Path("trainers/__init__.py"), Path("trainers/export.py"))
"""Files that offer users names of rooms that are lower in the table, and import them on first use.
"""
HEAVY = ("torch", "ray", "mlflow", "pydantic", "rich", "numpy", "pyarrow")
FORBIDDEN = {
    "torch": ("cluster",),
    "ray": ("cluster/cost", "cluster/base", "trainers/engine", "trainers/planning"),
    "mlflow": (
        "cluster",
        "trainers/engine",
        "trainers/data",
        "trainers/modeling",
        "trainers/planning",
    ),
}
"""Library -> rooms in which it must not be imported, not even within a function."""
PRIVATE = (
    "cluster/connection/ray_internals.py",
    "trainers/runs/ray_train_internals.py",
    "trainers/tracking/mlflow_internals.py",
    "trainers/torch_internals.py",
    "tuning/fused/tune_internals.py",
    "tuning/programs/torch_internals.py",
)
"""The only modules that use private parts of Ray, torch and MLflow; each has a test of its own."""
UNSTABLE = ("ray.core.generated", "ray.train.v2", "ray.autoscaler.")
"""Modules that their library does not document, although their names have no underscore."""
LIBRARIES = ("ray", "tune", "torch", "mlflow", "optuna", "pyarrow")
SOURCES = sources()


def violations(room: str) -> list[str]:
    """Every import in a room that its contract does not allow."""
    allowed = CONTRACTS[room].imports
    return [
        str(statement)
        for other, statements in arrows(room).items()
        for statement in statements
        if other not in allowed and statement.path not in EXPORTS
    ]


@pytest.mark.parametrize("room", CONTRACTS)
def test_imports_follow_the_contracts(room: str) -> None:
    assert violations(room) == []


def test_contracts_point_one_way() -> None:
    """A room may import only rooms that stand above it in the table, so there is no circle."""
    rooms = list(CONTRACTS)
    for room, contract in CONTRACTS.items():
        above = rooms[: rooms.index(room)]
        assert [other for other in contract.imports if other not in above] == [], room


def test_every_package_is_a_room_with_a_contract() -> None:
    packages = {".".join(path.parent.parts) for path in sources()}
    assert packages - {"cluster", "trainers.workloads"} == CONTRACTS.keys()


@pytest.mark.parametrize("room", CONTRACTS)
def test_a_room_says_what_it_is_for(room: str) -> None:
    """The docstring of its `__init__.py` says so, in at most 8 lines."""
    text = (HOME / Path(*room.split(".")) / "__init__.py").read_text()
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, f"{room}/__init__.py has no docstring"
    assert len(docstring.splitlines()) <= 8


@pytest.mark.parametrize("room", CONTRACTS)
def test_a_room_is_small(room: str) -> None:
    modules = [path for path in files_of(room) if path.name != "__init__.py"]
    assert len(modules) <= LARGE_ROOMS.get(room, MAX_ROOM_FILES), sorted(map(str, modules))


def test_files_are_short() -> None:
    long = {str(path): size_of(path) for path in sources() if size_of(path) > MAX_FILE_LINES}
    assert long == {}


def test_functions_are_short() -> None:
    long = {
        f"{path}:{node.name}": length
        for path in sources()
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_a_library_is_used_in_its_rooms_alone() -> None:
    """The head needs no torch, and the training loop needs neither Ray nor MLflow."""
    wrong = [
        str(each)
        for path in sources()
        for each in imports(path)
        for library, forbidden in FORBIDDEN.items()
        if each.module.partition(".")[0] == library
        and str(path).startswith(tuple(f"{room}/" for room in forbidden))
    ]
    assert wrong == []


def private_uses(path: Path) -> Iterator[str]:
    """Uses of names of other packages that are private, or are in a private or unstable module."""
    for each in imports(path):
        parts = each.module.split(".")
        foreign = parts[0] not in (*PACKAGES, "__future__")
        private = any(part.startswith("_") for part in parts)
        if foreign and (private or each.module.startswith(UNSTABLE)):
            yield str(each)
    for node in nodes(path):
        if not isinstance(node, ast.Attribute):
            continue
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            inner = inner.value
        dotted = ast.unparse(node)
        private = node.attr.startswith("_") and not node.attr.startswith("__")
        if isinstance(inner, ast.Name) and inner.id in LIBRARIES and private:
            yield f"{path}:{node.lineno}: uses {dotted}"


def test_private_parts_of_libraries_are_used_in_one_module_each() -> None:
    """Each of these modules has a test, which says in which release the parts were read."""
    wrong = [use for path in sources() if str(path) not in PRIVATE for use in private_uses(path)]
    assert wrong == []
    assert [path for path in PRIVATE if not (HOME / path).is_file()] == []
    for path in PRIVATE:
        module = Path(path)
        assert (HOME / "tests" / module.parent / f"test_{module.name}").is_file()


def test_tests_mirror_the_rooms() -> None:
    """A test file is in the folder of its room, and has the name of a module or of a topic."""
    folders = {
        ".".join(path.relative_to(HOME / "tests").parent.parts)
        for package in PACKAGES
        for path in (HOME / "tests" / package).rglob("test_*.py")
    }
    assert folders - {"trainers.workloads", "trainers.conformance"} <= CONTRACTS.keys()


def loaded_by(code: str) -> set[str]:
    """The modules that a new Python has loaded after running `code`."""
    show = "\nimport json, sys\nprint('\\n' + json.dumps([name for name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code + show], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_head_node_needs_no_gpu_stack() -> None:
    modules = [
        ".".join(path.with_suffix("").parts) for path in SOURCES if path.parts[0] == "cluster"
    ]
    loaded = loaded_by("\n".join(f"import {module}" for module in modules))
    assert loaded >= {"cluster.base.config", "cluster.connection.ray_connection"}
    assert not loaded & {"torch", "ray", "mlflow"}


HELP = """
from heliostat.main import main
try:
    main(['--help'])
except SystemExit as end:
    assert end.code == 0
"""


def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_by(HELP)
    assert "trainers.cli.train" in loaded
    assert not loaded & set(HEAVY)


def test_help_is_instant() -> None:
    """The limit is on the CPU seconds of the whole process, the best of five."""
    spent_s = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", HELP], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent_s) <= 0.25


def pins() -> dict[str, str]:
    """Canonical name -> version, from the lines of constraints.txt; each must pin with ==."""
    found = {}
    for line in (HOME / "constraints.txt").read_text().splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        specifiers = list(requirement.specifier)
        assert [s.operator for s in specifiers] == ["=="], line
        assert "*" not in specifiers[0].version, line
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is pinned twice"
        found[name] = specifiers[0].version
    return found


def needed(name: str, extras: frozenset[str], seen: dict[str, frozenset[str]]) -> None:
    """Add a distribution and all its requirements on this machine to `seen`, with their extras."""
    key = canonicalize_name(name)
    if extras <= seen.get(key, frozenset()) and key in seen:
        return
    seen[key] = seen.get(key, frozenset()) | extras
    for line in distribution(name).requires or ():
        requirement = Requirement(line)
        environments = [{"extra": extra} for extra in ("", *extras)]
        marker = requirement.marker
        if marker is None or any(marker.evaluate(each) for each in environments):
            needed(requirement.name, frozenset(requirement.extras), seen)


def test_everything_that_is_installed_for_us_is_pinned() -> None:
    """The pins are the installed versions. NVIDIA's libraries are left out: torch pins them."""
    seen: dict[str, frozenset[str]] = {}
    try:
        needed("heliostat", frozenset({"dev"}), seen)
    except PackageNotFoundError as error:
        pytest.fail(f"the environment is not complete: {error.name}")
    assert {"torch", "ray", "aiohttp-cors", "pytest"} <= seen.keys()
    ours = {
        name: Version(distribution(name).version).public
        for name in seen
        if name not in ("heliostat", "triton") and not name.startswith(("nvidia-", "cuda-"))
    }
    pinned = pins()
    assert {name: pinned.get(name) for name in ours} == ours
