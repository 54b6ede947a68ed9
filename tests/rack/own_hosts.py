"""An on-premises cluster on a rack, and the machine of the user who starts it."""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rack import SHARED, Rack

ADDRESSES = {
    "me": "10.77.0.2",
    "head": "10.77.0.10",
    "one": "10.77.0.11",
    "two": "10.77.0.12",
    "neighbour": "10.77.0.66",
}
HOSTS = ("head", "one", "two")
NODE_MEMORY = "memory: 1500000000, object_store_memory: 100000000"
SPEC = f"""\
name: rack
setup: installed
venv: {sys.prefix}
ssh: {{user: root, key: ~/.ssh/id}}
state: {SHARED}/state
idle_minutes: 10
head: {{cpus: 0}}
workers: {{host: {{max: 2}}}}
mlflow:
  database: sqlite:///{SHARED}/mlflow.db
  artifacts: {SHARED}/artifacts
local:
  head: {ADDRESSES["head"]}
  workers: [{ADDRESSES["one"]}, {ADDRESSES["two"]}]
  usd_per_hour: 0.25
  head_resources: {{CPU: 0, {NODE_MEMORY}}}
  worker_resources: {{CPU: 1, {NODE_MEMORY}}}
"""


STEPS = 150
SLOW = f"""\
workload: slow:Slow
storage: {SHARED}/runs
optimizer: {{lr: 1e-3}}
train: {{steps: {STEPS}, global_batch: 16, evaluate_every_epochs: 200}}
checkpoint: {{every_steps: 20}}
scale: {{workers: 2}}
"""


def write_project(work: Path) -> None:
    """Write a slow workload and its spec to a user's folder."""
    work.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_name("slow.py"), work)
    (work / "slow.yaml").write_text(SLOW)


class Notes:
    """The steps that a slow run has recorded; `go_on` lets it continue at full speed."""

    def __init__(self, shared: Path, name: str) -> None:
        self.folder = shared / "notes" / name

    def steps(self) -> list[tuple[int, str]]:
        """The first sample of each micro-batch, and its host."""
        file = self.folder / "steps"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(int(line.split()[0]), line.split()[1]) for line in lines]

    def go_on(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "gone").touch()


class OwnHosts(Rack):
    """`me` has the cluster's spec and its rendered file in ~/work; `neighbour` has nothing."""

    def __init__(self, folder: Path, spec: str = SPEC) -> None:
        super().__init__(folder, ADDRESSES, gateway="10.77.0.1")
        self._spec = spec
        self.started = ""
        """The output of `heliostat up`."""

    def __enter__(self) -> "OwnHosts":
        super().__enter__()
        for name in self.addresses:
            self.boot(name)
        home = self.disk("me") / "root"
        write_project(home / "work")
        (home / "work/spec.yaml").write_text(self._spec)
        (home / ".ssh").mkdir(mode=0o700)
        key = home / ".ssh/id"
        key.touch(mode=0o600)
        key.write_text(self.key)
        self.me("heliostat cluster render --provider local --spec spec.yaml > cluster.yaml")
        return self

    def fails(self, command: str, code: int) -> str:
        """The output of a line of bash that must end with this exit code."""
        done = self.run("me", f"cd ~/work; {command}", check=False)
        assert done.returncode == code, done.stdout
        return done.stdout

    def wait(self, condition: Callable[[], bool], what: str, limit_s: float = 600) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {limit_s} s"
            time.sleep(2)

    def status(self) -> str:
        return self.run("me", "heliostat status ~/work/cluster.yaml", check=False).stdout

    def wait_for_nodes(self, count: int) -> None:
        """Wait until `heliostat status` counts this many."""
        self.wait(
            lambda: self.status().startswith(f"{count} nodes"),
            f"{count} nodes",
        )
