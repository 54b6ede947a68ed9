"""An on-premises cluster: up, status, authentication, down, and workarounds for Ray's launcher."""

import json
import re

import pytest
from own_hosts import ADDRESSES, HOSTS, OwnHosts

pytestmark = pytest.mark.thorough

WORKERS = (ADDRESSES["one"], ADDRESSES["two"])
ATTACK = """
import json, sys, urllib.error, urllib.request
request = urllib.request.Request(
    sys.argv[1] + "/api/jobs/", json.dumps({"entrypoint": "touch /tmp/broken-in"}).encode(),
    {"Content-Type": "application/json"}
)
if sys.argv[2:]:
    request.add_header("Authorization", "Bearer " + sys.argv[2])
try:
    print(urllib.request.urlopen(request, timeout=30).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def cluster(own_hosts: OwnHosts) -> OwnHosts:
    """A running cluster, although each host had another token, which enables authentication."""
    for host in HOSTS:
        folder = own_hosts.disk(host) / "root/.ray"
        folder.mkdir()
        (folder / "auth_token").write_text("stray" * 12)
    own_hosts.started = own_hosts.me("heliostat up cluster.yaml", timeout_s=600)
    for host in own_hosts.addresses:
        (own_hosts.disk(host) / "tmp/attack.py").write_text(ATTACK)
    return own_hosts


def pid_of(cluster: OwnHosts, host: str, program: str) -> list[str]:
    return cluster.run(host, f"pgrep -x {program} || true").stdout.split()


def test_up_waits_for_every_node_and_prints_the_time(cluster: OwnHosts) -> None:
    """Autoscaler v2 would never find the second worker."""
    assert re.search(r"^rack: 3 nodes in after \d+ s: 10.77.0.10, ", cluster.started, re.MULTILINE)


def test_status_shows_nodes_and_their_cost(cluster: OwnHosts) -> None:
    output = cluster.status()
    assert output.startswith("3 nodes\n")
    for host in HOSTS:
        assert f"\n{ADDRESSES[host]} " in output
    assert "no job is running\ncost: $0.75 per hour" in output


def test_every_host_has_the_token_and_only_its_owner_may_read_it(cluster: OwnHosts) -> None:
    tokens = {
        cluster.run(host, "cat ~/.ray/auth_token; stat -c ' %a' ~/.ray/auth_token").stdout
        for host in ("me", *HOSTS)
    }
    assert len(tokens) == 1
    token, mode = tokens.pop().split()
    assert mode == "600"
    assert re.fullmatch("[0-9a-f]{64}", token)


def test_up_again_changes_nothing(cluster: OwnHosts) -> None:
    before = [pid_of(cluster, host, "raylet") for host in HOSTS]
    assert "3 nodes in" in cluster.me("heliostat up cluster.yaml")
    assert [pid_of(cluster, host, "raylet") for host in HOSTS] == before
    assert all(len(raylets) == 1 for raylets in before)


def test_without_the_token_nothing_is_run(cluster: OwnHosts) -> None:
    """CVE-2023-48022: a dashboard without authentication runs any command of any client."""
    token = cluster.run("me", "cat ~/.ray/auth_token").stdout
    inside = "python /tmp/attack.py http://127.0.0.1:8265"
    agent = f"python /tmp/attack.py http://{ADDRESSES['one']}:52365"
    assert cluster.run("head", inside).stdout.strip() == "401"
    assert cluster.run("head", f"{inside} {'0' * 64}").stdout.strip() == "403"
    assert cluster.run("neighbour", agent).stdout.strip() in ("401", "403")
    outside = f"python /tmp/attack.py http://{ADDRESSES['head']}:8265 {token}"
    assert "refused" in cluster.run("neighbour", outside).stdout
    driver = f"import ray; ray.init('{ADDRESSES['head']}:6379', log_to_driver=False)"
    done = cluster.run("neighbour", f'RAY_AUTH_MODE=disabled python -c "{driver}"', check=False)
    assert done.returncode != 0
    for host in HOSTS:
        assert not (cluster.disk(host) / "tmp/broken-in").exists()
    assert cluster.run("head", f"{inside} {token}").stdout.strip() == "200"
    cluster.wait(
        lambda: any((cluster.disk(host) / "tmp/broken-in").exists() for host in HOSTS),
        "the same attack with the token",
    )


def test_ui_opens_both_pages_while_it_runs(cluster: OwnHosts) -> None:
    script = """
        > ui.txt; heliostat ui --cluster cluster.yaml >> ui.txt & ui=$!
        until grep -q MLflow: ui.txt; do sleep 0.2; kill -0 $ui || exit 1; done
        for page in $(grep -o 'http://[0-9.:]*' ui.txt); do
            for _ in $(seq 100); do
                curl -s -o /dev/null -w '%{http_code}\\n' $page/ | grep 200 && break; sleep 1
            done
        done
        kill -TERM $ui; wait $ui
        for _ in $(seq 100); do  # its ssh ends a moment later, when its input does
            curl -s -o /dev/null -m 5 $page/ || { echo closed; break; }; sleep 0.1
        done
    """
    assert cluster.me(script).split() == ["200", "200", "closed"]


def test_attach_opens_a_shell_on_the_head(cluster: OwnHosts) -> None:
    typed = "ip -4 -o address; echo ended-$((2 + 3)); exit 7"
    shell = "script -qec 'heliostat attach cluster.yaml' /dev/null"
    output = cluster.fails(f"echo '{typed}' | {shell}", code=7)
    assert ADDRESSES["head"] in output
    assert "ended-5" in output
    assert "Error" not in output


def test_failures_are_one_line(cluster: OwnHosts) -> None:
    wrong = "sed 's/head_ip: .*/head_ip: 10.77.0.99/' cluster.yaml > wrong.yaml"
    output = cluster.fails(f"{wrong}; heliostat up wrong.yaml", code=1)
    assert "head 10.77.0.99: no SSH: " in output
    bare = "grep -v auth_token cluster.yaml > bare.yaml; heliostat up bare.yaml"
    assert cluster.fails(bare, code=2).startswith("file_mounts: ")
    broken = "sed 's/idle_timeout_minutes/idle_minutes/' cluster.yaml > broken.yaml"
    broken += "; sed -i 's/10.77.0.10/10.77.0.66/; s/name: rack/name: broken/' broken.yaml"
    output = cluster.fails(f"{broken}; heliostat up broken.yaml", code=1)
    assert "ray up failed: " in output
    assert "idle_minutes" in output
    assert "log: /tmp/" in output
    for text in (output,):
        assert "Traceback" not in text
        assert len(text.splitlines()) <= 2


@pytest.mark.cluster
def test_a_worker_that_comes_back_empty_is_set_up_again(cluster: OwnHosts) -> None:
    cluster.pull("two")
    cluster.wait_for_nodes(2)
    cluster.boot("two")
    cluster.wait_for_nodes(3)
    assert (cluster.disk("two") / "root/.ray/auth_token").exists()


@pytest.mark.cluster
def test_a_replaced_head_takes_over_its_workers(cluster: OwnHosts) -> None:
    """Although Ray's launcher takes it for set up, and its autoscaler starts Ray a second time."""
    before = [pid_of(cluster, host, "raylet") for host in ("one", "two")]
    cluster.pull("head")
    cluster.boot("head")
    assert "3 nodes in" in cluster.me("heliostat up cluster.yaml", timeout_s=600)

    def started() -> bool:
        """Whether the new head's autoscaler has run its commands on both workers."""
        text = cluster.run("head", "cat /tmp/ray/cluster-rack.state").stdout
        workers = [node for address, node in json.loads(text).items() if address in WORKERS]
        states = [node["tags"].get("ray-node-status") for node in workers]
        return states == ["up-to-date"] * len(WORKERS)

    cluster.wait(started, "the autoscaler to set up both workers")
    assert [pid_of(cluster, host, "raylet") for host in ("one", "two")] == before


def test_down_leaves_no_process_and_up_starts_again(cluster: OwnHosts) -> None:
    """`ray down` would stop only the head."""
    assert cluster.processes("one")
    assert "rack: down" in cluster.me("heliostat down cluster.yaml")
    assert {host: cluster.processes(host) for host in HOSTS} == {host: [] for host in HOSTS}
    assert "no" in cluster.status()
