"""Answers and failures of a job server; tests/rack asks a real one."""

import http.server
import threading
from collections.abc import Iterator

import pytest

from cluster.base.errors import ClusterError, SpecError
from cluster.connection.job_server_client import (
    JobExistsError,
    NotFoundError,
    ServerBusyError,
    call_api,
    dashboard_url,
)


class Answering(http.server.BaseHTTPRequestHandler):
    """A server that answers with the status and the text that the path contains."""

    def do_GET(self) -> None:
        code, _, text = self.path.strip("/").partition("/")
        self.send_response(int(code))
        self.send_header("Content-Type", "application/json" if code == "200" else "text/plain")
        self.end_headers()
        self.wfile.write(text.replace("%20", " ").replace("%0A", "\n").encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("answer", "kind", "line"),
    [
        ("401", ClusterError, "asks for the cluster's token; there is none in ~/.ray/auth_token"),
        ("403", ClusterError, "refuses the token of ~/.ray/auth_token"),
        ("404/no%20such%20job", NotFoundError, ": no such job$"),
        (
            "500/Traceback%0AValueError:%20x%20already%20exists",
            JobExistsError,
            "of that name is there",
        ),
        ("500/Traceback%0AValueError:%20no%20agent", ServerBusyError, ": ValueError: no agent$"),
        ("400", ClusterError, ": HTTP 400$"),
        ("200/[1", ServerBusyError, "cannot reach the cluster at "),
    ],
)
def test_a_failure_says_what_to_do(
    server: str, answer: str, kind: type[ClusterError], line: str
) -> None:
    with pytest.raises(ClusterError, match=line) as raised:
        call_api(server, "GET", f"/{answer}")
    assert type(raised.value) is kind


def test_a_json_answer_is_parsed(server: str) -> None:
    assert call_api(server, "GET", "/200/[1]") == [1]


def test_a_server_that_is_not_there_is_busy() -> None:
    with pytest.raises(ServerBusyError, match=r"at http://127\.0\.0\.1:9: "):
        call_api("http://127.0.0.1:9", "GET", "/")


def test_the_dashboard_comes_from_an_option_a_variable_or_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert dashboard_url(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265/")
    assert dashboard_url(None) == "http://head:8265"
    assert dashboard_url("https://other") == "https://other"
    with pytest.raises(SpecError, match="--address ray://head:10001: must be the dashboard's"):
        dashboard_url("ray://head:10001")
