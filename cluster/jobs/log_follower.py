"""What a job prints, as it prints it, over all of its starts, until it has ended.

A line of progress (`cluster.base.terminal.JobProgress`) takes the place of the one before it on a terminal,
and is left out elsewhere.
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
from cluster.connection.job_server_client import call_api
from cluster.jobs.ray_jobs import (
    MAX_RESTARTS,
    PIN_INTERVAL_S,
    Job,
    alive_node_ids,
    get_job,
    lost_reason,
    pin_package,
    restart_if_lost,
    retry_while_busy,
)

POLL_S = 1.0
CLEAR_LINE = "\r\x1b[2K"
"""To the beginning of the terminal's line, which is emptied."""

SILENCE_TIMEOUT_S = 10
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
        if line.startswith(PROGRESS_PREFIX):
            if self._terminal:
                self._stream.write(CLEAR_LINE + line.removeprefix(PROGRESS_PREFIX))
                self._progress = True
            return
        self._stream.write((CLEAR_LINE if self._progress else "") + line + "\n")
        self._progress = False


class LogFollower:
    """Prints what a job prints, over all of its starts; what was printed is not printed again."""

    def __init__(self, name: str, stream: TextIO, log_line: Callable[[str], None]) -> None:
        """`tell` is given a line whenever the job is started again."""
        self._name, self._log_line = name, log_line
        self._printer = LogPrinter(stream)
        self._attempt = 0
        self._printed_chars = 0
        """Characters of the start `_start` that were printed."""
        self._pinned_s = -math.inf

    def follow(self, url: str) -> Job:
        """Print until the job has ended for good; the job as it ended.

        A job whose driver is lost is started again, if nobody else does it. Connections that
        are lost are made again for a minute; then BusyError, and it can be called anew.
        """
        try:
            while True:
                job = get_job(url, self._name)
                asyncio.run(self._print_attempt(url, job))
                self._printer.close()
                newest = get_job(url, self._name)
                if newest.attempt > job.attempt:
                    continue
                alive = alive_node_ids(url)
                again = restart_if_lost(url, newest, alive)
                if again is None:
                    if lost_reason(newest, alive):
                        self._log_line(f"{self._name}: lost {newest.attempt} times, given up")
                    return newest
                started, reason = again
                number = started.attempt - 1
                self._log_line(
                    f"{self._name}: {reason}; started again ({number} of {MAX_RESTARTS})"
                )
        finally:
            self._printer.close()

    async def _print_attempt(self, url: str, job: Job) -> None:
        """Print one start's log until it has ended, is lost, or there is a newer one."""
        if job.attempt != self._attempt:
            self._attempt, self._printed_chars = job.attempt, 0
        while True:
            try:
                await self._tail(url, job)
            except (aiohttp.ClientError, OSError):  # cut, or a log that is not there yet
                await asyncio.sleep(POLL_S)
            if self._attempt_is_over(url, job):
                self._print_rest(url, job)
                return

    def _print_rest(self, url: str, job: Job) -> None:
        """Print what a start that is over has printed since its log was cut off."""
        try:
            text = call_api(url, "GET", f"/api/jobs/{job.submission_id}/logs")["logs"]
        except ClusterError:  # gone with its machine
            return
        self._printer.write(text[self._printed_chars :])
        self._printed_chars = max(self._printed_chars, len(text))

    async def _tail(self, url: str, job: Job) -> None:
        """Print what there is of a start's log beyond what was printed, and what comes."""
        place = f"{url}/api/jobs/{job.submission_id}/logs/tail"
        async with (
            aiohttp.ClientSession(headers=auth_headers()) as session,
            session.ws_connect(place, heartbeat=20, max_msg_size=0) as socket,
        ):
            count = 0
            while True:
                try:
                    message = await asyncio.wait_for(socket.receive(), SILENCE_TIMEOUT_S)
                except TimeoutError:
                    if self._attempt_is_over(url, job):
                        return
                    continue
                if message.type != aiohttp.WSMsgType.TEXT:
                    return
                self._printer.write(message.data[max(0, self._printed_chars - count) :])
                count += len(message.data)
                self._printed_chars = max(self._printed_chars, count)

    def _attempt_is_over(self, url: str, job: Job) -> bool:
        """Whether nothing more can come from this start."""
        if time.monotonic() > self._pinned_s + PIN_INTERVAL_S:
            pin_package(url, job.package)
            self._pinned_s = time.monotonic()
        newest = get_job(url, job.name)
        over = newest.ended or newest.attempt > job.attempt
        return over or lost_reason(newest, alive_node_ids(url)) is not None


def read_log(url: str, job: Job) -> str:
    """All that the newest start of a job has printed, without its lines of progress."""
    answer = retry_while_busy(lambda: call_api(url, "GET", f"/api/jobs/{job.submission_id}/logs"))
    lines = answer["logs"].split("\n")
    return "\n".join(line for line in lines if not line.startswith(PROGRESS_PREFIX))
