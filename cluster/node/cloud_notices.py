"""Preemption notices from the metadata services of AWS, Google Cloud and Azure.

Each cloud serves them at a link-local address that only the machine itself can reach;
HELIOSTAT_METADATA_URL replaces it. Standard library only, since this runs on every node all the
time.
"""

import calendar
import http.client
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 2.0
REBALANCE_VAR = "HELIOSTAT_REBALANCE_S"
"""Environment variable: seconds after which a node is to be empty when AWS recommends to rebalance.
Without it the recommendation is ignored."""
TOKEN_LIFETIME_S = 6 * 3600
GCP_PREEMPTION_NOTICE_S = 30
"""Notice that Google gives before a preemption.
https://docs.cloud.google.com/compute/docs/instances/spot"""
GCP_MAINTENANCE_NOTICE_S = 60
"""Shortest notice that Google gives before maintenance; machines with GPUs get an hour.
https://docs.cloud.google.com/compute/docs/metadata/getting-live-migration-notice"""
AZURE_TERMINAL_EVENTS = ("Preempt", "Terminate", "Reboot", "Redeploy")
"""Azure's scheduled events that end the processes of a machine; `Freeze` only pauses them.
https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events"""


@dataclass(frozen=True)
class Notice:
    """This machine will be taken away."""

    key: str
    """Identifies the event, however often it is read."""
    description: str
    """For the log."""
    deadline: float
    """Unix time until which the machine is guaranteed."""


class MetadataServiceError(Exception):
    """The metadata service cannot be reached, or its answer cannot be understood."""


NoticeReader = Callable[[], Notice | None]
"""Asks the metadata service once; raises MetadataServiceError."""


def notice_reader(cloud: str, now: Callable[[], float] = time.time) -> NoticeReader:
    """A function that asks `cloud` (aws, gcp or azure) for a notice for this machine."""
    return {"aws": _Aws, "gcp": _Gcp, "azure": _Azure}[cloud](now).read_notice


class _Metadata:
    """The metadata service of one cloud."""

    default = "http://169.254.169.254"

    def __init__(self, now: Callable[[], float]) -> None:
        url = urlsplit(os.environ.get("HELIOSTAT_METADATA_URL") or self.default)
        self._host, self._port = url.hostname or "", url.port or 80
        self._now = now

    def ask(self, path: str, headers: Mapping[str, str], method: str = "GET") -> tuple[int, str]:
        """The status and the body of an answer."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
        try:
            connection.request(method, path, headers=dict(headers))
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace").strip()
        except (OSError, http.client.HTTPException) as error:
            raise MetadataServiceError(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str]) -> str | None:
        """The body of an answer, or None for status 404."""
        status, body = self.ask(path, headers)
        if status == 404:
            return None
        if status != 200:
            raise MetadataServiceError(f"{path} answers {status}")
        return body

    def read_notice(self) -> Notice | None:
        raise NotImplementedError


class _Aws(_Metadata):
    """Version 2 of the instance metadata service, which asks for a token.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    """

    _token = ""

    def read_notice(self) -> Notice | None:
        answer = self._get("/latest/meta-data/spot/instance-action")
        if answer is not None:
            action, deadline = _parse(answer, _parse_interruption)
            return Notice(f"spot {deadline}", f"spot interruption ({action})", deadline)
        within_s = os.environ.get(REBALANCE_VAR)
        if not within_s:
            return None
        answer = self._get("/latest/meta-data/events/recommendations/rebalance")
        if answer is None:
            return None
        noticed_s = _parse(answer, lambda text: _parse_utc(json.loads(text)["noticeTime"]))
        description = "a raised risk of spot interruption (rebalance recommendation)"
        return Notice(f"rebalance {noticed_s}", description, noticed_s + float(within_s))

    def _get(self, path: str) -> str | None:
        for _ in range(2):  # the token may have expired
            if not self._token:
                headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_LIFETIME_S)}
                status, self._token = self.ask("/latest/api/token", headers, "PUT")
                if status != 200:
                    self._token = ""
                    raise MetadataServiceError(f"/latest/api/token answers {status}")
            status, body = self.ask(path, {"X-aws-ec2-metadata-token": self._token})
            if status != 401:
                break
            self._token = ""
        if status == 404:
            return None
        if status != 200:
            raise MetadataServiceError(f"{path} answers {status}")
        return body


class _Gcp(_Metadata):
    """Preemptions and maintenance events of Compute Engine."""

    default = "http://metadata.google.internal"

    def read_notice(self) -> Notice | None:
        headers, instance = {"Metadata-Flavor": "Google"}, "/computeMetadata/v1/instance"
        now = self._now()
        if self.get(f"{instance}/preempted", headers) == "TRUE":
            return Notice("preempted", "preemption", now + GCP_PREEMPTION_NOTICE_S)
        if self.get(f"{instance}/maintenance-event", headers) == "TERMINATE_ON_HOST_MAINTENANCE":
            description = "maintenance of its host, for which it is stopped"
            return Notice("maintenance", description, now + GCP_MAINTENANCE_NOTICE_S)
        return None


class _Azure(_Metadata):
    """Scheduled events of Azure's instance metadata service."""

    _name: str | None = None

    def read_notice(self) -> Notice | None:
        headers = {"Metadata": "true"}
        if self._name is None:
            path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._name = self.get(path, headers)
        answer = self.get("/metadata/scheduledevents?api-version=2020-07-01", headers) or "{}"
        for event in _parse(answer, lambda text: json.loads(text).get("Events", [])):
            # A machine also gets the events of the other machines in its availability set.
            if event["EventType"] in AZURE_TERMINAL_EVENTS and self._name in event["Resources"]:
                return self._notice(event)
        return None

    def _notice(self, event: Mapping[str, Any]) -> Notice:
        when = event.get("NotBefore")  # empty once the event has begun
        deadline = self._now()
        if when:
            deadline = _parse(when, lambda text: parsedate_to_datetime(text).timestamp())
        return Notice(event["EventId"], f"{event['EventType'].lower()} event", deadline)


def _parse_interruption(text: str) -> tuple[str, float]:
    interruption = json.loads(text)
    return interruption["action"], _parse_utc(interruption["time"])


def _parse_utc(text: str) -> float:
    """The Unix time of `2026-11-22T08:22:00Z`."""
    return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))


def _parse(text: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MetadataServiceError(f"cannot read {text[:80]!r}") from error
