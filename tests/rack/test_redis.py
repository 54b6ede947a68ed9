"""A cluster that keeps its state in the user's Redis."""

import re
import shutil
from pathlib import Path

import pytest
from own_hosts import ADDRESSES, SPEC, OwnHosts

REDIS = ADDRESSES["neighbour"]

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server"),
]


def test_a_replaced_head_finds_its_workers_in_redis(tmp_path: Path) -> None:
    spec = re.sub("^state: .*$", f"state: redis://{REDIS}:6379", SPEC, flags=re.MULTILINE)
    with OwnHosts(tmp_path / "rack", spec) as cluster:
        cluster.start("neighbour", f"redis-server --bind {REDIS} --protected-mode no --save ''")

        def raylets() -> list[str]:
            return [cluster.run(host, "pgrep -x raylet").stdout for host in ("one", "two")]

        assert "3 nodes in" in cluster.me("heliostat up cluster.yaml")
        before = raylets()
        cluster.pull("head")
        cluster.boot("head")
        assert "3 nodes in" in cluster.me("heliostat up cluster.yaml")
        assert raylets() == before
        cluster.me("heliostat down cluster.yaml")
