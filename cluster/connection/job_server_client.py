"""HTTP requests to Ray's dashboard and its job server, with errors that say what to do.

It uses the standard library alone. Ray's own client imports Ray, which takes seconds, and the
supervisor that watches jobs on the head must stay small.
"""

import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

from cluster.base.errors import ClusterError, SpecError
from cluster.connection.auth_token import auth_headers
from cluster.connection.ray_internals import JOB_EXISTS_MESSAGE

LOCAL_DASHBOARD_URL = "http://127.0.0.1:8265"
"""The default address of Ray's dashboard."""

BUSY_TIMEOUT_S = 60
"""How long requests to a busy job server are repeated."""

T = TypeVar("T")


class NotFoundError(ClusterError):
    """The job server does not know this name (HTTP 404)."""


class JobExistsError(ClusterError):
    """The submission id is taken."""


class ServerBusyError(ClusterError):
    """The job server was not reached or failed for now; the request may be repeated."""


def dashboard_url(address: str | None) -> str:
    """The URL of a cluster's dashboard: `address`, else RAY_ADDRESS, else this machine's."""
    url = address or os.environ.get("RAY_ADDRESS") or LOCAL_DASHBOARD_URL
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        source = "--address" if address else "RAY_ADDRESS"
        raise SpecError(
            f"{source} {url}: must be the dashboard's URL, such as {LOCAL_DASHBOARD_URL}; "
            "--cluster cluster.yaml opens a tunnel to it"
        )
    return url.rstrip("/")


def call_api(
    url: str, method: str, path: str, data: Any = None, body: bytes = b"", timeout_s: float = 60
) -> Any:
    """Send a request; return the parsed answer if it is JSON, otherwise its text.

    `data` is sent as JSON, `body` as it is. Raises NotFoundError for status 404, ServerBusyError
    for a failure that is worth another attempt, and ClusterError for any other.
    """
    content = json.dumps(data).encode() if data is not None else body
    content_type = "application/json" if data is not None else "application/octet-stream"
    request = urllib.request.Request(
        url + path,
        data=content if method in ("POST", "PUT") else None,
        headers={**auth_headers(), "Content-Type": content_type},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            text = answer.read().decode()
            return json.loads(text) if "json" in answer.headers.get_content_type() else text
    except urllib.error.HTTPError as error:
        raise _error_for(url, error.code, error.read().decode(errors="replace")) from None
    except (OSError, ValueError) as error:  # refused, reset, timed out, or cut off halfway
        reason = getattr(error, "reason", error)
        raise ServerBusyError(f"cannot reach the cluster at {url}: {reason}") from None


def _error_for(url: str, code: int, text: str) -> ClusterError:
    lines = text.strip().splitlines()
    if code == 401:
        return ClusterError(
            f"{url} asks for the cluster's token; there is none in ~/.ray/auth_token "
            "or RAY_AUTH_TOKEN"
        )
    if code == 403:
        return ClusterError(
            f"{url} refuses the token of ~/.ray/auth_token; it belongs to another cluster"
        )
    reason = lines[-1] if lines else f"HTTP {code}"  # the last line of a traceback
    if code == 404:
        return NotFoundError(f"{url}: {reason}")
    if JOB_EXISTS_MESSAGE in text:  # a ValueError on the head, sent as a traceback with status 500
        return JobExistsError(f"{url}: a job of that name is there")
    # The agents of a loaded cluster answer late, which Ray reports with status 500.
    return ServerBusyError(f"{url}: {reason}") if code >= 500 else ClusterError(f"{url}: {reason}")


def retry_while_busy(request: Callable[[], T], timeout_s: float = BUSY_TIMEOUT_S) -> T:
    """Call `request` again, with growing pauses, while it raises ServerBusyError.

    After `timeout_s` the error is raised. urllib3's `Retry` decides by the HTTP status, and a
    submission id that is taken has the same status as a busy agent.
    """
    deadline, pause_s = time.monotonic() + timeout_s, 0.2
    while True:
        try:
            return request()
        except ServerBusyError:
            if time.monotonic() > deadline:
                raise
        time.sleep(pause_s)
        pause_s = min(5.0, pause_s * 1.5)
