"""The session's own process: it forks Ray's services, keeps the warm Ray, and ends when idle.

    python -P -m cluster.session.session_server FOLDER RAY_LISTENER WORKER_LISTENER ALIVE

FOLDER is the session's; the numbers are sockets that listen already, and a locked file. Clients
tell by an open connection that they use the session: a command for as long as it runs, the driver
of a run for as long as it needs the warm Ray. When nothing has used it for `keep_warm_s`, it ends
all that is its own, and itself.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from cluster.connection.ray_internals import FORKED_RAY_SETTINGS
from cluster.session.warm_ray import hold_ray
from cluster.zygote.handover import open_files
from cluster.zygote.preload import (
    COMMAND_MODULES,
    LATER_MODULES,
    RAY_MODULES,
    name_process,
    preload,
)
from cluster.zygote.zygote import Child, Zygote, tell

KEEP_WARM_S = 600.0
END_TIMEOUT_S = 15.0
"""The warm Ray ends within this time, or is killed."""

logger = logging.getLogger(__name__)


class SessionServer(Zygote):
    """A zygote for Ray's services that also answers `use`, `ray`, `status` and `end`."""

    def __init__(
        self, folder: Path, listener: socket.socket, workers: socket.socket, alive: int
    ) -> None:
        super().__init__(listener)
        self._folder = folder
        self._alive = alive
        """The descriptor of a locked file, which all processes of the session keep open."""
        self._workers_listener = workers
        self._users: dict[socket.socket, bool] = {}
        """The connections of clients, and whether each of them uses the warm Ray."""
        self._keep_warm_s = KEEP_WARM_S
        self._idle_since_s = time.monotonic()
        self._ending = False
        self._ray_pid: int | None = None
        self._ray_control: socket.socket | None = None
        self._ray_address: str | None = None
        self._waiting: list[socket.socket] = []
        """Clients that wait for the warm Ray to start, or to be found clean."""
        self._checking = False
        self._worker_zygote = self._fork_worker_zygote()

    @property
    def in_use(self) -> bool:
        """Whether a client uses the session, or another Ray than the warm one has processes."""
        owners = {child.owner for child in self.children.values()}
        return bool(self._users or owners - {self._owner})

    @property
    def alive(self) -> bool:
        if self._ending:
            return False
        if self.in_use:
            self._idle_since_s = time.monotonic()
        return time.monotonic() < self._idle_since_s + self._keep_warm_s

    @property
    def _owner(self) -> str:
        return f"ray-{self._ray_pid}"

    def answer(self, request: dict[str, Any], files: list[int], connection: socket.socket) -> None:
        match request["do"]:
            case "use":
                self._add_user(connection)
                if request["ray"] and self._ray_pid is None:
                    self._start_ray()
            case "ray":
                self._add_user(connection)
                self._lease_ray(connection)
            case "status":
                tell(connection, self._status())
                connection.close()
            case "end":
                self._ending = not self.in_use
                tell(connection, {"in_use": self.in_use, "pid": os.getpid()})
                connection.close()
            case _:
                super().answer(request, files, connection)

    @property
    def may_import(self) -> bool:
        """At once: Ray's services wait for it."""
        return True

    def serve_from_start(self) -> None:
        """Begin with the requests that wait, since Ray starts while its services are imported."""
        passes = iter([True])
        self.serve(lambda: next(passes, False))
        self.serve(lambda: self.alive, RAY_MODULES, quiet_s=0)

    def _status(self) -> dict[str, Any]:
        idle_s = 0.0 if self.in_use else time.monotonic() - self._idle_since_s
        return {
            "pid": os.getpid(),
            "worker_zygote": self._worker_zygote,
            "in_use": self.in_use,
            "ray": self._ray_address,
            "ray_pid": self._ray_pid,
            "ends_in_s": self._keep_warm_s - idle_s,
        }

    def _add_user(self, connection: socket.socket) -> None:
        self._users[connection] = False
        self.watch(connection, lambda: self._read_user(connection))

    def _read_user(self, connection: socket.socket) -> None:
        """A client says how long to stay warm after it, or has gone."""
        try:
            said = connection.recv(4096)
        except OSError:
            said = b""
        for line in said.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self._keep_warm_s = float(json.loads(line)["keep_warm_s"])
        if said:
            return
        self.unwatch(connection)
        connection.close()
        used_ray = self._users.pop(connection)
        if connection in self._waiting:
            self._waiting.remove(connection)
        if used_ray and not any(self._users.values()) and self._ray_control is not None:
            self._checking = True
            with contextlib.suppress(OSError):
                self._ray_control.sendall(b"check\n")

    def _lease_ray(self, connection: socket.socket) -> None:
        if self._ray_address is not None and not self._checking:
            self._users[connection] = True
            tell(connection, {"address": self._ray_address, "owner": self._owner})
            return
        self._waiting.append(connection)
        if self._ray_pid is None:
            self._start_ray()

    def _start_ray(self) -> None:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            close_all_but(theirs.fileno(), self._alive)
            hold_ray(self._folder, theirs)
        theirs.close()
        self._ray_pid, self._ray_control = pid, ours
        self._ray_address, self._checking = None, False
        self.watch(ours, self._read_ray)

    def _read_ray(self) -> None:
        """The process that holds the warm Ray has started it, found it clean, or has ended."""
        assert self._ray_control is not None
        said = self._ray_control.recv(4096)
        if not said:
            self._drop_ray("the session's Ray has ended")
            return
        for line in said.splitlines():
            word = json.loads(line)
            if "error" in word:
                self._drop_ray(word["error"])
                return
            self._ray_address = word.get("address", self._ray_address)
            self._checking = False
        waiting, self._waiting = self._waiting, []
        for connection in waiting:
            self._lease_ray(connection)

    def _drop_ray(self, why: str) -> None:
        """Forget the warm Ray. Who waits while it ends after another command gets a new one."""
        assert self._ray_control is not None
        logger.warning("%s", why)
        was_used = self._ray_address is not None
        self.unwatch(self._ray_control)
        self._ray_control.close()
        self._ray_pid = self._ray_control = self._ray_address = None
        self._checking = False
        waiting, self._waiting = self._waiting, []
        for connection in waiting:
            if was_used:
                self._lease_ray(connection)
            else:
                tell(connection, {"error": why})

    def _fork_worker_zygote(self) -> int:
        """Fork the zygote that has torch imported; it ends when this process does."""
        session = os.getpid()
        pid = os.fork()
        if pid == 0:
            close_all_but(self._workers_listener.fileno(), self._alive)
            name_process("session-zygote")
            zygote = Zygote(self._workers_listener)
            preload(COMMAND_MODULES)
            zygote.serve(lambda: os.getppid() == session or bool(zygote.children), LATER_MODULES)
            os._exit(0)
        return pid

    def ended(self, pid: int, code: int) -> None:
        if pid == self._worker_zygote and not self._ending:
            logger.warning("the zygote of the workers ended: %d", code)
            self._worker_zygote = self._fork_worker_zygote()
        super().ended(pid, code)

    def end(self) -> None:
        """End the warm Ray and all children, and remove the folder's files."""
        if self._ray_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._ray_pid, signal.SIGTERM)
            deadline_s = time.monotonic() + END_TIMEOUT_S
            self.children[self._ray_pid] = Child(self._owner, None)
            self.serve(lambda: bool(self.children) and time.monotonic() < deadline_s)
        for pid in [*self.children, self._worker_zygote]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def close_all_but(*kept: int) -> None:
    """In a forked child: close all but these files, the log and the standard streams."""
    logs = {handler.stream.fileno() for handler in logging.root.handlers}  # type: ignore[attr-defined]
    for number in open_files():
        if number > 2 and number not in {*kept, *logs}:
            with contextlib.suppress(OSError):
                os.close(number)


def main() -> None:
    folder = Path(sys.argv[1])
    listener, workers, alive = map(int, sys.argv[2:])
    logging.basicConfig(
        filename=folder / "log",
        level=logging.INFO,
        format="%(asctime)s %(process)d %(message)s",
    )
    name_process("session")
    os.environ.update(FORKED_RAY_SETTINGS)  # one of them is read when Ray's services are imported
    # Ray's C++ part reads these two once, when it is imported, and keeps them for good.
    os.environ.update(RAY_JOB_ID="ffffffff", RAY_RAYLET_PID="1")
    preload(["ray"])
    del os.environ["RAY_JOB_ID"], os.environ["RAY_RAYLET_PID"]
    server = SessionServer(
        folder, socket.socket(fileno=listener), socket.socket(fileno=workers), alive
    )
    server.serve_from_start()
    server.end()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
