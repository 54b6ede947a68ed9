"""Findings of `heliostat cluster check`: one line per mistake, with its dotted path."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.base.config import read_yaml, validate
from cluster.base.errors import SpecError
from cluster.definition.check import CheckReport, check_file
from cluster.definition.launcher_file import render
from cluster.definition.spec import SHIPPED_SPEC, ClusterSpec, Provider

HOME = Path(__file__).parents[3]
GPU = "available_node_types.gpu"


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in the checkout, without credentials and without AWS."""
    monkeypatch.chdir(HOME)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)


def rendered(provider: Provider = "aws") -> dict[str, Any]:
    """A rendered file in which every value marked EDIT has been changed."""
    data = copy.deepcopy(read_yaml(SHIPPED_SPEC))
    data["aws"] |= {"ssh_from": ["8.8.8.0/24"], "image": "ami-1", "gpu_image": "ami-2"}
    data["gcp"] |= {"project": "ours"}
    data["local"] = {"head": "10.0.0.1", "workers": ["10.0.0.2"]}
    config = yaml.safe_load(render(validate(ClusterSpec, data), provider))
    assert isinstance(config, dict)
    return config


@pytest.fixture
def examined(tmp_path: Path) -> Callable[[dict[str, Any]], CheckReport]:
    def examined(config: dict[str, Any]) -> CheckReport:
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(config))
        return check_file(tmp_path / "cluster.yaml")

    return examined


def put(config: dict[str, Any], place: str, value: Any) -> None:
    *outer, last = place.split(".")
    inner: Any = config
    for key in outer:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[int(last) if isinstance(inner, list) else last] = value


def test_the_shipped_file_lacks_only_edits_and_credentials() -> None:
    report = check_file(HOME / "cluster.yaml")
    assert all("still the example's" in line for line in report.findings[:-1]), report.findings
    assert report.findings[-1].startswith("provider: no credentials for AWS")
    assert any(line.startswith(f"{GPU}.node_config.ImageId: ") for line in report.findings)


@pytest.mark.parametrize("provider", ["aws", "gcp", "azure", "local"])
def test_an_edited_file_lacks_only_credentials(
    provider: Provider, examined: Callable[[dict[str, Any]], CheckReport]
) -> None:
    findings = examined(rendered(provider)).findings
    assert [line for line in findings if "no credentials" not in line] == []
    assert len(findings) == (provider != "local")


MISTAKES: list[tuple[str, Any, str]] = [
    ("max_worker", 3, "the file: Additional properties are not allowed ('max_worker'"),
    (f"{GPU}.min_workers", 5, "provider: Ray refuses the file: The specified global `max_w"),
    (f"{GPU}.resources", {"CPU": "4"}, f"{GPU}.resources.CPU: '4' is not of type 'integer'"),
    ("head_node_type", "hed", "provider: Ray refuses the file: `head_node_type` must be one of"),
    (
        f"{GPU}.node_config.InstanceType",
        "g6.xlrage",
        f"{GPU}.node_config.InstanceType: 'g6.xlrage' is not in the catalogue; did you mean 'g6.x",
    ),
    (f"{GPU}.resources", {"CPU": 8, "GPU": 1}, f"{GPU}.resources.CPU: 8, but g6.xlarge has 4"),
    (f"{GPU}.resources", {"CPU": 4, "GPU": 2}, f"{GPU}.resources.GPU: 2, but g6.xlarge has 1"),
    (f"{GPU}.resources", {"CPU": 4}, f"{GPU}.resources.GPU: 0, but g6.xlarge has 1"),
    (
        f"{GPU}.resources",
        {"CPU": 4, "GPU": 1, "memory": 2**35},
        f"{GPU}.resources.memory: 32.0 GiB, but g6.xlarge has 16.0",
    ),
    (
        f"{GPU}.node_config.InstanceType",
        "g6.2xlarge",
        f"{GPU}.labels.heliostat.io/instance: g6.xlarge, but g6.2xlarge is asked for",
    ),
    (
        "provider.region",
        "us-west-2",
        f"{GPU}.labels.heliostat.io/region: us-east-1, but us-west-2 is asked for",
    ),
    ("provider.region", "us-west-2", "provider.availability_zone: us-east-1a is not in us-west-2"),
    (
        "provider.availability_zone",
        "us-east-12a",
        "provider.availability_zone: us-east-12a is not in us-east-1",
    ),
    ("provider.region", "us-easy-1", "provider.region: AWS has no region 'us-easy-1'"),
    (
        f"{GPU}.node_config.BlockDeviceMappings.0.Ebs.VolumeSize",
        20,
        f"{GPU}.node_config.BlockDeviceMappings.0.Ebs.VolumeSize: 20 GB, needs at least 40",
    ),
    (
        f"{GPU}.node_config.BlockDeviceMappings",
        [],
        f"{GPU}.node_config.BlockDeviceMappings: none given, the image's own is small",
    ),
    (
        "setup_commands.0",
        "pip install 'ray[default]==2.40.0'",
        "setup_commands.0: ray 2.40.0 there, but ",
    ),
    (
        "head_setup_commands.0",
        "python -m cluster.doors --group ours",
        "head_setup_commands.0: there is no module cluster.doors in this version; render the ",
    ),
    ("setup_commands.0", "pip install -c ~/pins.txt ray", "setup_commands.0: ~/pins.txt is not am"),
    (
        "provider.security_group.IpPermissions.0.IpRanges.0.CidrIp",
        "0.0.0.0/0",
        "provider.security_group.IpPermissions.0: port 22 is open to the world (0.0.0.0/0)",
    ),
    ("head_setup_commands", [], "head_setup_commands: Ray's launcher opens port 22 to the world"),
    (
        "head_start_ray_commands.0",
        "export RAY_AUTH_MODE=token; ray start --head --dashboard-host=0.0.0.0",
        "head_start_ray_commands.0: --dashboard-host 0.0.0.0 listens to the world",
    ),
    (
        "worker_start_ray_commands.0",
        "ray start --address=$RAY_HEAD_IP:6379",
        "worker_start_ray_commands.0: starts Ray without RAY_AUTH_MODE=token",
    ),
    ("file_mounts", {"~/heliostat": "."}, "file_mounts: lacks ~/.ray/auth_token"),
    ("auth.ssh_private_key", "~/none.pem", "auth.ssh_private_key: there is no "),
    ("file_mounts.~/data", "./none", "file_mounts.~/data: there is no ./none"),
    ("cluster_name", "my-bucket", "cluster_name: still the example's my-bucket"),
]


@pytest.mark.parametrize(("place", "value", "line"), MISTAKES, ids=lambda it: str(it)[:40])
def test_a_mistake_gives_a_line(
    place: str, value: Any, line: str, examined: Callable[[dict[str, Any]], CheckReport]
) -> None:
    config = rendered()
    put(config, place, value)
    findings = examined(config).findings
    assert [found for found in findings if found.startswith(line)], findings


def test_rays_default_commands_are_reported(
    examined: Callable[[dict[str, Any]], CheckReport],
) -> None:
    config = rendered()
    for key in ("setup_commands", "head_start_ray_commands"):
        del config[key]
    findings = "\n".join(examined(config).findings)
    assert "installs a nightly build of Ray" in findings
    assert "--dashboard-host 0.0.0.0 listens to the world" in findings


def test_pins_that_differ_from_the_installed_versions(
    tmp_path: Path, examined: Callable[[dict[str, Any]], CheckReport]
) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "constraints.txt").write_text("pydantic==1.0\nnot-here==3\n")
    config = rendered()
    config["file_mounts"]["~/heliostat"] = str(tmp_path / "project")
    wrong = [line for line in examined(config).findings if "no credentials" not in line]
    assert len(wrong) == 1
    assert re.search(r"constraints\.txt: pydantic 1\.0 there, but [\d.]+ here", wrong[0])


def test_a_region_without_the_instance_type(
    monkeypatch: pytest.MonkeyPatch, examined: Callable[[dict[str, Any]], CheckReport]
) -> None:
    """With credentials, AWS is asked; here moto answers."""
    moto = pytest.importorskip("moto")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    config = rendered()
    config["provider"] |= {"region": "eu-north-1", "availability_zone": "eu-north-1a"}
    config[GPU.partition(".")[0]]["gpu"]["node_config"]["InstanceType"] = "p3.8xlarge"
    config[GPU.partition(".")[0]]["gpu"]["resources"] = {"CPU": 32, "GPU": 4}
    with moto.mock_aws():
        findings = examined(config).findings
    assert f"{GPU}.node_config.InstanceType: eu-north-1 has no p3.8xlarge" in findings
    assert not [line for line in findings if "m7i.xlarge" in line or "credentials" in line]


def test_a_private_key_that_others_may_read(
    tmp_path: Path, examined: Callable[[dict[str, Any]], CheckReport]
) -> None:
    (tmp_path / "key.pem").touch(mode=0o644)
    config = rendered()
    config["auth"]["ssh_private_key"] = "~/key.pem"
    assert "others may read" in examined(config).findings[0]
    (tmp_path / "key.pem").chmod(0o600)
    assert "key.pem" not in str(examined(config).findings)


def test_the_lowest_and_highest_price_with_date_and_source(
    examined: Callable[[dict[str, Any]], CheckReport],
) -> None:
    config = rendered("gcp")
    config["available_node_types"]["gpu"]["min_workers"] = 1
    first, *rest = examined(config).prices
    # e2-standard-4 0.134, g2-standard-4 0.3106 on spot and 0.7045 on demand, which may take over
    assert first.startswith("price: $0.44 an hour at least, $2.95 at most")
    assert len(rest) == 3
    assert all(re.search(r"in us-\w+\d, 2026-\d\d-\d\d, \S+", line) for line in rest)
    config["max_workers"] = 2
    assert "$1.54 at most" in examined(config).prices[0]
    config["available_node_types"]["gpu"]["node_config"]["machineType"] = "x9-mega"
    assert examined(config).prices == ["price: unknown for x9-mega"]
    assert "unknown" in examined(rendered("local")).prices[0]


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="for Kubernetes"):
        check_file(HOME / "cluster" / "definition" / "launch" / "kuberay.yaml")
    with pytest.raises(SpecError, match="not a file for Ray's launcher"):
        check_file(SHIPPED_SPEC)
    with pytest.raises(SpecError, match="No such file"):
        check_file(tmp_path / "none.yaml")
