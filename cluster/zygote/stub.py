"""Runs in place of Python for a Ray: hands Ray's Python programs over to the zygote.

    python -I -S stub.py FOLDER OWNER ARGUMENTS...

FOLDER is the session's, OWNER the name of the Ray that starts this process, ARGUMENTS are those of
Python. Ray takes a script with the first part for its Python (`python_for_ray.python_for`). What
cannot be forked is started as usual: other programs, containers, another environment than that
with which the zygote has imported its modules.
"""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: it may hold anything

from cluster.zygote.handover import (
    RAY_SOCKET,
    WORKER_SOCKET,
    end_as,
    hand_over,
    open_files,
    process_state,
)

PROGRAMS = (
    "default_worker.py",
    "dashboard.py",
    "agent.py",
    "main.py",
    "monitor.py",
    "log_monitor.py",
)
"""Files of Ray's Python programs that are forked, as named by Ray 2.60."""
SETUP_WORKER = "workers/setup_worker.py"
"""Sets a worker's runtime environment up, then starts the worker: 0.6 CPU-seconds of imports."""
FROZEN = (
    *("PYTHON", "LD_", "MALLOC_", "GLIBC_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_"),
    *("ATEN_", "ONEDNN_", "DNNL_", "TORCH", "LANG", "LC_"),
)
"""Beginnings of the names of variables that Python, libc, BLAS and torch read once."""
APPLIED = (
    *("PYTHONPATH", "PYTHONBREAKPOINT", "PYTHONUNBUFFERED", "PYTHONFAULTHANDLER"),
    *("PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCH_HOME"),
    *("TORCH_DISTRIBUTED_DEBUG", "TORCHINDUCTOR_CACHE_DIR"),
)
"""Exceptions: read when used, or applied by `forked_child`."""


def frozen(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a forked child cannot have otherwise than the zygote."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(FROZEN) and name not in APPLIED
    }


def command_environment(
    command: Mapping[str, str], base: Mapping[str, str], own: Mapping[str, str]
) -> dict[str, str]:
    """A worker's environment: that of the command it works for, and what Ray has added.

    `base` is the environment in which Ray was started, `own` that of the worker's process.
    """
    return {**command, **{name: v for name, v in own.items() if base.get(name) != v}}


def main(arguments: list[str]) -> None:
    folder, owner, words = Path(arguments[0]), arguments[1], arguments[2:]
    python = (folder / "python.path").read_text()
    options, words = _split_options(words)
    if _is_of_ray(words) and words[0].endswith(SETUP_WORKER):
        _take_command_state(folder / owner)
        prepared = _set_up_worker(words[1:], python)
        if prepared is not None:
            more, words = _split_options(prepared)
            options += more
    if _is_of_ray(words) and Path(words[0]).name in PROGRAMS:
        code = _fork(folder, owner, words)
        if isinstance(code, int):
            end_as(code)
        with contextlib.suppress(OSError), (folder / "log").open("a") as log:
            log.write(f"{words[0]} is started as usual: {code}\n")
    os.execv(python, [python, *options, *words])


def _split_options(words: list[str]) -> tuple[list[str], list[str]]:
    """The options of Python, and the rest."""
    count = 0
    while count < len(words) and words[count].startswith("-") and words[count] not in ("-c", "-m"):
        count += 1
    return words[:count], words[count:]


def _is_of_ray(words: list[str]) -> bool:
    return bool(words) and "/ray/" in words[0]


def _fork(folder: Path, owner: str, words: list[str]) -> int | str:
    """The exit code of the forked process, or why it was not forked."""
    is_worker = words[0].endswith("default_worker.py")
    if is_worker:
        theirs, ours = json.loads((folder / "frozen.json").read_text()), frozen(os.environ)
        if theirs != ours:
            names = sorted(name for name, _ in theirs.items() ^ ours.items())
            return f"another {', '.join(names)}"
    files = [0, 1, 2, *(number for number in open_files() if _is_inherited(number))]
    request = {
        **process_state(),
        "do": "fork",
        "owner": owner,
        "program": words,
        "files": files,
    }
    return hand_over(folder / (WORKER_SOCKET if is_worker else RAY_SOCKET), request, tuple(files))


def _is_inherited(number: int) -> bool:
    try:
        return number > 2 and os.get_inheritable(number)
    except OSError:
        return False


def _take_command_state(folder: Path) -> None:
    """Take the environment, working folder and umask of the command that this worker is for.

    The command keeps them in a file by its job's id. A Ray that only one command uses has none.
    """
    file = folder / f"{os.environ.get('RAY_JOB_ID', '')}.json"
    if not file.is_file():
        return
    state, base = json.loads(file.read_text()), json.loads((folder / "base.json").read_text())
    environment = command_environment(state["environment"], base, os.environ)
    os.environ.clear()
    os.environ.update(environment)
    os.umask(state["umask"])
    if Path(state["cwd"]).is_dir():
        os.chdir(state["cwd"])


def _set_up_worker(arguments: list[str], python: str) -> list[str] | None:
    """Do what Ray's setup_worker.py does; return the worker's command line without Python.

    None for what Ray has to do itself: containers, conda, another Python, another language.
    """
    context, rest = {}, []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--serialized-runtime-env-context":
            context = json.loads(value)
        elif name == "--language":
            if value != "PYTHON":
                return None
        else:
            rest.append(argument)
    prefix = context.get("command_prefix") or []
    is_folder = len(prefix) == 3 and prefix[0] == "cd" and prefix[2] == "&&"
    if context.get("override_worker_entrypoint") or (prefix and not is_folder):
        return None
    if context.get("py_executable", python) != python:
        return None
    if is_folder:
        os.chdir(shlex.split(prefix[1])[0])
    for name, value in (context.get("env_vars") or {}).items():
        os.environ[name] = os.path.expandvars(value)  # as Ray does
    return rest


if __name__ == "__main__":
    main(sys.argv[1:])
