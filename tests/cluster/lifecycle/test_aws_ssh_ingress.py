"""Rules for everybody are revoked, on moto's EC2 in this process."""

from typing import Any

import pytest

from cluster.lifecycle.aws_ssh_ingress import revoke_public_ingress

boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto")

SSH = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22}


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with moto.mock_aws():
        yield boto3.client("ec2", region_name="us-east-1")


def group(ec2: Any, *networks: str) -> str:
    """A security group as Ray's launcher creates it: everybody, and the networks of the file."""
    made = ec2.create_security_group(GroupName="heliostat", Description="Ray's")["GroupId"]
    ranges = [{"CidrIp": network} for network in networks]
    inside = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": made}]}
    rules = [{**SSH, "IpRanges": ranges}, inside]
    ec2.authorize_security_group_ingress(GroupId=made, IpPermissions=rules)
    return str(made)


def rules_of(ec2: Any, made: str) -> list[dict[str, Any]]:
    return list(ec2.describe_security_groups(GroupIds=[made])["SecurityGroups"][0]["IpPermissions"])


def test_only_rules_for_everybody_are_revoked(ec2: Any) -> None:
    made = group(ec2, "0.0.0.0/0", "203.0.113.0/24")
    assert len(revoke_public_ingress(ec2, "heliostat")) == 1
    ranges = [it["CidrIp"] for rule in rules_of(ec2, made) for it in rule["IpRanges"]]
    assert ranges == ["203.0.113.0/24"]
    inside = [rule for rule in rules_of(ec2, made) if rule["UserIdGroupPairs"]]
    assert inside
    assert revoke_public_ingress(ec2, "heliostat") == []


def test_the_only_rule_for_ssh_is_kept(ec2: Any) -> None:
    made = group(ec2, "0.0.0.0/0")
    assert "left as it is" in revoke_public_ingress(ec2, "heliostat")[0]
    assert any(rule["IpRanges"] for rule in rules_of(ec2, made))
