"""A preemption with a notice, on a Ray of three nodes."""

import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.base.config import write_yaml
from cluster.connection.ray_internals import drain_node
from trainers.data.dataset import prepare_dataset
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.spec import RunSpec, resolve

pytestmark = pytest.mark.thorough

SLOW = '''\
import time
from pathlib import Path

from spirals import Spirals


class Slow(Spirals):
    """Records the node of every step; slow until the file `gone` exists."""

    class Data(Spirals.Data):
        notes: str

    def augment(self, batch, random):
        import ray

        first, folder = int(random.positions[0]), Path(self.data.notes)
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        with (folder / "steps").open("a") as file:
            file.write(f"{first} {node}\\n")
        if not (folder / "gone").exists():
            time.sleep(0.2)
        return batch
'''
SPEC: dict[str, Any] = {
    "workload": "slow:Slow",
    "model": {"dropout": 0.0},
    "train": {"steps": 200, "global_batch": 16, "precision": "fp64", "evaluate_every_epochs": 1000},
    "checkpoint": {"every_steps": 1000},
    "scale": {"workers": 2, "max_restarts": 0},
}


NODES = """\
import json
import sys

import ray._private.utils
from ray.cluster_utils import Cluster

# Otherwise other tests on this machine would connect to this Ray.
ray._private.utils.write_ray_address = lambda address: None
cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False})
for _ in range(2):
    cluster.add_node()
workers = {node.node_id: node for node in cluster.worker_nodes}
print(json.dumps({"address": cluster.address, "workers": list(workers)}), flush=True)
for line in sys.stdin:
    cluster.remove_node(workers[line.strip()], allow_graceful=False)
cluster.shutdown()
"""


@dataclass(frozen=True)
class Nodes:
    """A Ray of a head and two workers, of one CPU each, in a process of its own.

    In this process it would replace the Ray that other tests share.
    """

    address: str
    workers: list[str]
    process: subprocess.Popen[str]

    def drain(self, node: str, seconds: int) -> None:
        """Announce the end of a node, as the notice of a spot instance does."""
        assert drain_node(self.address, node, time.time() + seconds, "spot") is None

    def kill(self, node: str) -> None:
        assert self.process.stdin is not None
        print(node, file=self.process.stdin, flush=True)


@pytest.fixture
def three_nodes() -> Iterator[Nodes]:
    process = subprocess.Popen(
        [sys.executable, "-c", NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    # Ray writes lines of its own.
    about = next(line for line in process.stdout if line.startswith("{"))
    yield Nodes(**json.loads(about), process=process)
    process.stdin.close()
    assert process.wait(600) == 0


def test_at_most_one_step_is_lost_and_no_restart_is_counted(
    heliostat: Any,
    three_nodes: Nodes,
    spirals_source: str,
    wait_until: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No save is due before the last step: only the notice can have caused one."""
    here = heliostat.folder
    (here / "spirals.py").write_text(spirals_source)
    (here / "slow.py").write_text(SLOW)
    notes = here.with_name("notes")
    notes.mkdir()
    data = {**SPEC, "data": {"notes": str(notes)}}
    write_yaml(data, here / "s.yaml")
    own = {"RAY_ADDRESS": three_nodes.address, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"}
    command = replace(heliostat, environment={**heliostat.environment, **own})
    process = command.start("train", "s.yaml", "--name", "spot")
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout), daemon=True)
    reader.start()

    def steps() -> list[tuple[int, str]]:
        lines = (notes / "steps").read_text().splitlines() if (notes / "steps").exists() else []
        return [(int(line.split()[0]), line.split()[1]) for line in lines]

    wait_until(lambda: len(steps()) > 8, lambda: "".join(output))
    busy = {node for _, node in steps()}
    leaving = next(node for node in three_nodes.workers if node in busy)
    three_nodes.drain(leaving, seconds=60)
    notice = re.compile(r"node [\d.]+ is going at \d\d:\d\d:\d\d \w+; saving after every step")
    wait_until(lambda: notice.search("".join(output)), lambda: "".join(output))
    wait_until(lambda: list(here.glob("runs/spot/checkpoints/step-*")))
    three_nodes.kill(leaving)
    (notes / "gone").touch()
    assert process.wait(600) == 0, "".join(output)

    reader.join()
    assert len(notice.findall("".join(output))) == 1
    firsts = Counter(first for first, _ in steps() if first % 16 == 0)
    assert sorted(firsts) == [16 * step for step in range(200)]
    assert sum(firsts.values()) <= 201, "more than one step was done twice"

    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(here)
    spec, workload = resolve(data, RunSpec)
    train(spec, workload, prepare_dataset(workload, here / "runs"), here / "whole", NullReporter())
    expected = load_file(
        here / "whole" / "checkpoints" / "step-00000200" / "state-00000.safetensors"
    )
    for name, weight in load_file(here / "runs/spot/model/model.safetensors").items():
        assert torch.allclose(weight, expected[f"model.{name}"], rtol=1e-9, atol=1e-12), name
