"""Fixtures of all tests: workloads of users, one Ray, one MLflow server, the command line."""

import contextlib
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.session.session import Session, all_sessions, find_or_start_session

SPIRALS_SOURCE = '''\
"""Two spirals in the plane: which of them does a point lie on?"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from trainers import Spec, Workload, table


class Spirals(Workload):
    class Data(Spec):
        points: int = 400
        noise: float = 0.05

    class Model(Spec):
        width: int = 16
        dropout: float = 0.1

    def dataset(self):
        random, count = np.random.default_rng(0), self.data.points
        label = np.arange(count) % 2
        radius = random.uniform(0.2, 1.0, count)
        angle = 2 * np.pi * radius + np.pi * label
        point = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        point += self.data.noise * random.standard_normal(point.shape)
        ends = {"train": (0.0, 0.7), "val": (0.7, 0.85), "test": (0.85, 1.0)}
        slices = {k: slice(round(a * count), round(b * count)) for k, (a, b) in ends.items()}
        point = point.astype(np.float32)
        return {k: table(point=point[part], label=label[part]) for k, part in slices.items()}

    def build(self):
        width = self.model.width
        first = [nn.Linear(2, width), nn.ReLU(), nn.Dropout(self.model.dropout)]
        return nn.Sequential(*first, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, model, batch):
        return model(batch["point"])

    def loss(self, output, batch):
        return F.cross_entropy(output, batch["label"], reduction="none")

    def metrics(self, output, batch):
        return {"accuracy": (output.argmax(-1) == batch["label"]).float()}

    def example(self):
        return torch.zeros(1, 2)
'''


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of a user who wrote `spirals.py`; modules from it are unloaded afterwards.

    `spirals:Spirals` has 400 points: 280 to train, 60 to validate, 60 to test.
    """
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "spirals.py").write_text(SPIRALS_SOURCE)
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "spirals", raising=False)  # it may be from another folder
    monkeypatch.setattr(sys, "path", [*sys.path])
    # Python matches bytecode by second and size, so it could miss that a test rewrote a file.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


FAULTY_SOURCE = '''
"""Digits with faults that happen once, at an exact sample; it hangs twice."""

import ctypes
import os
import signal
import time
from pathlib import Path

import torch

from trainers.workloads.vision.workload import Vision


def sleeps():
    time.sleep(3600)


def holds_the_interpreter():
    ctypes.PyDLL(None).sleep(3600)


class Faulty(Vision):
    class Data(Vision.Data):
        fault: str = "none"
        position: int = 0
        marker: str = ""

    def augment(self, batch, random):
        batch = super().augment(batch, random)
        if self.data.position in random.positions.tolist():
            marker = Path(self.data.marker)
            if self.data.fault == "kill" and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.data.fault == "hang" and not marker.exists():
                marker.touch()
                sleeps()
            elif self.data.fault == "hang" and not marker.with_suffix(".again").exists():
                marker.with_suffix(".again").touch()
                holds_the_interpreter()
            if self.data.fault == "raise":
                raise KeyError("no such feature")
            if self.data.fault == "nan":
                batch["image"] = torch.full_like(batch["image"].double(), float("nan"))
        return batch
'''


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of workloads that this process and all Ray workers can import."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "faulty.py").write_text(FAULTY_SOURCE)
    os.environ["PYTHONPATH"] = str(folder)
    # As for every Ray on a single machine; see cluster.connection.ray_connection.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    # The set-up commands of a cluster put the command on the path of its jobs.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    sys.path.append(str(folder))
    return folder


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def free_port() -> int:
    return _free_port()


@pytest.fixture(scope="session")
def ray_cluster(modules: Path) -> Iterator[str]:
    """The address of a Ray with four CPUs, which all tests share."""
    import ray

    from cluster.zygote.python_for_ray import forked_processes

    session = find_or_start_session()
    assert session is not None
    with forked_processes(session.folder, "tests"):
        ray.init(
            num_cpus=4,
            dashboard_port=_free_port(),
            log_to_driver=False,
            object_store_memory=300_000_000,
            logging_level="ERROR",
        )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    for each in all_sessions():  # of this process and of the commands in tests
        each.end(wait=False)


@pytest.fixture
def ray_dashboard(ray_cluster: str) -> str:
    """The address of the shared Ray's dashboard and job server."""
    import ray

    return f"http://{ray._private.worker.get_dashboard_url()}"


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a real MLflow server with one worker on SQLite."""
    folder = tmp_path_factory.mktemp("mlflow")
    port = _free_port()
    uri = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
            *("--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=(folder / "log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    _wait_until(lambda: _healthy(uri), lambda: (folder / "log").read_text())
    yield uri
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(600)


def _healthy(uri: str) -> bool:
    return _answers(f"{uri}/health")


def _wait_until(true: Callable[[], bool], why: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + 600
    while not true():
        assert time.monotonic() < deadline, f"not within 10 minutes: {why()}"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """A function that returns as soon as its first argument returns True, or fails after a limit.

    The limits, here and elsewhere, only end a test that hangs: a busy machine may be slow.
    """
    return _wait_until


@pytest.fixture(scope="session")
def spirals_source() -> str:
    return SPIRALS_SOURCE


@dataclass(frozen=True)
class CommandLine:
    """The installed command `heliostat`, run in a folder as a user does."""

    folder: Path
    environment: dict[str, str]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the command in a process group of its own, so that a test can end all of it."""
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("heliostat")), *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def in_a_terminal(self, *arguments: str) -> str:
        """The output of the command in a terminal; its exit code must be 0."""
        ours, its = pty.openpty()
        termios.tcsetwinsize(its, (40, 200))
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("heliostat")), *arguments],
            cwd=self.folder,
            env={**self.environment, "TERM": "xterm-256color"},
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
        )
        os.close(its)
        seen = b""
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # on Linux, the end of a terminal's output
                break
            if not data:
                break
            seen += data
        os.close(ours)
        assert process.wait(600) == 0, seen.decode()
        return seen.decode()

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """The output of the command; its exit code must be `code`."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == code, output
        return output

    def session(self) -> Session:
        """The one running session of `user_with_sessions`."""
        alive = []
        for folder in Path(self.environment["RAY_TMPDIR"]).glob("heliostat-*/s/*/"):
            with contextlib.suppress(OSError):
                Session(folder).status()
                alive.append(Session(folder))
        (session,) = alive
        return session


@pytest.fixture(scope="module")
def user_with_sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The command line of a user who has a folder for temporary files, so sessions, of its own."""
    place = tempfile.mkdtemp(prefix="hs")  # short, since paths of sockets are limited
    hidden = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PYTHONPATH", "SEEN", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"RAY_TMPDIR": place, "COLUMNS": "200"}
    user = CommandLine(tmp_path_factory.mktemp("user"), environment)
    yield user
    user("session", "--end")
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def heliostat(tmp_path: Path, ray_cluster: str, mlflow_server: str) -> CommandLine:
    """The command line in an empty folder, with the shared Ray and MLflow in its environment."""
    environment = {
        **os.environ,
        "RAY_ADDRESS": ray_cluster,
        "MLFLOW_TRACKING_URI": mlflow_server,
        "COLUMNS": "200",
    }
    environment.pop("PYTHONPATH", None)
    return CommandLine(tmp_path, environment)


@dataclass(frozen=True)
class JobCluster:
    """A Ray as on a cluster's head: with a token and a job server."""

    url: str
    """The address of the dashboard."""
    agent_port: int
    """The port of the agent that accepts jobs on a node's own address."""
    folder: Path
    """The folder that `heliostat stand ...` writes to; HELIOSTAT_STORAGE of the jobs."""
    environment: dict[str, str]
    """The environment of a user who has the token."""


STAND = """#!/bin/sh
# Stands in for a run: stand print CODE | stand work. Other arguments go to Heliostat itself.
if [ "$1" != stand ]; then
    export PYTHONPATH="$PYTHONPATH:{home}"
    exec {python} -c 'import sys; from heliostat.main import main; sys.exit(main())' "$@"
fi
cd "$HELIOSTAT_STORAGE"
name=$4
echo "$@" >> "$name.starts"
echo "start $(wc -l < $name.starts) of $name"
printf '\\036step 1\\n\\036step 2\\n'
cat "$OLDPWD/sent.txt"
[ "$2" = print ] && exit "$3"
trap 'echo saving; touch $name.saved; exit 130' TERM
echo $$ > "$name.pid.new"; mv "$name.pid.new" "$name.pid"
until [ -e "$name.end" ]; do sleep 0.2; done
echo done
"""


@pytest.fixture(scope="session")
def job_cluster() -> Iterator[JobCluster]:
    """A separate Ray with two CPUs, with this checkout's `heliostat` on its path."""
    folder = Path(tempfile.mkdtemp(prefix="hj"))  # short, since paths of sockets are limited
    (folder / "bin").mkdir()
    (folder / "home").mkdir()
    script = STAND.format(home=Path(__file__).parents[1], python=sys.executable)
    (folder / "bin" / "heliostat").write_text(script)
    (folder / "bin" / "heliostat").chmod(0o755)
    hidden = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    environment = {
        **kept,
        "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder / "home"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "HELIOSTAT_STORAGE": str(folder / "home"),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "COLUMNS": "200",
    }
    ports = {name: _free_port() for name in ("port", "dashboard-port", "ray-client-server-port")}
    ports["dashboard-agent-listen-port"] = _free_port()  # the default is in use by other Rays
    log = folder / "log"
    command = [
        *(Path(sys.executable).with_name("ray"), "start", "--head", "--block"),
        *("--num-cpus=2", "--object-store-memory=150000000", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"),
        f"--temp-dir={folder}/ray",
        *(f"--{name}={port}" for name, port in ports.items()),
    ]
    url = f"http://127.0.0.1:{ports['dashboard-port']}"
    agent_port = ports["dashboard-agent-listen-port"]
    agent = f"http://127.0.0.1:{agent_port}/api/local_raylet_healthz"

    def start() -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            command,
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def runs() -> bool:
        nonlocal ray
        if ray.poll() is not None:  # Ray's processes must start in 30 s; a busy machine is slower
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ray.pid, signal.SIGKILL)
            ray = start()
        return _answers(f"{url}/api/authentication_mode") and _answers(agent)

    ray = start()
    _wait_until(runs, log.read_text)
    yield JobCluster(url, agent_port, folder / "home", environment)
    ray.terminate()
    try:
        ray.wait(600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ray.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
