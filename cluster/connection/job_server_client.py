"""Ray's job server over HTTP, with the cluster's token and errors that say what to do.

With the standard library alone: Ray's own client imports Ray, which takes seconds, and what
watches jobs on the head is to be small.
"""

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from cluster.base.errors import ClusterError, SpecError
from cluster.connection.auth_token import auth_headers

LOCAL_DASHBOARD_URL = "http://127.0.0.1:8265"
"""Where Ray's dashboard is, when nobody says otherwise."""


class NotFoundError(ClusterError):
    """The job server has nothing of that name."""


class JobExistsError(ClusterError):
    """A job with that submission id is there."""


class ServerBusyError(ClusterError):
    """The job server could not do it just now; asking again may help."""


def dashboard_url(address: str | None) -> str:
    """The URL of a cluster's dashboard: `address`, else RAY_ADDRESS, else this machine's."""
    url = address or os.environ.get("RAY_ADDRESS") or LOCAL_DASHBOARD_URL
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        where = "--address" if address else "RAY_ADDRESS"
        raise SpecError(
            f"{where} {url}: must be the dashboard's URL, such as {LOCAL_DASHBOARD_URL}; "
            "--cluster cluster.yaml opens a way to it"
        )
    return url.rstrip("/")


def call_api(
    url: str, method: str, path: str, data: Any = None, body: bytes = b"", timeout_s: float = 60
) -> Any:
    """The answer to a request, as data where it is JSON; `data` is sent as JSON, or `body` as is.

    Raises NotFoundError for 404, BusyError for what is worth trying again, and ClusterError
    otherwise.
    """
    sent = json.dumps(data).encode() if data is not None else body
    kind = "application/json" if data is not None else "application/octet-stream"
    request = urllib.request.Request(
        url + path,
        data=sent if method in ("POST", "PUT") else None,
        headers={**auth_headers(), "Content-Type": kind},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            text = answer.read().decode()
            return json.loads(text) if "json" in answer.headers.get_content_type() else text
    except urllib.error.HTTPError as error:
        raise _error_for(url, error.code, error.read().decode(errors="replace")) from None
    except (OSError, ValueError) as error:  # refused, reset, timed out, cut in mid-answer
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
        return ClusterError(f"{url} refuses the token of ~/.ray/auth_token; it is another one's")
    reason = lines[-1] if lines else f"HTTP {code}"  # the last line of a traceback
    if code == 404:
        return NotFoundError(f"{url}: {reason}")
    if "already exists" in text:  # a ValueError on the head, told as a traceback
        return JobExistsError(f"{url}: a job of that name is there")
    # The agents of a cluster under load answer late, and Ray says so with a 500.
    return ServerBusyError(f"{url}: {reason}") if code >= 500 else ClusterError(f"{url}: {reason}")
