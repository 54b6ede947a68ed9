"""MLflow is checked before a run: mistakes end it, a server that is away does not."""

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from cluster.base.errors import SpecError
from trainers.runs import session
from trainers.spec import RunSpec, resolve
from trainers.tracking.mlflow_internals import schema_heads
from trainers.tracking.preflight import artifact_problem, check_access, notices


class Answer(BaseHTTPRequestHandler):
    """Answers with the status that the experiment's name asks for; accepts the login `me:it`."""

    version = "3.17.2"
    location = "mlflow-artifacts:/7"

    def do_GET(self) -> None:
        if self.path == "/version":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.version.encode())
            return
        code = int(self.path.rpartition("=")[2])
        if code == 401 and self.headers["Authorization"] == "Basic bWU6aXQ=":
            code = 200
        experiment = {"experiment_id": "7", "lifecycle_stage": "active"}
        body = json.dumps(
            {"experiment": experiment | {"artifact_location": self.location}}
        ).encode()
        if code == 404:
            body = b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}'
        if code == 410:
            code, body = 200, body.replace(b"active", b"deleted")
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body if code in (200, 404) else b"No.\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_answers_of_a_server(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert check_access(server, "200") is None
    assert check_access(server, "404") is None, "an experiment that does not exist yet"
    for code in ("401", "403"):
        with pytest.raises(
            SpecError, match=rf"^tracking.uri: {server} refuses access \({code}: No.\)"
        ):
            check_access(server, code)
    for code in ("429", "500"):
        assert f"answers {code}; training begins" in (check_access(server, code) or "")
    with pytest.raises(SpecError, match="mlflow experiments restore --experiment-id 7"):
        check_access(server, "410")
    (tmp_path / ".mlflow").mkdir()
    credentials = "[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = {}\n"
    (tmp_path / ".mlflow" / "credentials").write_text(credentials.format("wrong"))
    with pytest.raises(SpecError, match="401"):
        check_access(server, "401")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "it")
    assert check_access(server, "401") is None


def test_wrong_credentials_end_a_run_before_ray_is_started(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = {"uri": server, "experiment": "401"}
    spec, _ = resolve({"workload": "vision", "tracking": tracking}, RunSpec)
    started: list[object] = []
    monkeypatch.setattr(session, "ray_session", started.append)
    with pytest.raises(SpecError, match="401"), session.run_session(tmp_path, spec, None, True):
        pass
    assert started == []


def test_a_server_that_cannot_be_reached(free_port: int) -> None:
    away = check_access(f"http://me:secret@127.0.0.1:{free_port}", "x")
    assert away is not None
    assert "cannot be reached" in away
    assert "training begins" in away
    assert "secret" not in away
    assert len(away.splitlines()) == 1


def test_a_database_of_another_mlflow_version_names_the_upgrade_command(tmp_path: Path) -> None:
    (newest,) = schema_heads()
    file = tmp_path / "mlflow.db"
    uri = f"sqlite:///{file}"
    assert check_access(uri, "x") is None
    for version in ("451aebb31d03", newest):
        with sqlite3.connect(file) as database:
            database.execute("CREATE TABLE IF NOT EXISTS alembic_version (version_num TEXT)")
            database.execute("DELETE FROM alembic_version")
            database.execute("INSERT INTO alembic_version VALUES (?)", (version,))
        database.close()
        if version == newest:
            assert check_access(uri, "x") is None
        else:
            with pytest.raises(SpecError, match=f"run: mlflow db upgrade '{uri}'$"):
                check_access(uri, "x")
    file.write_text("no database, but long enough to be looked at" * 50)
    with pytest.raises(SpecError, match="not a database"):
        check_access(uri, "x")


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "ftp://somewhere"])
def test_a_uri_that_mlflow_does_not_support(uri: str) -> None:
    with pytest.raises(SpecError, match=r"^tracking.uri: must be http"):
        check_access(uri, "x")


def test_an_old_server_is_told_of_at_the_start(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert notices(server, "200") == []
    monkeypatch.setattr(Answer, "version", "2.22.4")
    (line,) = notices(server, "200")
    assert line.startswith(f"MLflow at {server} is 2.22.4: a model is kept among the artifacts")
    for answer in ("<html>login</html>", "", "ten"):  # of a proxy
        monkeypatch.setattr(Answer, "version", answer)
        assert notices(server, "200") == []
    monkeypatch.setattr(Answer, "version", "1.30.0")
    monkeypatch.setattr(Answer, "location", f"{tmp_path}/file/artifacts/7")
    (tmp_path / "file").touch()
    old, place = notices(server, "404"), notices(server, "200")
    assert len(old) == 1
    assert place[1] == (
        f"artifacts go to {tmp_path}/file/artifacts/7, and {tmp_path}/file cannot be written; "
        "metrics are kept, and files wait"
    )


def test_a_server_that_is_gone_by_then_is_not_told_of_twice(free_port: int) -> None:
    assert notices(f"http://127.0.0.1:{free_port}", "x") == []


SQLITE, SERVER = "sqlite:////data/mlflow.db", "http://mlflow:5000"


@pytest.mark.parametrize(
    ("uri", "location", "problem"),
    [
        (SERVER, "mlflow-artifacts:/7", None),
        (SQLITE, "mlflow-artifacts:/7", "tracking.uri must be that of a server"),
        (SERVER, "s3://bucket/x", "the package boto3 must be installed"),
        (SERVER, "hdfs://host/x", None),
        (SQLITE, "file:///data/mlartifacts", "/ cannot be written"),
        (SQLITE, "/old%20place/mlartifacts/3", "its artifacts are in /old place/mlartifacts; "),
        (SQLITE, "file:///old/mlartifacts", "heliostat track relocate --uri sqlite:////data"),
    ],
)
def test_places_where_no_artifact_can_be_kept(
    uri: str, location: str, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.tracking.preflight.find_spec", lambda name: None)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = artifact_problem(uri, location)
    assert (problem or "None") in str(found)
    assert (problem is None) == (found is None)


def test_a_store_that_was_copied_names_the_command(tmp_path: Path) -> None:
    """Else new artifacts go to the old project's folder."""
    old, new, link = tmp_path / "old", tmp_path / "new", tmp_path / "link"
    old.mkdir()
    with sqlite3.connect(old / "mlflow.db") as database:
        database.execute("CREATE TABLE experiments (name TEXT, artifact_location TEXT)")
        place = (old / "mlartifacts").as_uri()
        database.execute("INSERT INTO experiments VALUES ('heliostat', ?)", (place,))
    database.close()
    assert notices(f"sqlite:///{old}/mlflow.db", "heliostat") == []
    link.symlink_to(old)
    assert notices(f"sqlite:///{link}/mlflow.db", "heliostat") == [], "the same folder"
    shutil.copytree(old, new)
    assert notices(f"sqlite:///{new}/mlflow.db", "heliostat") == [
        f"{new}/mlflow.db was moved or copied, and its artifacts are in {old}/mlartifacts; to have "
        f"them beside it: heliostat track relocate --uri sqlite:///{new}/mlflow.db; metrics are "
        "kept, and files wait"
    ]
    assert notices(f"sqlite:///{new}/mlflow.db", "another") == []
