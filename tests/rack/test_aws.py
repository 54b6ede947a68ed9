"""The committed cluster.yaml on AWS in a box, with other machines and shorter times."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from aws import IMAGE, AwsBox
from own_hosts import STEPS, Notes, write_project
from rack import CHECKOUT, SHARED

pytestmark = pytest.mark.cluster

LIMIT_S = 900
EDITED = {
    "ami-00000000000000000": IMAGE,
    "g6.xlarge": "m5.large",
    "{CPU: 4, GPU: 1}": "{CPU: 1}",
    "max_workers: 4 ": "max_workers: 3 ",
    "idle_timeout_minutes: 10": "idle_timeout_minutes: 1",
    "203.0.113.0/24": "172.31.0.0/16",
    "cluster.node.spot_fallback 300": "cluster.node.spot_fallback 20",
}
"""The lines of the file that a user edits, and times that are too long for a test."""

SUBMIT = "heliostat submit --cluster cluster.yaml"


def wait(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {limit_s} s"
        time.sleep(1)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AwsBox]:
    """A cluster with a head, and no worker yet."""
    text = (CHECKOUT / "cluster.yaml").read_text()
    for old, new in EDITED.items():
        assert old in text, old
        text = text.replace(old, new)
    with AwsBox(tmp_path_factory.mktemp("aws") / "box", "us-east-1") as box:
        work = box.disk("me") / "root/work"
        write_project(work)
        # `file_mounts` sends the checkout from where the launcher is called.
        (work / "cluster.yaml").write_text(
            text.replace('~/heliostat: "."', f"~/heliostat: {CHECKOUT}")
        )
        box.me("heliostat up cluster.yaml")
        yield box


def spots(box: AwsBox) -> list[str]:
    found = [each for each in box.instances() if each.get("InstanceLifecycle") == "spot"]
    return [each["InstanceId"] for each in found]


def requested(box: AwsBox) -> list[tuple[str, str]]:
    """Type and market of every requested instance, in the order of the requests."""
    return [
        (call["InstanceType"], call.get("InstanceMarketOptions.MarketType", "on-demand"))
        for call in box.called("RunInstances")
        for _ in range(int(call["MaxCount"]))
    ]


def test_up_starts_a_head_that_the_internet_cannot_reach(box: AwsBox) -> None:
    assert [each[1] for each in requested(box)] == ["on-demand"]
    (call,) = box.called("RunInstances")
    values = set(call.values())
    assert {"project", "heliostat", "ray-cluster-name"} <= values
    groups = box.ask(
        lambda ec2: ec2.describe_security_groups(
            Filters=[{"Name": "group-name", "Values": ["heliostat"]}]
        )
    )["SecurityGroups"]
    ranges = [
        network["CidrIp"]
        for group in groups
        for rule in group["IpPermissions"]
        for network in rule["IpRanges"]
    ]
    assert ranges == ["172.31.0.0/16"]
    assert box.called("RevokeSecurityGroupIngress"), "Ray's launcher allows SSH from everywhere"


def test_a_spot_notice_costs_at_most_one_step(box: AwsBox) -> None:
    """A job starts 2 workers; the replacement joins before the preempted one is gone."""
    notes = Notes(box.shared, "spot")
    box.me(f"{SUBMIT} train slow.yaml --name spot --set data.notes={SHARED}/notes/spot")
    wait(lambda: len(spots(box)) == 2, "two spot instances")
    saved = box.shared / "runs/spot/checkpoints"
    wait(lambda: len(list(saved.glob("step-*"))) >= 1, "a checkpoint")
    assert [each[1] for each in requested(box)] == ["on-demand", "spot", "spot"]
    leaving = next(each for each in spots(box) if each in {host for _, host in notes.steps()})
    box.notice(leaving, left_s=3600)
    wait(
        lambda: "saving after every step" in log_of(box, "spot"), "the training loop to be notified"
    )
    wait(lambda: len(spots(box)) == 3, "a replacement")
    steps = len(notes.steps())
    wait(lambda: len(notes.steps()) > steps + 4, "some more steps")
    box.reclaim(leaving)
    notes.go_on()
    output = box.me("heliostat logs --follow --cluster cluster.yaml spot")
    assert "test/accuracy" in output
    firsts = Counter(first for first, _ in notes.steps() if first % 16 == 0)
    assert sorted(firsts) == [16 * step for step in range(STEPS)]
    assert sum(firsts.values()) <= STEPS + 1, "more than one step was done twice"


def log_of(box: AwsBox, name: str) -> str:
    return box.me(f"heliostat logs --cluster cluster.yaml {name}")


def test_idle_workers_are_ended(box: AwsBox) -> None:
    wait(lambda: len(box.instances()) == 1, "the end of the workers")
    assert box.called("TerminateInstances")


def test_on_demand_replaces_unavailable_spot(box: AwsBox) -> None:
    box.exhaust("m5.large")
    Notes(box.shared, "dear").go_on()
    box.me(f"{SUBMIT} --follow train slow.yaml --name dear --set data.notes={SHARED}/notes/dear")
    assert requested(box).count(("m5.large", "on-demand")) == 2
    weights = [
        hashlib.sha256((box.shared / "runs" / name / "model/model.safetensors").read_bytes())
        for name in ("spot", "dear")
    ]
    assert weights[0].digest() == weights[1].digest()


def test_down_ends_every_instance(box: AwsBox) -> None:
    box.me("heliostat down cluster.yaml")
    assert not box.instances("pending", "running", "stopping", "stopped")
