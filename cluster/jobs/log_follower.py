"""What a job prints, as it prints it, over all of its starts, until it has ended.

A line of progress (`cluster.base.terminal.Pulse`) takes the place of the one before it on a terminal,
and is left out elsewhere.
"""

import asyncio
import math
import time
from collections.abc import Callable
from typing import TextIO

import aiohttp

from cluster.base.errors import ClusterError
from cluster.base.terminal import PROGRESS
from cluster.connection.auth_token import authorization
from cluster.connection.job_server_client import call
from cluster.jobs.ray_jobs import (
    HOLD_S,
    RESTARTS,
    Job,
    alive_nodes,
    hold_package,
    known,
    patiently,
    restart_if_lost,
    why_lost,
)

POLL_S = 1.0
CLEAR = "\r\x1b[2K"
"""To the beginning of the terminal's line, which is emptied."""

SILENCE_S = 10
"""After this long without a word, whether the job is still there is asked."""


class LogPrinter:
    """Writes a log to a stream; lines of progress stay in one place of a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._terminal = stream, stream.isatty()
        self._partial, self._progress = "", False

    def write(self, text: str) -> None:
        """Write what the log goes on with; an unfinished line waits for its rest."""
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._line(line)
        self._stream.flush()

    def close(self) -> None:
        """Write the rest, and leave the place of the progress."""
        if self._partial:
            self._line(self._partial)
        if self._progress:
            self._stream.write("\n")
        self._partial, self._progress = "", False
        self._stream.flush()

    def _line(self, line: str) -> None:
        if line.startswith(PROGRESS):
            if self._terminal:
                self._stream.write(CLEAR + line.removeprefix(PROGRESS))
                self._progress = True
            return
        self._stream.write((CLEAR if self._progress else "") + line + "\n")
        self._progress = False


class Follower:
    """Prints what a job prints, over all of its starts; what was printed is not printed again."""

    def __init__(self, name: str, stream: TextIO, tell: Callable[[str], None]) -> None:
        """`tell` is given a line whenever the job is started again."""
        self._name, self._tell = name, tell
        self._printer = LogPrinter(stream)
        self._start = 0
        self._shown = 0
        """Characters of the start `_start` that were printed."""
        self._held = -math.inf

    def follow(self, url: str) -> Job:
        """Print until the job has ended for good; the job as it ended.

        A job whose driver is lost is started again, if nobody else does it. Connections that
        are lost are made again for a minute; then BusyError, and it can be called anew.
        """
        try:
            while True:
                job = known(url, self._name)
                asyncio.run(self._print(url, job))
                self._printer.close()
                newest = known(url, self._name)
                if newest.attempt > job.attempt:
                    continue
                alive = alive_nodes(url)
                again = restart_if_lost(url, newest, alive)
                if again is None:
                    if why_lost(newest, alive):
                        self._tell(f"{self._name}: lost {newest.attempt} times, given up")
                    return newest
                started, reason = again
                number = started.attempt - 1
                self._tell(f"{self._name}: {reason}; started again ({number} of {RESTARTS})")
        finally:
            self._printer.close()

    async def _print(self, url: str, job: Job) -> None:
        """Print one start's log until it has ended, is lost, or there is a newer one."""
        if job.attempt != self._start:
            self._start, self._shown = job.attempt, 0
        while True:
            try:
                await self._tail(url, job)
            except (aiohttp.ClientError, OSError):  # cut, or a log that is not there yet
                await asyncio.sleep(POLL_S)
            if self._over(url, job):
                self._rest(url, job)
                return

    def _rest(self, url: str, job: Job) -> None:
        """Print what a start that is over has printed since its log was cut off."""
        try:
            text = call(url, "GET", f"/api/jobs/{job.id}/logs")["logs"]
        except ClusterError:  # gone with its machine
            return
        self._printer.write(text[self._shown :])
        self._shown = max(self._shown, len(text))

    async def _tail(self, url: str, job: Job) -> None:
        """Print what there is of a start's log beyond what was printed, and what comes."""
        place = f"{url}/api/jobs/{job.id}/logs/tail"
        async with (
            aiohttp.ClientSession(headers=authorization()) as session,
            session.ws_connect(place, heartbeat=20, max_msg_size=0) as socket,
        ):
            count = 0
            while True:
                try:
                    message = await asyncio.wait_for(socket.receive(), SILENCE_S)
                except TimeoutError:
                    if self._over(url, job):
                        return
                    continue
                if message.type != aiohttp.WSMsgType.TEXT:
                    return
                self._printer.write(message.data[max(0, self._shown - count) :])
                count += len(message.data)
                self._shown = max(self._shown, count)

    def _over(self, url: str, job: Job) -> bool:
        """Whether nothing more can come from this start."""
        if time.monotonic() > self._held + HOLD_S:
            hold_package(url, job.package)
            self._held = time.monotonic()
        newest = known(url, job.name)
        over = newest.ended or newest.attempt > job.attempt
        return over or why_lost(newest, alive_nodes(url)) is not None


def log_of(url: str, job: Job) -> str:
    """All that the newest start of a job has printed, without its lines of progress."""
    answer = patiently(lambda: call(url, "GET", f"/api/jobs/{job.id}/logs"))
    lines = answer["logs"].split("\n")
    return "\n".join(line for line in lines if not line.startswith(PROGRESS))
