"""A cluster of three hosts from its start to the next new step after one has lost its power.

    python benchmarks/cluster.py [--rounds 3]

Two workers train the digits network, on hosts made of namespaces (`tests/rack`; needs root and
what that needs). `heliostat up` and `heliostat submit` against `ray up` and `ray job submit` with
Ray's defaults and the loop of Ray's guide to saving and loading checkpoints. For both: the power
of one worker's host is cut at step 60, and 5 s later an empty machine is there in its place.

The time from the power cut to the first step that had not been done before is broken down by
cause. All hosts are on one kernel, so that their clocks agree.

Ray's autoscaler v2 never starts a second worker on hosts of one's own, so that plain Ray gets v1,
and a start of its dashboard that can be reached. Neither has anything to set up on its hosts.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from own_hosts import OwnHosts

HOME = Path(__file__).parents[1]
SHARED = Path("/srv/shared")
EVENTS, NODES = "events", "nodes"
CUT_AT, STEPS, BATCH, EVERY = 60, 400, 64, 10
STEP_S = 0.1
"""What a step takes besides computing: a model of some size, without its load on this machine."""
AWAY_S = 5.0
"""How long the place of the lost host is empty."""
LIMIT_S = 900.0
HEAD, LOST = "10.77.0.10", "10.77.0.12"
PARTS = (
    "the loss is noticed",
    "the host is a node again",
    "the workers are made",
    "their first step",
    "steps done again",
)
PLAIN = """\
cluster_name: plain
provider: {type: local, head_ip: 10.77.0.10, worker_ips: [10.77.0.11, 10.77.0.12]}
auth: {ssh_user: root, ssh_private_key: ~/.ssh/id}
min_workers: 2
max_workers: 2
head_start_ray_commands:
  - ray stop
  - >-
    ulimit -c unlimited;
    ray start --head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml
    --dashboard-host=0.0.0.0 --num-cpus=0 --memory=1500000000 --object-store-memory=100000000
worker_start_ray_commands:
  - ray stop
  - >-
    ray start --address=$RAY_HEAD_IP:6379 --num-cpus=1
    --memory=1500000000 --object-store-memory=100000000
"""


def begin_step(step: int) -> None:
    """Write down that this process begins a step, and spend a step's time."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    since_boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    made = time.time() - since_boot_s + ticks / os.sysconf("SC_CLK_TCK")
    with (SHARED / EVENTS).open("a") as file:
        file.write(f"{made} {time.time()} {step}\n")
    time.sleep(STEP_S)


def watch_nodes() -> None:
    """On the head: write down which nodes are there, whenever that changes."""
    from ray._raylet import GcsClient

    client, before = GcsClient(address=f"{HEAD}:6379"), None
    while True:
        known = client.get_all_node_info().values()
        alive = sorted((n.node_manager_address, n.node_id.hex()) for n in known if n.state == 0)
        if alive != before:
            with (SHARED / NODES).open("a") as file:
                file.write(json.dumps([time.time(), alive]) + "\n")
        before = alive
        time.sleep(0.1)


WORKLOAD = """\
from benchmarks.cluster import BATCH, begin_step
from trainers.workloads.vision import Vision


class Steps(Vision):
    def augment(self, batch, random):
        begin_step(int(random.positions.min()) // BATCH)
        return super().augment(batch, random)
"""


def tutorial() -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        _tutorial_worker,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            storage_path=str(SHARED / "plain"), failure_config=FailureConfig(max_failures=3)
        ),
    ).fit()


def _tutorial_worker() -> None:
    import ray.train
    import torch
    from ray.train import Checkpoint
    from ray.train.torch import prepare_data_loader, prepare_model
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, TensorDataset

    from trainers.workloads.vision import ResNet, Vision

    bunch, context = load_digits(), ray.train.get_context()
    images = torch.from_numpy(bunch.images[:1437, None]).float()
    data = TensorDataset(images, torch.from_numpy(bunch.target[:1437]))
    batch_size = BATCH // context.get_world_size()
    loader = prepare_data_loader(DataLoader(data, batch_size=batch_size, shuffle=True))
    model = prepare_model(ResNet(1, 10, Vision.Model(width=16)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    epoch, step = 0, 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt")
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, step = state["epoch"], state["step"]
    while step < STEPS:
        loader.sampler.set_epoch(epoch)
        for batch, labels in loader:
            begin_step(step)
            loss = torch.nn.functional.cross_entropy(model(batch), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        epoch += 1
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if context.get_world_rank() == 0:
                state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "epoch": epoch, "step": step}, Path(folder) / "state.pt")
                saved = Checkpoint.from_directory(folder)
            ray.train.report({"loss": loss.item()}, checkpoint=saved)


class Lab:
    """Three hosts, and what is written down on them."""

    def __init__(self, hosts: "OwnHosts") -> None:
        self.hosts = hosts

    def events(self) -> list[tuple[float, float, int]]:
        """When the process was made, when it began the step, and which one it was."""
        return [
            (float(made), float(now), int(step))
            for made, now, step in (line.split() for line in self._lines(EVENTS))
        ]

    def nodes(self) -> list[tuple[float, dict[str, str]]]:
        """When which nodes were there: address -> id."""
        found = [json.loads(line) for line in self._lines(NODES)]
        return [(at, dict(alive)) for at, alive in found]

    def _lines(self, name: str) -> list[str]:
        path = self.hosts.shared / name
        return path.read_text().splitlines() if path.exists() else []

    def wait(self, true: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + LIMIT_S
        while not true():
            if time.monotonic() > end:
                sys.exit(f"{what}: not within {LIMIT_S:g} s; nodes {self.nodes()[-3:]}")
            time.sleep(0.05)

    def me(self, command: str) -> None:
        self.hosts.me(command, timeout_s=LIMIT_S)

    def measure(self, up: str, submit: str, mode: str) -> dict[str, float]:
        """Seconds of everything, for a command that starts the cluster and one for the run."""
        began = time.time()
        self.me(up)
        command = f"RAY_AUTH_MODE={mode} python {__file__} --watch"
        watcher = self.hosts.start("head", command)
        self.wait(lambda: any(len(alive) == 3 for _, alive in self.nodes()), "all nodes")
        found = {"up": max(time.time() - began, 0.0)}
        began = time.time()
        self.me(submit)
        self.wait(lambda: bool(self.events()), "the first step")
        found["first step"] = self.events()[0][1] - began
        self.wait(lambda: any(step >= CUT_AT for *_, step in self.events()), f"step {CUT_AT}")
        before = self.nodes()[-1][1][LOST]
        self.hosts.pull("two")
        cut = time.time()
        done = max(step for *_, step in self.events())
        time.sleep(AWAY_S)
        self.hosts.boot("two")
        self.wait(lambda: any(step > done for *_, step in self.events()), "a new step")
        watcher.kill()
        return {**found, **self._recovery(cut, before, done)}

    def _recovery(self, cut: float, lost: str, done: int) -> dict[str, float]:
        """What happened when after the power cut; parts that end before an earlier one take 0 s."""
        after = [event for event in self.events() if event[1] > cut and event[0] > cut]
        nodes = [entry for entry in self.nodes() if entry[0] > cut]
        moments = (
            next((at for at, alive in nodes if alive.get(LOST) != lost), cut),
            next((at for at, alive in nodes if alive.get(LOST) not in (None, lost)), cut),
            max(made for made, *_ in after),
            min(now for _, now, _ in after),
            min(now for _, now, step in after if step > done),
        )
        parts, last = {}, cut
        for part, moment in zip(PARTS, moments, strict=True):
            parts[part] = max(0.0, moment - last)
            last = max(last, moment)
        twice = max(0, done + 1 - min(step for *_, step in after))
        return {**parts, "power cut to new step": last - cut, "steps done twice": float(twice)}


def heliostat(lab: Lab) -> dict[str, float]:
    fields = {
        "model.width": 16,
        "train.steps": STEPS,
        "train.global_batch": BATCH,
        "checkpoint.every_steps": EVERY,
        "scale.workers": 2,
        "storage": SHARED / "runs",
    }
    options = " ".join(f"--set {key}={value}" for key, value in fields.items())
    submit = "heliostat submit --cluster cluster.yaml train steps:Steps --name steps"
    return lab.measure("heliostat up cluster.yaml", f"{submit} {options}", "token")


def plain(lab: Lab) -> dict[str, float]:
    work = lab.hosts.disk("me") / "root/work"
    (work / "plain.yaml").write_text(PLAIN)
    (work / "tutorial.py").write_text("from benchmarks.cluster import tutorial\n\ntutorial()\n")
    job = f"ray job submit --address http://{HEAD}:8265 --no-wait --working-dir ."
    return lab.measure(
        "RAY_UP_enable_autoscaler_v2=0 ray up -y plain.yaml",
        f"{job} -- python tutorial.py",
        "disabled",
    )


def contender(name: str, run: Callable[[Lab], dict[str, float]], kept: Any) -> float:
    """One round of one of them on new hosts; the time from the power cut to a new step."""
    from own_hosts import SPEC, OwnHosts

    spec = re.sub(r"^state: .*\n", "", SPEC, flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as place, OwnHosts(Path(place) / "rack", spec) as hosts:
        work = hosts.disk("me") / "root/work"
        (work / "steps.py").write_text(WORKLOAD)
        found = run(Lab(hosts))
    for what, value in found.items():
        kept[what][name].append(value)
    print(f"{name}: " + ", ".join(f"{k} {v:.1f}" for k, v in found.items()), flush=True)
    return found["power cut to new step"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--watch", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.watch:
        watch_nodes()
    sys.path.insert(0, str(HOME / "tests" / "rack"))
    from contest import compete, finish, rows, show
    from rack import obstacle

    if found := obstacle():
        sys.exit(f"no rack of hosts: {found}")
    kept: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    contenders = {"Heliostat": heliostat, "plain Ray": plain}
    measured = compete(
        {name: partial(contender, name, run, kept) for name, run in contenders.items()},
        args.rounds,
    )
    show("power cut to the next new step", measured, "s", 1.0)
    print(f"\n{'seconds, medians':<28}" + "".join(f"{name:>14}" for name in contenders))
    for what, by in kept.items():
        values = "".join(f"{statistics.median(by[name]):>14.1f}" for name in contenders)
        print(f"{what:<28}{values}")
    results = []
    for what in ("up", "first step", "power cut to new step"):
        results += rows(what, "Heliostat", kept[what])
    finish("cluster", results)


if __name__ == "__main__":
    main()
