"""Close SSH to the internet: `python -m cluster.lifecycle.aws_ssh_ingress --group G --region R`.

On AWS, Ray's launcher allows SSH from everywhere in each security group that it creates, in
addition to the rules of the file. This program revokes the rules for everywhere. The head runs
it during its set-up, so that it also takes effect after a plain `ray up`; until then only sshd
is reachable, and it asks for a key.
"""

import argparse
import sys
from typing import Any

ANYWHERE = ("0.0.0.0/0", "::/0")
_RULE_KEYS = ("IpProtocol", "FromPort", "ToPort")


def revoke_public_ingress(client: Any, group: str) -> list[str]:
    """Revoke all rules that allow everybody in the groups of this name; a line for each change.

    `client` is a boto3 client for EC2. A group in which no other rule allows SSH is not changed,
    because then no one could connect any more.
    """
    found = client.describe_security_groups(Filters=[{"Name": "group-name", "Values": [group]}])
    lines = []
    for described in found["SecurityGroups"]:
        rules = described["IpPermissions"]
        if not any(_select_ranges(rule, public=False) for rule in rules if _is_ssh(rule)):
            lines.append(f"{described['GroupId']}: SSH has no other way in, left as it is")
            continue
        for rule in rules:
            public = _select_ranges(rule, public=True)
            if public:
                ports = {key: rule[key] for key in _RULE_KEYS if key in rule}
                client.revoke_security_group_ingress(
                    GroupId=described["GroupId"], IpPermissions=[{**ports, **public}]
                )
                closed = rule.get("FromPort", "all ports")
                lines.append(f"{described['GroupId']}: closed {closed} to the internet")
    return lines


def _is_ssh(rule: dict[str, Any]) -> bool:
    return bool(rule["IpProtocol"] == "tcp" and rule["FromPort"] <= 22 <= rule["ToPort"])


def _select_ranges(rule: dict[str, Any], public: bool) -> dict[str, list[dict[str, str]]]:
    """The rule's address ranges that are everywhere, or all others, in the API's own form."""
    found = {}
    for key, name in (("IpRanges", "CidrIp"), ("Ipv6Ranges", "CidrIpv6")):
        ranges = [each for each in rule.get(key, []) if (each[name] in ANYWHERE) == public]
        if ranges:
            found[key] = [{name: each[name]} for each in ranges]
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
