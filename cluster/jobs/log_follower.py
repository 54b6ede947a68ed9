"""The log of a job, printed as it grows and over all attempts, until the job has ended.

A progress line (`cluster.base.terminal.JobProgress`) replaces the one before it on a terminal,
and is left out everywhere else.
"""

import asyncio
import math
import time
from collections.abc import Callable
from typing import TextIO

import aiohttp

from cluster.base.errors import ClusterError
from cluster.base.terminal import PROGRESS_PREFIX
from cluster.connection.auth_token import auth_headers
from cluster.connection.job_server_client import call_api, retry_while_busy
from cluster.jobs.job import Job, lost_reason
from cluster.jobs.job_supervisor import MAX_RESTARTS, restart_if_lost
from cluster.jobs.ray_jobs import PIN_INTERVAL_S, alive_node_ids, get_job, pin_package

RECONNECT_S = 1.0
CLEAR_LINE = "\r\x1b[2K"
"""Move to the beginning of the terminal's line, and empty it."""

SILENCE_TIMEOUT_S = 10
"""After so many seconds without output, the state of the job is checked."""


class LogPrinter:
    """Writes a log to a stream; on a terminal, progress lines overwrite one another."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._terminal = stream, stream.isatty()
        self._partial, self._progress = "", False

    def write(self, text: str) -> None:
        """Write the next part of the log; an unfinished line is held back until it is complete."""
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._line(line)
        self._stream.flush()

    def close(self) -> None:
        """Write an unfinished line, and end the line of the progress."""
        if self._partial:
            self._line(self._partial)
        if self._progress:
            self._stream.write("\n")
        self._partial, self._progress = "", False
        self._stream.flush()

    def _line(self, line: str) -> None:
        if line.startswith(PROGRESS_PREFIX):
            if self._terminal:
                self._stream.write(CLEAR_LINE + line.removeprefix(PROGRESS_PREFIX))
                self._progress = True
            return
        self._stream.write((CLEAR_LINE if self._progress else "") + line + "\n")
        self._progress = False


class LogFollower:
    """Prints the log of a job over all its attempts, each part once."""

    def __init__(self, name: str, stream: TextIO, log_line: Callable[[str], None]) -> None:
        """`log_line` gets a line when the job is started again, or given up."""
        self._name, self._log_line = name, log_line
        self._printer = LogPrinter(stream)
        self._attempt = 0
        self._printed_chars = 0
        """Characters of the log of `_attempt` that were printed."""
        self._pinned_s = -math.inf
        """Monotonic time at which the package was last pinned."""

    def follow(self, url: str) -> Job:
        """Print until the job has ended for good; the job at its end.

        A job whose driver is lost is started again, unless another process does it. Lost
        connections are opened again for a minute. Then ServerBusyError is raised, after which
        this may be called again.
        """
        try:
            while True:
                job = get_job(url, self._name)
                asyncio.run(self._print_attempt(url, job))
                self._printer.close()
                latest = get_job(url, self._name)
                if latest.attempt > job.attempt:
                    continue
                alive = alive_node_ids(url)
                restarted = restart_if_lost(url, latest, alive)
                if restarted is None:
                    if lost_reason(latest, alive):
                        self._log_line(f"{self._name}: lost {latest.attempt} times, given up")
                    return latest
                job, reason = restarted
                count = f"{job.attempt - 1} of {MAX_RESTARTS}"
                self._log_line(f"{self._name}: {reason}; started again ({count})")
        finally:
            self._printer.close()

    async def _print_attempt(self, url: str, job: Job) -> None:
        """Print the log of an attempt until it has ended, is lost, or a newer one has begun."""
        if job.attempt != self._attempt:
            self._attempt, self._printed_chars = job.attempt, 0
        while True:
            try:
                await self._tail(url, job)
            except (aiohttp.ClientError, OSError):  # cut off, or the log does not exist yet
                await asyncio.sleep(RECONNECT_S)
            if self._attempt_is_over(url, job):
                self._print_rest(url, job)
                return

    def _print_rest(self, url: str, job: Job) -> None:
        """Print the end of an attempt's log, after the connection to it has been lost."""
        try:
            text = call_api(url, "GET", f"/api/jobs/{job.submission_id}/logs")["logs"]
        except ClusterError:  # it was lost with its machine
            return
        self._printer.write(text[self._printed_chars :])
        self._printed_chars = max(self._printed_chars, len(text))

    async def _tail(self, url: str, job: Job) -> None:
        """Print an attempt's log from where printing stopped, and go on while it grows."""
        tail_url = f"{url}/api/jobs/{job.submission_id}/logs/tail"
        async with (
            aiohttp.ClientSession(headers=auth_headers()) as session,
            session.ws_connect(tail_url, heartbeat=20, max_msg_size=0) as socket,
        ):
            received_chars = 0  # the socket sends the log from its beginning
            while True:
                try:
                    message = await asyncio.wait_for(socket.receive(), SILENCE_TIMEOUT_S)
                except TimeoutError:
                    if self._attempt_is_over(url, job):
                        return
                    continue
                if message.type != aiohttp.WSMsgType.TEXT:
                    return
                already_printed = max(0, self._printed_chars - received_chars)
                self._printer.write(message.data[already_printed:])
                received_chars += len(message.data)
                self._printed_chars = max(self._printed_chars, received_chars)

    def _attempt_is_over(self, url: str, job: Job) -> bool:
        """Whether the log of this attempt cannot grow any more."""
        if time.monotonic() > self._pinned_s + PIN_INTERVAL_S:
            pin_package(url, job.package)
            self._pinned_s = time.monotonic()
        latest = get_job(url, job.name)
        if latest.ended or latest.attempt > job.attempt:
            return True
        return lost_reason(latest, alive_node_ids(url)) is not None


def read_log(url: str, job: Job) -> str:
    """The whole log of a job's latest attempt, without progress lines."""
    path = f"/api/jobs/{job.submission_id}/logs"
    answer = retry_while_busy(lambda: call_api(url, "GET", path))
    lines = answer["logs"].split("\n")
    return "\n".join(line for line in lines if not line.startswith(PROGRESS_PREFIX))
