"""A cluster from its start to the next new step after the loss of a machine.

    python benchmarks/clusters.py [power|spot] [--rounds 3] [--tiny]

(This file is not named `cluster.py`, because that would hide the package `cluster` from the other
scripts in this folder.)

Two workers train the digits network on hosts that are Linux namespaces (`tests/rack`, with its
requirements, among them root). `heliostat up` and `heliostat submit` are compared with `ray up`
and `ray job submit`, with Ray's defaults and the loop of Ray's guide to saving and loading
checkpoints.

- `power`: an on-premises cluster. At step 60 one worker's host loses its power, and 5 s later an
  empty machine has its address.
- `spot`: an emulation of AWS. At step 60 one worker's spot instance gets a notice of two minutes,
  and is taken away when they are over; plain Ray does not get the notice.

The longest time without a new step, one that had not been done before, is broken down by cause.
All hosts are on one kernel, so their clocks agree.

On premises, Ray's autoscaler v2 never starts a second worker, so plain Ray gets v1 there. It also
gets a dashboard that can be reached. On premises neither has anything to install; on AWS
Heliostat's commands install Heliostat, from the machine image.
"""

import argparse
import itertools
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
    from rack import Rack

HOME = Path(__file__).parents[1]
SHARED = Path("/srv/shared")
EVENTS, NODES = "events", "nodes"
CUT_AT, STEPS, BATCH, EVERY = 60, 3000, 64, 10
STEP_S = 0.1
"""Sleep in each step: the time of a larger model's step, without its load on this machine."""
AWAY_S = 5.0
"""Seconds from the loss of a host until an empty machine has its address."""
LIMIT_S = 900.0
NOTICE_S = 120.0
"""Seconds from AWS's notice to a spot instance until its end."""
WORKERS = 2
PARTS = (
    "the loss is noticed",
    "there are two workers' nodes",
    "the workers are made",
    "their first step",
    "steps done again",
)
PAUSE = "without a new step"
PLAIN_HOSTS = """\
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
PLAIN_AWS = """\
cluster_name: plain
max_workers: 3
provider: {type: aws, region: us-east-1, availability_zone: us-east-1a, cache_stopped_nodes: false}
auth: {ssh_user: ubuntu}
available_node_types:
  head:
    resources: {CPU: 0}
    node_config: {InstanceType: m7i.large, ImageId: IMAGE}
  spot:
    resources: {CPU: 1}
    max_workers: 3
    node_config:
      InstanceType: m5.large
      ImageId: IMAGE
      InstanceMarketOptions: {MarketType: spot}
head_node_type: head
setup_commands: ["sed -i '1i export PATH=$HOME/venv/bin:$PATH' ~/.bashrc"]
"""


def begin_step(step: int) -> None:
    """Record that this process begins a step, and sleep for STEP_S."""
    import ray.util

    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    since_boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    made = time.time() - since_boot_s + ticks / os.sysconf("SC_CLK_TCK")
    with (SHARED / EVENTS).open("a") as file:
        file.write(f"{made} {time.time()} {step} {ray.util.get_node_ip_address()}\n")
    time.sleep(STEP_S)


def watch_nodes() -> None:
    """Runs on the head: records the nodes that are alive, whenever they change."""
    from ray._raylet import GcsClient

    # Ray writes this file when its head is up.
    client = GcsClient(address=Path("/tmp/ray/ray_current_cluster").read_text().strip())
    before = None
    while True:
        known = client.get_all_node_info().values()
        alive = sorted((n.node_manager_address, n.node_id.hex()) for n in known if n.state == 0)
        if alive != before:
            with (SHARED / NODES).open("a") as file:
                file.write(json.dumps([time.time(), alive]) + "\n")
        before = alive
        time.sleep(0.1)


WORKLOAD = """\
from benchmark import BATCH, begin_step
from trainers.workloads.vision.workload import Vision


class Steps(Vision):
    def augment(self, batch, random):
        begin_step(int(random.positions.min()) // BATCH)
        return super().augment(batch, random)
"""


TUTORIAL = """\
import benchmark
import guide
from ray import cloudpickle

cloudpickle.register_pickle_by_value(benchmark)
guide.train(
    benchmark.begin_step,
    benchmark.SHARED / "plain",
    workers=benchmark.WORKERS,
    steps=benchmark.STEPS,
    batch=benchmark.BATCH,
)
"""


class Lab:
    """A cluster on the hosts of a rack, and its records of steps and nodes."""

    token = "/root/.ray/auth_token"
    """Path of the token on the head."""

    def __init__(self, hosts: "Rack") -> None:
        self.hosts = hosts

    def me(self, command: str) -> str:
        return self.hosts.run("me", f"cd ~/work; {command}", timeout_s=LIMIT_S).stdout

    def head(self) -> str:
        """The name of the head's host."""
        raise NotImplementedError

    def lose(self, address: str) -> None:
        """Take a worker's host away; returns when it is gone."""
        raise NotImplementedError

    def events(self) -> list[tuple[float, float, int, str]]:
        """Each begun step: creation of the process, begin of the step, its number, its host."""
        return [
            (float(made), float(now), int(step), host)
            for made, now, step, host in (line.split() for line in self._lines(EVENTS))
        ]

    def nodes(self) -> list[tuple[float, dict[str, str]]]:
        """Each change of the nodes: its time, and the nodes from then on (id -> address)."""
        found = [json.loads(line) for line in self._lines(NODES)]
        return [(at, {node: address for address, node in alive}) for at, alive in found]

    def _lines(self, name: str) -> list[str]:
        path = self.hosts.shared / name
        return path.read_text().splitlines() if path.exists() else []

    def wait(self, true: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + LIMIT_S
        while not true():
            if time.monotonic() > end:
                sys.exit(f"{what}: not within {LIMIT_S:g} s; nodes {self.nodes()[-3:]}")
            time.sleep(0.05)

    def last_step(self) -> int:
        return max((step for _, _, step, _ in self.events()), default=-1)

    def measure(self, up: str, submit: str, mode: str, nodes: int) -> dict[str, float]:
        """Seconds of each part: run `up`, which starts `nodes`, then `submit`, then lose a host."""
        began = time.time()
        self.me(up)
        auth = f"RAY_AUTH_MODE={mode} RAY_AUTH_TOKEN_PATH={self.token}"
        watch = f"PYTHONPATH= {auth} {sys.executable} {__file__} --watch"
        self.hosts.start(self.head(), watch)  # ends with its host
        self.wait(lambda: any(len(there) >= nodes for _, there in self.nodes()), "all nodes")
        found = {"up": time.time() - began}
        began = time.time()
        self.me(submit.replace("HEAD", self.hosts.hosts[self.head()].address))
        self.wait(lambda: bool(self.events()), "the first step")
        found["first step"] = self.events()[0][1] - began
        self.wait(lambda: self.last_step() >= CUT_AT, f"step {CUT_AT}")
        leaving = next(where for *_, where in reversed(self.events()))
        told = time.time()
        self.lose(leaving)
        done = self.last_step()
        self.wait(lambda: self.last_step() > done, "a new step")
        return {**found, **self._recovery(told, leaving)}

    def _recovery(self, told: float, lost: str) -> dict[str, float]:
        """The longest time without a new step, and the seconds of its parts.

        A part that ends before an earlier part has 0 s.
        """
        firsts: dict[int, float] = {}
        for _, now, step, _ in self.events():
            firsts.setdefault(step, now)
        moments_of_new = sorted(firsts.values())
        pairs = [(a, b) for a, b in itertools.pairwise(moments_of_new) if b > told]
        began, new = max(pairs, key=lambda pair: pair[1] - pair[0])
        done = max(step for step, now in firsts.items() if now <= began)
        after = [event for event in self.events() if event[0] > told and event[1] <= new]
        gone = next(node for node, at in self._before(told).items() if at == lost)
        nodes = [(began, self._before(began)), *(each for each in self.nodes() if each[0] > began)]
        moments = (
            next((at for at, there in nodes if gone not in there), began),
            next((at for at, there in nodes if len(there.keys() - {gone}) > WORKERS), began),
            max((made for made, *_ in after), default=began),
            min((now for _, now, *_ in after), default=began),
            new,
        )
        parts, last = {}, began
        for part, moment in zip(PARTS, moments, strict=True):
            parts[part] = max(0.0, moment - last)
            last = max(last, moment)
        twice = max(0, done + 1 - min((step for _, _, step, _ in after), default=done + 1))
        return {**parts, PAUSE: new - began, "steps done twice": float(twice)}

    def _before(self, moment: float) -> dict[str, str]:
        return [there for at, there in self.nodes() if at <= moment][-1]


class Power(Lab):
    """On-premises hosts, of which one loses its power."""

    def head(self) -> str:
        return "head"

    def lose(self, address: str) -> None:
        name = next(host.name for host in self.hosts.hosts.values() if host.address == address)
        self.hosts.pull(name)
        time.sleep(AWAY_S)
        self.hosts.boot(name)


class Spot(Lab):
    """AWS instances, of which one is taken away after a notice."""

    token = "/home/ubuntu/.ray/auth_token"

    def head(self) -> str:
        instances: list[dict[str, Any]] = self.hosts.instances()  # type: ignore[attr-defined]
        return next(
            str(each["InstanceId"]) for each in instances if each.get("InstanceLifecycle") != "spot"
        )

    def lose(self, address: str) -> None:
        name = next(host.name for host in self.hosts.hosts.values() if host.address == address)
        self.hosts.notice(name, NOTICE_S)  # type: ignore[attr-defined]
        time.sleep(NOTICE_S)
        self.hosts.reclaim(name)  # type: ignore[attr-defined]
        self.wait(lambda: name not in self.hosts.hosts, "the end of the instance")


def heliostat(lab: Lab, nodes: int) -> dict[str, float]:
    fields = {
        "model.width": 16,
        "train.steps": STEPS,
        "train.global_batch": BATCH,
        "checkpoint.every_steps": EVERY,
        "scale.workers": WORKERS,
        "storage": SHARED / "runs",
    }
    options = " ".join(f"--set {key}={value}" for key, value in fields.items())
    submit = "heliostat submit --cluster cluster.yaml train steps:Steps --name steps"
    return lab.measure("heliostat up cluster.yaml", f"{submit} {options}", "token", nodes)


def plain(lab: Lab, nodes: int) -> dict[str, float]:
    job = "RAY_AUTH_MODE=disabled ray job submit --address http://HEAD:8265 --no-wait"
    up = "ray up -y plain.yaml"
    if isinstance(lab, Power):
        up = f"RAY_UP_enable_autoscaler_v2=0 {up}"
    return lab.measure(up, f"{job} --working-dir . -- python tutorial.py", "disabled", nodes)


def racks(place: Path, case: str) -> "Rack":
    """A rack of new hosts for one round."""
    if case == "power":
        from own_hosts import SPEC, OwnHosts

        return OwnHosts(place, re.sub(r"^state: .*\n", "", SPEC, flags=re.MULTILINE))
    from aws import AwsBox

    return AwsBox(place, "us-east-1")


def lay_out(hosts: "Rack", case: str) -> None:
    """Write the user's files to the host `me`."""
    work = hosts.disk("me") / "root/work"
    for left in work.glob("*.py"):
        left.unlink()
    (work / "benchmark.py").write_text(Path(__file__).read_text())
    (work / "steps.py").write_text(WORKLOAD)
    (work / "guide.py").write_text(Path(__file__).with_name("guide.py").read_text())
    (work / "tutorial.py").write_text(TUTORIAL)
    (work / "plain.yaml").write_text(PLAIN_HOSTS)
    if case == "spot":
        from aws import IMAGE
        from test_aws import EDITED

        text = (
            (HOME / "cluster.yaml").read_text().replace('~/heliostat: "."', f"~/heliostat: {HOME}")
        )
        for old, new in EDITED.items():
            text = text.replace(old, new)
        (work / "cluster.yaml").write_text(text)
        (work / "plain.yaml").write_text(PLAIN_AWS.replace("IMAGE", IMAGE))


def contender(
    name: str, run: Callable[[Lab, int], dict[str, float]], case: str, kept: Any
) -> float:
    """One round of one contender on new hosts; returns the time from the loss to a new step."""
    lab, nodes = (Power, 1 + WORKERS) if case == "power" else (Spot, 1)
    with tempfile.TemporaryDirectory() as place, racks(Path(place) / "rack", case) as hosts:
        lay_out(hosts, case)
        found = run(lab(hosts), nodes)
        print(f"{name}: " + ", ".join(f"{k} {v:.1f}" for k, v in found.items()), flush=True)
    for what, value in found.items():
        kept[what][name].append(value)
    return found[PAUSE]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("case", nargs="?", choices=("power", "spot"), default="power")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--tiny", action="store_true", help="one round of Heliostat alone")
    options.add_argument("--watch", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.watch:
        watch_nodes()
    sys.path.insert(0, str(HOME / "tests" / "rack"))
    from contest import compete, finish, leave_out, rows, show
    from rack import obstacle

    if found := obstacle():
        sys.exit(f"no rack of hosts: {found}")
    kept: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    contenders = {"Heliostat": heliostat, "plain Ray": plain}
    if args.tiny:
        args.rounds = 1
        del contenders["plain Ray"]
        leave_out("plain Ray", "left out of --tiny")
    measured = compete(
        {name: partial(contender, name, run, args.case, kept) for name, run in contenders.items()},
        args.rounds,
    )
    show(f"{args.case}: {PAUSE}", measured, "s", 1.0)
    print(f"\n{'seconds, medians':<28}" + "".join(f"{name:>14}" for name in contenders))
    for what, by in kept.items():
        values = "".join(f"{statistics.median(by[name]):>14.1f}" for name in contenders)
        print(f"{what:<28}{values}")
    results = []
    for what in ("up", "first step", PAUSE):
        results += rows(f"{args.case}: {what}", "Heliostat", kept[what])
    finish("cluster", results)


if __name__ == "__main__":
    main()
