"""The zygote: a process that answers each request on its socket with a fork of itself.

It only imports; it computes nothing, so that it has no threads and no state that two children
must not share. The session (`session_server`) is one that has Ray's services imported, and forks
a second one that imports torch meanwhile.
"""

import contextlib
import gc
import json
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.zygote.forked_child import become, shadowed_module
from cluster.zygote.handover import receive_request
from cluster.zygote.preload import fork_hazard, preload

POLL_S = 0.5
"""Seconds between looks whether the zygote is to go on."""

logger = logging.getLogger(__name__)


@dataclass
class Child:
    """A forked process that runs."""

    owner: str
    """The Ray that it belongs to; `command` for a command."""
    connection: socket.socket | None
    """To the process for which it stands; None if that has died."""


class Zygote:
    """Forks children for requests `fork` and `command`, until `alive` returns False."""

    def __init__(self, listener: socket.socket) -> None:
        gc.disable()  # a child enables it; here it would go through all modules again and again
        self.children: dict[int, Child] = {}
        self._events = selectors.DefaultSelector()
        self._listener = listener
        listener.setblocking(False)
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self.watch(listener, self._accept)
        self.watch(self._wake, self._reap)

    def watch(self, source: Any, action: Callable[[], None]) -> None:
        """Call `action` whenever `source` is readable."""
        self._events.register(source, selectors.EVENT_READ, action)

    def unwatch(self, source: Any) -> None:
        self._events.unregister(source)

    def serve(
        self, alive: Callable[[], bool], modules: Iterable[str] = (), quiet_s: float = POLL_S
    ) -> None:
        """Answer requests until `alive` returns False.

        Imports `modules`, one whenever there has been no request for `quiet_s` and `may_import`.
        """
        left = list(modules)
        while alive():
            ready = self._events.select(timeout=quiet_s if left else POLL_S)
            for key, _ in ready:
                key.data()
            if left and not ready and self.may_import:
                preload([left.pop(0)])

    @property
    def may_import(self) -> bool:
        """Whether there is time to import what may be needed later.

        Not while a child runs: it would have imported what it needs by then, and needs the cores.
        """
        return not self.children

    def answer(self, request: dict[str, Any], files: list[int], connection: socket.socket) -> None:
        """Do a request; a subclass knows more of them."""
        if request["do"] in ("fork", "command"):
            self._fork(request, files, connection)
        else:
            raise ValueError(f"an unknown request: {request['do']}")

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        # Read when there is something to read: a client that says nothing must not stop others.
        self.watch(connection, lambda: self._receive(connection))

    def _receive(self, connection: socket.socket) -> None:
        self.unwatch(connection)
        if not connection.recv(1, socket.MSG_PEEK):  # it has only looked whether we are here
            connection.close()
            return
        files: list[int] = []
        try:
            _require_same_user(connection)
            request, files = receive_request(connection)
            self.answer(request, files, connection)
        except (OSError, ValueError, KeyError) as error:
            logger.warning("a request was not answered: %s", error)
            connection.close()
        finally:
            for file in files:
                os.close(file)

    def _fork(
        self, request: Mapping[str, Any], files: Sequence[int], connection: socket.socket
    ) -> None:
        preload(request.get("modules", ()))
        shadowed = shadowed_module(request["environment"])
        refusal = f"PYTHONPATH has another {shadowed}" if shadowed else fork_hazard()
        if refusal:
            logger.warning("not forked: %s", refusal)
            tell(connection, {"refused": refusal})
            connection.close()
            return
        began_s = time.perf_counter()
        gc.freeze()  # so that children share the pages of what was imported
        child = os.fork()
        if child == 0:
            become(request, files, connection)
        tell(connection, {"pid": child})
        what = Path(request["program"][0]).name if "program" in request else request["function"]
        logger.info("%d: %s, %.1f ms", child, what, 1e3 * (time.perf_counter() - began_s))
        self.children[child] = Child(request.get("owner", "command"), connection)
        self.watch(connection, lambda: self._lost(child))

    def _lost(self, child: int) -> None:
        """The process for which a child stands has died, and its child dies as it would have."""
        if child not in self.children:  # it ended at the same moment
            return
        self._drop_connection(child)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    def _drop_connection(self, pid: int) -> socket.socket | None:
        child = self.children[pid]
        connection, child.connection = child.connection, None
        if connection is not None:
            self.unwatch(connection)
        return connection

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self.ended(pid, os.waitstatus_to_exitcode(status))

    def ended(self, pid: int, code: int) -> None:
        """A child has ended with an exit code, or a signal as a negative number."""
        if pid not in self.children:
            return
        connection = self._drop_connection(pid)
        del self.children[pid]
        logger.info("%d ended: %d", pid, code)
        if connection is not None:
            tell(connection, {"code": code})  # after the child's own word, if it had one
            connection.close()


def tell(connection: socket.socket, answer: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(answer).encode() + b"\n")


def _require_same_user(connection: socket.socket) -> None:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    user = int.from_bytes(credentials[4:8], "little")
    if user != os.getuid():
        raise ValueError(f"user {user} is not user {os.getuid()}")
