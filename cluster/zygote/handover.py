"""How a process hands its work over to the zygote: the request, the child's end, and signals.

A request is one message on a Unix socket: a length, JSON, and the open files of the process. The
answers are lines of JSON: `{"pid": 7}` or `{"refused": "why"}`, then `{"code": 0}`.

Imports only the standard library, and little of it: this is what each of Ray's processes costs.
"""

import array
import contextlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TIMEOUT_S = 10.0
"""A request is sent and received within this time, or not at all."""
MAX_FILES = 64
RAY_SOCKET, WORKER_SOCKET = "ray.sock", "worker.sock"
"""Sockets in a session's folder: of the session with Ray imported, and of the zygote with torch."""
FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH")
OF_COMMAND = (
    *("RAY_ADDRESS", "RAY_JOB_", "RAY_RAYLET_PID", "RAY_NODE_ID", "RAY_CLIENT_MODE"),
    *("RAY_EXPERIMENTAL_NOSET_", "RAY_LD_PRELOAD_ON_WORKERS", "RAY_USAGE_STATS_"),
    *("RAY_enable_pipe_based_", "RAY_prestart_"),
)
"""Beginnings of the names of Ray's variables that differ from command to command, most of them
because Ray 2.60 sets them in workers and jobs."""
LIMITS = ("RLIMIT_NOFILE", "RLIMIT_CORE", "RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_FSIZE")


def connect(path: Path) -> socket.socket:
    """Raises OSError if nobody listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


def send_request(
    connection: socket.socket, request: Mapping[str, Any], files: tuple[int, ...] = ()
) -> None:
    body = json.dumps(request).encode()
    passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
    connection.sendmsg([len(body).to_bytes(8, "big")], passed)
    connection.sendall(body)


def receive_request(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request and its open files. Raises OSError or ValueError for anything else."""
    connection.settimeout(TIMEOUT_S)
    head, ancillary, *_ = connection.recvmsg(8, socket.CMSG_LEN(MAX_FILES * 4))
    files = array.array("i")
    for _, _, data in ancillary:
        files.frombytes(data[: len(data) // 4 * 4])
    try:
        size, body = int.from_bytes(head, "big"), b""
        while len(body) < size:
            more = connection.recv(min(size - len(body), 1 << 20))
            if not more:
                raise ValueError("the request is incomplete")
            body += more
        if not body:
            raise ValueError("the request is empty")
        return json.loads(body), list(files)
    except BaseException:
        for file in files:
            os.close(file)
        raise


def open_files() -> list[int]:
    """The descriptors of this process, those of the list itself among them."""
    return [int(file.name) for file in Path("/proc/self/fd").iterdir()]


def process_state() -> dict[str, Any]:
    """What a child of this process would inherit, except for its open files."""
    import resource

    umask = os.umask(0o077)
    os.umask(umask)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in LIMITS}
    return {
        "environment": dict(os.environ),
        "cwd": str(Path.cwd()),
        "umask": umask,
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "ignored": [int(n) for n, handler in handlers.items() if handler == signal.SIG_IGN],
        "oom_score_adj": Path("/proc/self/oom_score_adj").read_text().strip(),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "limits": limits,
        "leads_group": os.getpgid(0) == os.getpid(),
    }


def hand_over(path: Path, request: Mapping[str, Any], files: tuple[int, ...]) -> int | str:
    """Have the zygote at `path` fork a child that does `request`; return the child's exit code.

    `files` are the descriptors that the child gets, under the numbers `request["files"]`. Signals
    to this process are passed on to the child, which is killed when this process dies. Returns
    why there is no child, if there is no zygote or it refuses; then nothing has been done.
    """
    try:
        connection = connect(path)
        send_request(connection, request, files)
        connection.settimeout(None)
        answer = read_answer(connection)
    except (OSError, ValueError) as error:
        return f"the zygote does not answer: {error}"
    child = answer.get("pid")
    if child is None:
        return str(answer["refused"])
    try:
        handle = os.pidfd_open(child)
    except OSError:  # it has ended and been waited for
        handle = None
    _pass_signals_on(handle)
    return _end_of_child(connection, handle)


def read_answer(connection: socket.socket) -> dict[str, Any]:
    """One line of JSON, and nothing of the next. Raises OSError, or ValueError at the end."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise ValueError("it has gone")
        line += byte
    found: dict[str, Any] = json.loads(line)
    return found


def _end_of_child(connection: socket.socket, handle: int | None) -> int:
    """The exit code that the child itself or the zygote tells; negative for a signal.

    1 if the zygote was killed first and the child then ended by a signal: nobody can say.
    """
    try:
        code = int(read_answer(connection)["code"])
    except ValueError:
        code = 1
    if handle is not None:
        select.select([handle], [], [])
    return code


def _pass_signals_on(handle: int | None) -> None:
    def forward(number: int) -> None:
        if handle is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)

    def suspend(*_: object) -> None:
        # The child is in no process group of the terminal, which would stop it.
        forward(signal.SIGSTOP)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, suspend)
        forward(signal.SIGCONT)

    for name in FORWARDED:
        number = getattr(signal, name)
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: forward(number))
    signal.signal(signal.SIGTSTP, suspend)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def end_as(code: int) -> None:
    """End this process as the child ended: with its exit code, or by its signal."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 255)
