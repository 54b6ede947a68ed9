"""A child of the zygote becomes the process that was asked for, and ends as an interpreter does."""

import atexit
import contextlib
import gc
import importlib
import json
import logging
import os
import resource
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cluster.connection.ray_internals import reload_configuration
from cluster.zygote.preload import name_process, top_level_modules

FIRST_MOVED_FILE = 600
"""Where open files are moved before they get their numbers; above all that a process inherits."""


def become(request: Mapping[str, Any], files: Sequence[int], connection: socket.socket) -> NoReturn:
    """Do a request in this process, which has just been forked, and end it.

    `files` get the numbers `request["files"]`. The exit code is told to `connection`.
    """
    code = 1
    gc.enable()
    try:
        reply = _take_files(request["files"], files, connection)
        _take_state(request)
        action = _action(request)
        code = _exit_code(action)
        _run_exit_handlers()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        with contextlib.suppress(Exception):
            os.write(reply, json.dumps({"code": code}).encode() + b"\n")
        os._exit(code & 255)


def _take_files(numbers: Sequence[int], files: Sequence[int], connection: socket.socket) -> int:
    """Give the files their numbers and close all others; returns the descriptor for the answer."""
    moved = [os.dup2(file, FIRST_MOVED_FILE + i) for i, file in enumerate(files)]
    reply = os.dup2(connection.fileno(), FIRST_MOVED_FILE + len(moved), inheritable=False)
    os.closerange(3, FIRST_MOVED_FILE)
    for file, number in zip(moved, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)
    return reply


def _take_state(request: Mapping[str, Any]) -> None:
    """Become what the process that asked is, in all that a child inherits."""
    for handler in list(logging.root.handlers):  # the zygote's log, whose file is closed here
        logging.root.removeHandler(handler)
    logging.root.setLevel(logging.WARNING)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request["ignored"]:
        # Python itself ignores SIGPIPE and SIGXFSZ.
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    if request["leads_group"]:
        os.setpgid(0, 0)
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    old_path = os.environ.get("PYTHONPATH", "")
    os.environ.clear()
    os.environ.update(request["environment"])
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(request["oom_score_adj"])
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, request["nice"])
    for name, limits in request["limits"].items():
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, name), tuple(limits))
    _refresh_modules(old_path)
    raylet = request["environment"].get("RAY_RAYLET_PID", "")
    if raylet.isdigit() and request["do"] == "fork":
        _end_with(int(raylet))


def _refresh_modules(old_path: str) -> None:
    """Do again what Python does at its start, and modules at their import."""
    new_path = os.environ.get("PYTHONPATH", "")
    if new_path != old_path:
        gone, new = _folders(old_path), _folders(new_path)
        sys.path[:] = [*new, *(path for path in sys.path if path not in gone)]
    importlib.invalidate_caches()
    tempfile.tempdir = None
    time.tzset()
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # else all children draw the same numbers
    if "ray" in sys.modules:
        reload_configuration()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()
        torch.distributed.set_debug_level_from_env()
        threads = os.environ.get("MKL_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or ""
        if threads.isdigit():
            torch.set_num_threads(int(threads))


def _folders(search_path: str) -> list[str]:
    """The folders of a PYTHONPATH, as Python enters them into `sys.path`."""
    return [str(Path(folder).absolute()) for folder in search_path.split(os.pathsep) if folder]


def shadowed_module(environment: Mapping[str, str]) -> str | None:
    """A module that a new folder of PYTHONPATH has and that was imported from elsewhere."""
    known = set(os.environ.get("PYTHONPATH", "").split(os.pathsep))
    for folder in environment.get("PYTHONPATH", "").split(os.pathsep):
        if folder and folder not in known:
            names = top_level_modules(folder)
            for name in names & sys.modules.keys():
                return name
    return None


def _end_with(raylet: int) -> None:
    """End this process when its raylet does.

    Ray 2.60's workers look whether the raylet is their parent, which the zygote is here.
    """
    try:
        handle = os.pidfd_open(raylet)
    except OSError:
        os._exit(1)

    def watch() -> None:
        select.select([handle], [], [])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="raylet-watch").start()


def _action(request: Mapping[str, Any]) -> Callable[[], int | None]:
    """The program of Ray, or the function of ours, that the child is to run."""
    if request["do"] == "fork":
        program = request["program"]
        name_process(Path(program[0]).stem)
        sys.argv = list(program)
        sys.path.insert(0, str(Path(program[0]).parent))

        def run_program() -> None:
            runpy.run_path(program[0], run_name="__main__")

        return run_program
    name_process(Path(request["title"]).name)
    module, _, name = request["function"].partition(":")
    arguments = request["arguments"]
    sys.argv = [request["title"], *arguments]
    function = getattr(importlib.import_module(module), name)

    def call_function() -> int:
        return int(function(arguments))

    return call_function


def _exit_code(action: Callable[[], int | None]) -> int:
    """Run `action`; the exit code that an interpreter would end with."""
    try:
        return action() or 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
    return 1


def _run_exit_handlers() -> None:
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
