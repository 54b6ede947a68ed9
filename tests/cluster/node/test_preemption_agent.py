"""The preemption agent is small, keeps running, and passes notices on to Ray."""

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.node import preemption_agent
from cluster.node.cloud_notices import MetadataServiceError, Notice
from cluster.node.preemption_agent import PreemptionAgent
from cluster.node.raylets import NODE_IP_VAR, Raylet, local_raylets

HOST = "127.0.0.7"
PATIENT = {"RAY_raylet_start_wait_time_s": "300", "RAY_agent_register_timeout_ms": "300000"}
"""A raylet ends if its agents have not started after 30 s, which a busy machine may exceed."""
NODES = f"""\
import json
import sys

import ray
import ray._private.utils
from ray.cluster_utils import Cluster

# Otherwise every other driver on this machine would connect to this Ray.
ray._private.utils.write_ray_address = lambda address: None
cluster = Cluster(initialize_head=True, head_node_args={{"include_dashboard": False}})
print("head", flush=True)


@ray.remote(num_cpus=0, resources={{"node:{HOST}": 0.1}})
class Work:
    def ready(self):
        return True


for line in sys.stdin:
    node = cluster.add_node(node_ip_address="{HOST}")
    ray.init(cluster.address)
    work = Work.remote()
    ray.get(work.ready.remote())
    print(json.dumps({{"address": cluster.address, "node": node.node_id}}), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@dataclass
class Cluster:
    """A Ray with a head, and a second node with an actor, which `add` starts."""

    process: subprocess.Popen[str]
    address: str = ""
    node: str = ""

    def wait_for(self, start: str) -> str:
        assert self.process.stdout is not None
        return next(line for line in self.process.stdout if line.startswith(start))

    def add(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        about = json.loads(self.wait_for("{"))
        self.address, self.node = about["address"], about["node"]

    def status(self) -> str:
        """The status of the second node in Ray."""
        from ray._raylet import GcsClient
        from ray.autoscaler.v2.sdk import get_cluster_resource_state
        from ray.core.generated.autoscaler_pb2 import NodeStatus

        states = get_cluster_resource_state(GcsClient(address=self.address)).node_states
        found = {state.node_id.hex(): NodeStatus.Name(state.status) for state in states}
        return str(found[self.node])


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    process = subprocess.Popen(
        [sys.executable, "-c", NODES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **PATIENT, "RAY_AUTH_MODE": "disabled"},
    )
    cluster = Cluster(process)
    cluster.wait_for("head")
    yield cluster
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(600) == 0


def test_a_notice_drains_the_node_and_ray_is_stopped_if_the_machine_stays(
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wait_until: Callable[..., None],
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv(NODE_IP_VAR, HOST)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    answer: list[Notice | MetadataServiceError | None] = [MetadataServiceError("refused")]
    lines: list[str] = []

    def read_notice() -> Notice | None:
        if isinstance(answer[0], MetadataServiceError):
            raise answer[0]
        return answer[0]

    agent = PreemptionAgent(read_notice)

    def step() -> None:
        agent.poll_once()
        lines.extend(caplog.messages)
        caplog.clear()

    def times(words: str) -> int:
        return sum(words in line for line in lines)

    def after_a_step(true: Callable[[], bool]) -> bool:
        step()
        return true()

    step()
    step()
    assert times("does not answer (refused)") == 1
    answer[0] = Notice("a", "spot interruption (terminate)", time.time() + 600)
    step()
    step()
    assert times("answers again") == 1
    assert times("spot interruption (terminate): this machine is going at") == 1
    assert times("no Ray on this machine yet") == 1

    cluster.add()
    wait_until(lambda: after_a_step(lambda: times("is drained") == 1), lambda: str(lines))
    wait_until(lambda: cluster.status() == "DRAINING")
    step()
    assert times("is drained") == 1

    monkeypatch.setattr(preemption_agent, "GRACE_S", -600.0)  # as if that time had passed
    wait_until(lambda: after_a_step(lambda: not list(local_raylets())), lambda: str(lines))
    assert times("this machine is still there; stopping Ray's node") == 1
    wait_until(lambda: cluster.status() == "DEAD")


def test_a_lost_head_does_not_stop_the_agent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free_port: int
) -> None:
    caplog.set_level(logging.INFO)
    lost = Raylet(0, "ab" * 28, HOST, f"127.0.0.1:{free_port}")
    monkeypatch.setattr(preemption_agent, "local_raylets", lambda: [lost])
    monkeypatch.setattr(preemption_agent, "DRAIN_TIMEOUT_S", 2.0)
    agent = PreemptionAgent(lambda: Notice("a", "spot interruption (terminate)", time.time() + 600))
    agent.poll_once()
    agent.poll_once()
    assert caplog.text.count("Ray could not be told (no answer from the head") == 1


def start(home: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "cluster.node.preemption_agent", "aws"],
        env={**os.environ, "HOME": str(home), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_it_is_small_and_a_new_instance_replaces_the_old_one(
    tmp_path: Path, free_port: int, wait_until: Callable[..., None]
) -> None:
    nowhere = {"HELIOSTAT_METADATA_URL": f"http://127.0.0.1:{free_port}"}
    first = start(tmp_path, **nowhere)
    assert first.stdout is not None
    assert first.stdout.readline().endswith("watching for aws's notices\n")
    assert "does not answer" in first.stdout.readline()
    status = Path(f"/proc/{first.pid}/status").read_text()
    resident = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert resident is not None
    assert int(resident[1]) < 32 * 1024
    second = start(tmp_path, **nowhere)
    try:
        assert second.stdout is not None
        assert second.stdout.readline().endswith("watching for aws's notices\n")
        assert first.wait(600) < 0
        assert second.poll() is None
    finally:
        second.kill()
        second.wait()


def test_it_imports_the_standard_library_only() -> None:
    show = "import cluster.node.preemption_agent, sys, json; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    loaded: list[Any] = [name.partition(".")[0] for name in json.loads(done.stdout)]
    assert set(loaded) - sys.stdlib_module_names <= {"cluster", "__main__"} | _hooks(loaded)


def _hooks(loaded: list[str]) -> set[str]:
    """Modules that an editable installation loads into every Python."""
    return {
        name for name in loaded if name.startswith(("__editable__", "_distutils", "sphinxcont"))
    }
