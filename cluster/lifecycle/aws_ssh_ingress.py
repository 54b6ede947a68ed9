"""Shut what Ray's launcher opens: `python -m cluster.lifecycle.aws_ssh_ingress --group NAME --region REGION`.

On AWS the launcher lets SSH in from everywhere into each security group that it makes, whatever
the file says, and adds the file's own rules to that. This takes the rules for everybody away. The
head runs it at its set-up, so it holds for plain `ray up` as well; until then sshd alone is
reachable, and asks for a key.
"""

import argparse
import sys
from typing import Any

ANYWHERE = ("0.0.0.0/0", "::/0")


def revoke_public_ingress(client: Any, group: str) -> list[str]:
    """Revoke all rules that let everybody into the groups of this name; returns one line each.

    `client` is boto3's for EC2. A group without another rule for SSH is left as it is, since
    nobody could enter any more.
    """
    found = client.describe_security_groups(Filters=[{"Name": "group-name", "Values": [group]}])
    said = []
    for described in found["SecurityGroups"]:
        rules = described["IpPermissions"]
        if not any(_select_ranges(rule, others=True) for rule in rules if _is_ssh(rule)):
            said.append(f"{described['GroupId']}: SSH has no other way in, left as it is")
            continue
        for rule in rules:
            wide = _select_ranges(rule, others=False)
            if wide:
                which = {key: rule[key] for key in _RULE_KEYS if key in rule}
                client.revoke_security_group_ingress(
                    GroupId=described["GroupId"], IpPermissions=[{**which, **wide}]
                )
                said.append(f"{described['GroupId']}: shut {rule.get('FromPort', 'all ports')}")
    return said


_RULE_KEYS = ("IpProtocol", "FromPort", "ToPort")


def _is_ssh(rule: dict[str, Any]) -> bool:
    return bool(rule["IpProtocol"] == "tcp" and rule["FromPort"] <= 22 <= rule["ToPort"])


def _select_ranges(rule: dict[str, Any], others: bool) -> dict[str, list[dict[str, str]]]:
    """The rule's networks that are everybody, or the `others`, as the API wants them back."""
    found = {}
    for key, name in (("IpRanges", "CidrIp"), ("Ipv6Ranges", "CidrIpv6")):
        fitting = [it for it in rule.get(key, []) if (it[name] in ANYWHERE) != others]
        if fitting:
            found[key] = [{name: it[name]} for it in fitting]
    return found


def main(arguments: list[str]) -> int:
    import boto3

    parser = argparse.ArgumentParser(prog="python -m cluster.lifecycle.aws_ssh_ingress")
    parser.add_argument("--group", required=True)
    parser.add_argument("--region", required=True)
    args = parser.parse_args(arguments)
    for line in revoke_public_ingress(boto3.client("ec2", region_name=args.region), args.group):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
