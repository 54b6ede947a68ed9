"""The cluster's spec: the shipped one is valid, and each mistake is one line with its path."""

import copy
from typing import Any

import pytest

from cluster.base.config import read_yaml, validate
from cluster.base.errors import SpecError
from cluster.definition.spec import SHIPPED_SPEC, ClusterSpec, read_cluster_spec


@pytest.fixture
def data() -> dict[str, Any]:
    return copy.deepcopy(read_yaml(SHIPPED_SPEC))


def test_the_shipped_spec_has_all_providers() -> None:
    spec = read_cluster_spec(SHIPPED_SPEC)
    assert all((spec.aws, spec.gcp, spec.azure, spec.local, spec.kuberay))


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        ("workers.gpu.min", 9, "workers.gpu: min is 9 but max is 4 (got"),
        ("workers.gpu.spots", True, "workers.gpu.spots: unknown key; did you mean 'spot'?"),
        ("workers.head", {"max": 1}, "workers.head: this name is reserved for the head"),
        ("aws.ssh_from", ["203.0.113.7/24"], "aws.ssh_from: 203.0.113.7/24 has host bits set"),
        ("aws.key_name", "mine", "ssh.key and aws.key_name: give both or neither"),
        ("name", "Helio Stat", "name: "),
        ("venv", "/opt/$(reboot)", "venv: "),
        ("mlflow.database", "postgresql://me:secret@db/mlflow", "mlflow.database: keep the pass"),
        ("kuberay.pods", {}, "kuberay.pods: must have exactly the keys head, gpu"),
        ("mlflow.auth", True, "kuberay.token_secret: is required for mlflow.auth"),
    ],
)
def test_a_mistake_gives_a_line(data: dict[str, Any], place: str, value: Any, line: str) -> None:
    *outer, last = place.split(".")
    inner = data
    for key in outer:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(SpecError) as error:
        validate(ClusterSpec, data)
    assert str(error.value).startswith(line)
