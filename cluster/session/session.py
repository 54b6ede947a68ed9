"""This machine's session of the user: found or started, asked and ended. Imports nothing heavy.

A session belongs to one user, one Python with its packages and our code, and one environment in
as far as a process cannot change it later (`session_key`). Another environment or another version
of the code has another session, and each ends when it has been idle for a while.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.session.handover import (
    LIMITS,
    RAY_SOCKET,
    WORKER_SOCKET,
    connect,
    end_as,
    hand_over,
    process_state,
    send_request,
)
from cluster.session.stub import frozen

HOME = Path(__file__).resolve().parents[2]
LONGEST_FOLDER = 43
"""Characters of a session's folder, below which Ray has sockets with paths of 64 characters more;
a Unix socket's path has at most 107."""
SESSION_ENV_VAR = "HELIOSTAT_SESSION"
"""`off` starts every process as usual, as where no session can be had."""
START_TIMEOUT_S = 60.0

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
        file = self.folder / f"{job_id}.json"
        temporary = file.with_name(f".{file.name}")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            json.dump(kept, out)
        temporary.rename(file)

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

    def ask(self, request: Mapping[str, Any]) -> socket.socket:
        """Send a request; the answer can be read from the connection. Raises OSError."""
        connection = connect(self.folder / RAY_SOCKET)
        send_request(connection, request)
        return connection

    def status(self) -> dict[str, Any]:
        with self.ask({"do": "status"}) as connection:
            return _read_line(connection)

    def end(self) -> bool:
        """Have it end, and wait; False if a command is using it."""
        with self.ask({"do": "end"}) as connection:
            if _read_line(connection)["busy"]:
                return False
        with contextlib.suppress(OSError), connect(self.folder / RAY_SOCKET) as connection:
            connection.settimeout(START_TIMEOUT_S)
            connection.recv(1)  # until it has gone
        return True

    def lease_ray(self) -> RayLease | None:
        """The use of the warm Ray, started if need be; None if it cannot be had."""
        try:
            connection = self.ask({"do": "ray"})
            connection.settimeout(START_TIMEOUT_S)
            answer = _read_line(connection)
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
    try:
        connect(folder / RAY_SOCKET).close()
    except OSError:
        return None
    return Session(folder)


def all_sessions() -> list[Session]:
    """Every running session of this user below the folder for temporary files."""
    place = _place()
    found = []
    for folder in sorted(place.glob("*/")) if place is not None else []:
        with contextlib.suppress(OSError):
            connect(folder / RAY_SOCKET).close()
            found.append(Session(folder))
    return found


def enter_session(folder: Path) -> None:
    """Make the session in `folder` that of this process, which it has forked."""
    global _current
    _current = Session(folder)


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
                shutil.rmtree(folder, ignore_errors=True)
                session = _start(folder)
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
        "function": function,
        "title": sys.argv[0],
        "arguments": list(arguments),
        "modules": list(modules),
        "session": str(session.folder),
        "files": [0, 1, 2],
    }
    code = hand_over(session.folder / WORKER_SOCKET, request, (0, 1, 2))
    use.close()
    if isinstance(code, str):
        return None
    if code < 0:
        end_as(code)
    return code


def session_folder() -> Path | None:
    """The folder of the session for this environment; None where there can be no session."""
    if os.environ.get(SESSION_ENV_VAR) == "off" or not hasattr(os, "pidfd_open"):
        return None
    if any(not _is_open(number) for number in (0, 1, 2)):
        return None
    place = _place()
    if place is None:
        return None
    folder = place / session_key()
    return folder if len(str(folder)) <= LONGEST_FOLDER else None


def session_key() -> str:
    """Eight hexadecimal digits for all that makes processes of one session interchangeable."""
    import resource

    facts = {
        "python": [sys.executable, sys.prefix, platform.python_version(), list(sys.flags)],
        "packages": [(path, _modified_ns(path)) for path in sys.path if path.endswith("-packages")],
        "code": code_fingerprint(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if _is_fixed(name)
        },
        "limits": [resource.getrlimit(getattr(resource, name)) for name in LIMITS],
        "cpus": sorted(os.sched_getaffinity(0)),
        "groups": sorted(os.getgroups()),
        "cgroup": Path("/proc/self/cgroup").read_text(),
        "namespaces": [os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net", "pid")],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


def _is_fixed(name: str) -> bool:
    """Whether a variable must be the same in all processes of a session."""
    return (
        bool(frozen({name: ""}))
        or name in ("PYTHONPATH", "PATH", "HOME", "TMPDIR")
        or name.endswith("_VISIBLE_DEVICES")
        or (name.startswith("RAY_") and not name.startswith(_OF_COMMAND))
    )


_OF_COMMAND = ("RAY_ADDRESS", "RAY_JOB_", "RAY_RAYLET_PID", "RAY_NODE_ID")
"""Beginnings of the names of Ray's variables that say what a command talks to."""


def code_fingerprint() -> str:
    """A digest of the names, sizes and times of our source files."""
    digest = hashlib.sha256()
    for package in ("cluster", "trainers", "tuning", "heliostat"):
        for folder, _, names in sorted(os.walk(HOME / package)):
            for name in sorted(names):
                if name.endswith(".py"):
                    found = os.stat(os.path.join(folder, name))
                    digest.update(f"{folder}/{name} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()


def _start(folder: Path) -> Session:
    """Start the session's process; its sockets listen at once, and requests wait in them."""
    folder.mkdir(mode=0o700)
    (folder / "python.path").write_text(sys.executable)
    (folder / "frozen.json").write_text(json.dumps(frozen(os.environ)))
    listeners = []
    for name in (RAY_SOCKET, WORKER_SOCKET):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / name))
        listener.listen(256)
        listeners.append(listener)
    numbers = [listener.fileno() for listener in listeners]
    fixed = {name: value for name, value in os.environ.items() if not name.startswith(_OF_COMMAND)}
    with open(folder / "log", "ab") as log:
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
    return Session(folder)


def _place() -> Path | None:
    """This user's folder for sessions; None if another user could reach into it."""
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    place = base / f"heliostat-{os.getuid()}"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
    except OSError:
        return None
    private = found.st_uid == os.getuid() and not found.st_mode & 0o077
    return place / "s" if private and stat.S_ISDIR(found.st_mode) and _made(place / "s") else None


def _made(folder: Path) -> bool:
    folder.mkdir(mode=0o700, exist_ok=True)
    return True


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _modified_ns(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _read_line(connection: socket.socket) -> dict[str, Any]:
    """Raises OSError or ValueError if the session has gone."""
    line = connection.makefile("rb").readline()
    if not line:
        raise ValueError("the session has gone")
    found: dict[str, Any] = json.loads(line)
    return found
