"""Preemption notices of each cloud, from a metadata service on the loopback interface."""

import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.node.cloud_notices import MetadataServiceError, notice_reader

NOW = 1_800_000_000.0
SPOT = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"
NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"


class Metadata(http.server.ThreadingHTTPServer):
    """Serves `pages`; like the real services, it refuses requests without the right headers."""

    pages: dict[str, str]
    token = 1

    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Metadata

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200, str(self.server.token))

    def do_GET(self) -> None:
        if self.path.startswith("/latest/"):
            allowed = self.headers["X-aws-ec2-metadata-token"] == str(self.server.token)
            refusal = 401
        elif self.path.startswith("/computeMetadata/"):
            allowed, refusal = self.headers["Metadata-Flavor"] == "Google", 403
        else:
            allowed, refusal = self.headers["Metadata"] == "true", 400
        if not allowed:
            self.answer(refusal)
        elif self.path in self.server.pages:
            self.answer(200, self.server.pages[self.path])
        else:
            self.answer(404)


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    server = Metadata(("127.0.0.1", 0), Handler)
    server.pages = {}
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("HELIOSTAT_METADATA_URL", server.url())
    yield server
    server.shutdown()
    server.server_close()


def at(when: float, form: str) -> str:
    return time.strftime(form, time.gmtime(when))


def spot(when: float) -> str:
    return json.dumps({"action": "terminate", "time": at(when, "%Y-%m-%dT%H:%M:%SZ")})


def test_aws_announces_an_interruption(metadata: Metadata) -> None:
    read_notice = notice_reader("aws")
    assert read_notice() is None
    metadata.token += 1  # the old one has expired
    metadata.pages[SPOT] = spot(NOW + 120)
    notice = read_notice()
    assert notice is not None
    assert notice.description == "spot interruption (terminate)"
    assert notice.deadline == NOW + 120
    assert read_notice() == notice


def test_a_recommendation_of_aws_counts_if_that_is_configured(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_notice = notice_reader("aws")
    metadata.pages[REBALANCE] = json.dumps({"noticeTime": at(NOW, "%Y-%m-%dT%H:%M:%SZ")})
    assert read_notice() is None
    monkeypatch.setenv("HELIOSTAT_REBALANCE_S", "600")
    recommended = read_notice()
    assert recommended is not None
    assert recommended.deadline == NOW + 600
    metadata.pages[SPOT] = spot(NOW + 120)  # now the interruption is certain
    certain = read_notice()
    assert certain is not None
    assert certain.key != recommended.key
    assert certain.deadline == NOW + 120


@pytest.mark.parametrize(
    ("page", "answer", "notice_s"),
    [
        (PREEMPTED, "TRUE", 30),
        (MAINTENANCE, "TERMINATE_ON_HOST_MAINTENANCE", 60),
        (MAINTENANCE, "MIGRATE_ON_HOST_MAINTENANCE", None),
    ],
)
def test_google_announces_preemption_and_maintenance(
    metadata: Metadata, page: str, answer: str, notice_s: float | None
) -> None:
    read_notice = notice_reader("gcp", lambda: NOW)
    metadata.pages |= {PREEMPTED: "FALSE", MAINTENANCE: "NONE"}
    assert read_notice() is None
    metadata.pages[page] = answer
    notice = read_notice()
    assert (notice and notice.deadline - NOW) == notice_s


@pytest.mark.parametrize(
    ("event", "notice_s"),
    [
        ({"EventType": "Preempt"}, 30),
        ({"EventType": "Preempt", "NotBefore": ""}, 0),  # the event has begun
        ({"EventType": "Reboot"}, 30),
        ({"EventType": "Freeze"}, None),
        ({"EventType": "Preempt", "Resources": ["worker-2"]}, None),
    ],
)
def test_azure_announces_scheduled_events(
    metadata: Metadata, event: dict[str, Any], notice_s: float | None
) -> None:
    read_notice = notice_reader("azure", lambda: NOW)
    metadata.pages |= {NAME: "worker-1", EVENTS: json.dumps({"Events": []})}
    assert read_notice() is None
    full_event = {
        "EventId": "A",
        "Resources": ["worker-1", "worker-3"],
        "NotBefore": at(NOW + 30, "%a, %d %b %Y %H:%M:%S GMT"),
        **event,
    }
    metadata.pages[EVENTS] = json.dumps({"Events": [full_event]})
    notice = read_notice()
    assert (notice and notice.deadline - NOW) == notice_s


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
def test_a_service_that_fails_raises_and_gives_no_notice(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch, free_port: int, cloud: str
) -> None:
    metadata.pages |= {SPOT: "{", NAME: "worker-1", EVENTS: "<html>"}
    if cloud != "gcp":
        with pytest.raises(MetadataServiceError, match="cannot read"):
            notice_reader(cloud)()
    monkeypatch.setenv("HELIOSTAT_METADATA_URL", f"http://127.0.0.1:{free_port}")
    with pytest.raises(MetadataServiceError, match="refused"):
        notice_reader(cloud)()
