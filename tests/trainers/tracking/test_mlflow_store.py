"""MLflow's stores: SQLite, created once; for teams Postgres, artifacts in S3, and passwords."""

import getpass
import os
import pwd
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest

from cluster.base.errors import SpecError
from trainers.cli.track import relocate_command
from trainers.tracking.mlflow_store import MlflowStore, UnknownRunError
from trainers.tracking.operation_log import MetricPoint
from trainers.tracking.preflight import check_access
from trainers.tracking.tracker import TrackedRun, Tracker

ROWS: list[MetricPoint] = [
    MetricPoint("loss", step / 7, step, 1_700_000_000_000 + step) for step in range(3000)
]


def fill(tracker: Tracker, wait_until: Callable[..., None], path: Path) -> str:
    """Track a run with a file; returns MLflow's id of it."""
    path.write_text("hello")
    tracker.start(TrackedRun("run", {"a.b": 1}))
    tracker.log_artifact("run", str(path))
    tracker.log("run", ROWS, 3000)
    tracker.finish("run", "FINISHED")
    wait_until(lambda: tracker.pending()[0] == 0, lambda: str(tracker.pending()))
    return str(tracker.read("run")["run_id"])


FRESH = """
import sys, time
from trainers.tracking.tracker import TrackedRun, Tracker
tracker = Tracker(sys.argv[1], sys.argv[2], "fresh")
tracker.start(TrackedRun("run", {}))
while tracker.pending()[0]:
    assert tracker.pending()[1] is None, tracker.pending()
    time.sleep(0.05)
"""


def test_two_processes_create_one_sqlite_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    both = [
        subprocess.Popen([sys.executable, "-c", FRESH, str(tmp_path / name), uri])
        for name in ("a", "b")
    ]
    assert [process.wait(600) for process in both] == [0, 0]
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("fresh")
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()
    assert len(client.search_runs([experiment.experiment_id])) == 2
    assert not list(tmp_path.glob(".mlflow-*"))


def find_postgres() -> Path | None:
    """The folder of the server's programs; Debian does not put it on the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


@pytest.fixture
def postgres(tmp_path: Path, free_port: int) -> Iterator[str]:
    """The URI of a real Postgres that requires a password."""
    programs = find_postgres()
    if programs is None:
        pytest.skip("needs Postgres (apt-get install postgresql)")
    pytest.importorskip("psycopg")
    user = "postgres" if os.getuid() == 0 else getpass.getuser()  # Postgres refuses to run as root
    folder, password = tmp_path / "postgres", tmp_path / "password"
    folder.mkdir()
    password.write_text("secret")
    for path in (folder, password):
        os.chown(path, pwd.getpwnam(user).pw_uid, -1)
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    init = [programs / "initdb", "-D", folder, "-U", "me", "--pwfile", password, "-A", "md5"]
    subprocess.run([*map(str, init)], user=user, check=True, stdout=subprocess.DEVNULL)
    options = f"-p {free_port} -k {folder} -h 127.0.0.1"
    control = [str(programs / "pg_ctl"), "-D", str(folder), "-w", "-t", "120"]
    start = [*control, "-o", options, "-l", str(folder / "log"), "start"]
    subprocess.run(start, user=user, check=True, stdout=subprocess.DEVNULL)
    yield f"postgresql://me:secret@127.0.0.1:{free_port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], user=user, check=True)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of a bucket in a server that imitates S3."""
    server_module = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", endpoint)
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="models")
    yield "s3://models/mlflow"
    server.stop()


@pytest.fixture
def team_server(
    postgres: str,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wait_until: Callable[..., None],
) -> Iterator[str]:
    """An MLflow server of a team: Postgres, S3, and user passwords."""
    pytest.importorskip("flask_wtf")
    port = int(postgres.rpartition("/")[0].rpartition(":")[2]) + 1
    config = tmp_path / "auth.ini"
    config.write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
        f"database_uri = sqlite:///{tmp_path}/users.db\n"
        "admin_password = a-long-password\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": "a-long-password",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key of this test",
    }
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--app-name", "basic-auth", "--backend-store-uri", postgres]
    command += ["--artifacts-destination", bucket]
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    uri = f"http://127.0.0.1:{port}"
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def refused() -> bool:
        try:
            return check_access(uri, "teams") is None
        except SpecError as error:
            return "401" in str(error)

    wait_until(refused, log.read_text)
    yield uri
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.mark.cluster
def test_a_teams_server(
    team_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wait_until: Callable[..., None],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-the-password")
    with pytest.raises(SpecError, match=r"refuses access \(401"):
        check_access(team_server, "teams")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password")
    assert check_access(team_server, "teams") is None
    log = tmp_path / "track"
    tracker = Tracker(str(log), team_server, "teams")
    run_id = fill(tracker, wait_until, tmp_path / "note.txt")
    tracker.close()
    (log / "sent").write_text("0")  # as after a crash before anything was recorded
    tracker = Tracker(str(log), team_server, "teams")
    wait_until(lambda: tracker.pending()[0] == 0, lambda: str(tracker.pending()))
    tracker.close()
    client = mlflow.MlflowClient(team_server)
    history = client.get_metric_history(run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(row[2], row[1]) for row in ROWS]
    path = client.download_artifacts(run_id, "note.txt", str(tmp_path / "own"))
    assert Path(path).read_text() == "hello"
    experiment = client.get_experiment_by_name("teams").experiment_id
    assert len(client.search_runs([experiment])) == 1


@pytest.mark.cluster
def test_a_database_without_a_server(
    postgres: str, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    with pytest.raises(SpecError, match="password authentication failed"):
        check_access(postgres.replace("secret", "wrong"), "x")
    assert check_access(postgres, "x") is None
    tracker = Tracker(str(tmp_path / "track"), postgres, "x")
    run_id = fill(tracker, wait_until, tmp_path / "note.txt")
    tracker.close()
    assert check_access(postgres, "x") is None
    history = mlflow.MlflowClient(postgres).get_metric_history(run_id, "loss")
    assert len(history) == 3000
    shutil.rmtree("mlruns", ignore_errors=True)


def test_two_threads_make_one_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender's thread, and the actor's main thread in `read`."""
    made: list[str] = []

    class SlowClient(mlflow.MlflowClient):
        def __init__(self) -> None:
            made.append(threading.current_thread().name)
            both_started.wait(timeout=10)
            super().__init__()

    both_started = threading.Event()
    monkeypatch.setattr(mlflow, "MlflowClient", SlowClient)
    store = MlflowStore(f"sqlite:///{tmp_path}/mlflow.db", "threads")
    found: list[Exception] = []

    def read() -> None:
        try:
            store.read_run("never-started")
        except UnknownRunError as error:
            found.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    both_started.set()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len(made) == 1


def test_a_project_that_was_moved_keeps_its_artifacts_together(
    tmp_path: Path, wait_until: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """New files wait, and nothing is made at the old place, until the store knows the new one."""
    before, now = tmp_path / "before", tmp_path / "now"
    note = before / "runs" / "old" / "note.txt"
    note.parent.mkdir(parents=True)
    tracker = Tracker(str(note.parent / "track"), f"sqlite:///{before}/mlflow.db", "moving")
    old_id = fill(tracker, wait_until, note)
    tracker.close()
    before.rename(now)
    uri, folder = f"sqlite:///{now}/mlflow.db", now / "runs" / "new"
    folder.mkdir()
    (folder / "note.txt").write_text("hello")
    tracker = Tracker(str(folder / "track"), uri, "moving")
    tracker.start(TrackedRun("new", {}))
    tracker.log("new", ROWS[:9], 9)
    tracker.log_artifact("new", str(folder / "note.txt"))
    tracker.finish("new", "FINISHED")
    wait_until(lambda: tracker.unsent().files_failures > 0, lambda: str(tracker.unsent()))
    assert f"heliostat track relocate --uri {uri}" in (tracker.unsent().line() or "")
    assert tracker.read("new")["status"] == "FINISHED"
    assert not before.exists()
    assert relocate_command(Namespace(uri=uri)) == 0
    assert relocate_command(Namespace(uri=uri)) == 0
    assert capsys.readouterr().out.count("mlartifacts now") == 1
    tracker.close()
    tracker = Tracker(str(folder / "track"), uri, "moving")
    wait_until(lambda: tracker.pending()[0] == 0, lambda: str(tracker.pending()))
    new_id = tracker.read("new")["run_id"]
    tracker.close()
    client = mlflow.MlflowClient(uri)
    for run_id in (old_id, new_id):
        place = client.get_run(run_id).info.artifact_uri
        assert place.startswith((now / "mlartifacts").as_uri())
        path = client.download_artifacts(run_id, "note.txt", str(tmp_path))
        assert Path(path).read_text() == "hello"
    assert not before.exists()
