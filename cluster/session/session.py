"""This machine's session of the user: found or started, asked and ended. Imports nothing heavy.

A session belongs to one user, one Python with its packages and our code, and one environment in
as far as a process cannot change it later (`session_key`). Another environment or another version
of the code has another session, and each ends when it has been idle for a while.
"""

import contextlib
import fcntl
import importlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from cluster.base.files import write_atomic
from cluster.session.session_key import session_folder, sessions_folder
from cluster.zygote.handover import (
    OF_COMMAND,
    RAY_SOCKET,
    WORKER_SOCKET,
    connect,
    end_as,
    hand_over,
    process_state,
    read_answer,
    send_request,
)
from cluster.zygote.stub import frozen

START_TIMEOUT_S = 60.0
ALIVE_FILE = "alive"
"""File in a session's folder that its processes hold locked as long as one of them lives."""

_current: "Session | None" = None
"""The session that has forked this process."""


@dataclass(frozen=True)
class RayLease:
    """The use of the session's warm Ray, for as long as the connection is open."""

    address: str
    folder: Path
    """Where the environment of each of its jobs is kept."""
    connection: socket.socket

    def keep_command_state(self, job_id: str) -> None:
        """Give the workers of a job this process's environment, working folder and umask.

        Without the frozen variables that modules have set since: scikit-learn 1.9 sets KMP_*.
        """
        state = process_state()
        kept = {name: state[name] for name in ("environment", "cwd", "umask")}
        fixed = json.loads((self.folder.parent / "frozen.json").read_text())
        changed = frozen(kept["environment"])
        kept["environment"] = {
            **{name: value for name, value in kept["environment"].items() if name not in changed},
            **fixed,
        }
        # The folder is open to this user only.
        write_atomic(self.folder / f"{job_id}.json", json.dumps(kept))

    def release(self, keep_warm_s: float | None = None) -> None:
        with contextlib.suppress(OSError):
            if keep_warm_s is not None:
                line = json.dumps({"keep_warm_s": keep_warm_s})
                self.connection.sendall(line.encode() + b"\n")
        self.connection.close()


@dataclass(frozen=True)
class Session:
    """A session that runs, or did a moment ago."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def ask(self, request: Mapping[str, Any]) -> socket.socket:
        """Send a request; the answer can be read from the connection. Raises OSError."""
        connection = connect(self.folder / RAY_SOCKET)
        send_request(connection, request)
        return connection

    def status(self) -> dict[str, Any]:
        with self.ask({"do": "status"}) as connection:
            return read_answer(connection)

    def end(self, wait: bool = True) -> bool:
        """Have it end; False if it is in use."""
        with self.ask({"do": "end"}) as connection:
            answer = read_answer(connection)
        if answer["in_use"]:
            return False
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(answer["pid"])
            if wait:
                select.select([handle], [], [])
            os.close(handle)
        return True

    def lease_ray(self) -> RayLease | None:
        """The use of the warm Ray, started if need be; None if it cannot be had."""
        try:
            connection = self.ask({"do": "ray"})
            connection.settimeout(START_TIMEOUT_S)
            answer = read_answer(connection)
        except (OSError, ValueError):
            return None
        if "address" not in answer:
            connection.close()
            return None
        connection.settimeout(None)
        return RayLease(answer["address"], self.folder / answer["owner"], connection)


def find_session() -> Session | None:
    """The running session for this process's environment and code; None without one."""
    folder = session_folder()
    if folder is None:
        return None
    running = [each for each in all_sessions() if each.folder.name.startswith(folder.name)]
    return running[0] if running else None


def all_sessions() -> list[Session]:
    """Every running session of this user below the folder for temporary files."""
    place = sessions_folder()
    found = []
    for folder in sorted(place.glob("*/")) if place is not None else []:
        with contextlib.suppress(OSError):
            connect(folder / RAY_SOCKET).close()
            found.append(Session(folder))
    return found


def run_in_child(arguments: list[str]) -> int:
    """In a process that a session has forked: call a function of `run_in_session`.

    `arguments` are the session's folder, the function and its arguments.
    """
    global _current
    folder, function, *rest = arguments
    sys.argv[1:] = rest
    _current = Session(Path(folder))
    module, _, name = function.partition(":")
    return int(getattr(importlib.import_module(module), name)(rest))


def find_or_start_session() -> Session | None:
    """The session for this process's environment and code; None where none can be had."""
    if _current is not None:
        return _current
    folder = session_folder()
    if folder is None:
        return None
    try:
        with _locked(folder.with_suffix(".lock")):
            session = find_session()
            if session is None:
                session = _start(_unused(folder))
    except OSError:
        return None
    return session


def run_in_session(
    function: str, arguments: Sequence[str], modules: Sequence[str], needs_ray: bool
) -> int | None:
    """Run `function` with `arguments` in a process that the session forks; its exit code.

    `function` is `module:name`. `modules` are imported before. With `needs_ray` the warm Ray is
    started meanwhile. None if this cannot be had: nothing has been done then.
    """
    session = find_or_start_session()
    if session is None:
        return None
    try:
        # Open until this process ends, so that the session knows that it is used.
        use = session.ask({"do": "use", "ray": needs_ray})
    except OSError:
        return None
    request = {
        **process_state(),
        "do": "command",
        "function": f"{__name__}:{run_in_child.__name__}",
        "title": sys.argv[0],
        "arguments": [str(session.folder), function, *arguments],
        "modules": list(modules),
        "files": [0, 1, 2],
    }
    code = hand_over(session.folder / WORKER_SOCKET, request, (0, 1, 2))
    use.close()
    if isinstance(code, str):
        return None
    if code < 0:
        end_as(code)
    return code


def _unused(folder: Path) -> Path:
    """The folder with a suffix with which it does not exist.

    Folders of sessions of which no process lives are removed. A session that was killed may have
    left a Ray behind that a command still uses.
    """
    candidates = [folder.with_name(f"{folder.name}{suffix}") for suffix in ("", *ascii_lowercase)]
    for candidate in candidates:
        if candidate.is_dir():
            with (candidate / ALIVE_FILE).open("w") as alive, contextlib.suppress(OSError):
                fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(candidate)
    return next(candidate for candidate in candidates if not candidate.exists())


def _start(folder: Path) -> Session:
    """Start the session's process; its sockets listen at once, and requests wait in them.

    Other sessions that are idle end, so that one at most takes memory for nothing.
    """
    for other in all_sessions():
        with contextlib.suppress(OSError, ValueError):
            other.end(wait=False)
    folder.mkdir(mode=0o700)
    alive = (folder / ALIVE_FILE).open("w")
    fcntl.flock(alive, fcntl.LOCK_SH)
    (folder / "python.path").write_text(sys.executable)
    (folder / "frozen.json").write_text(json.dumps(frozen(os.environ)))
    listeners = []
    for name in (RAY_SOCKET, WORKER_SOCKET):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / name))
        listener.listen(256)
        listeners.append(listener)
    numbers = [*(listener.fileno() for listener in listeners), alive.fileno()]
    fixed = {name: value for name, value in os.environ.items() if not name.startswith(OF_COMMAND)}
    with (folder / "log").open("ab") as log:
        subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "cluster.session.session_server"),
                *(str(folder), *map(str, numbers)),
            ],
            cwd="/",
            env=fixed,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=numbers,
            start_new_session=True,
        )
    for listener in listeners:
        listener.close()
    alive.close()
    return Session(folder)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
