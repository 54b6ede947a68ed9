"""What the launcher makes of a file and of Ray's words; tests/rack has it on hosts."""

import pytest

from cluster.lifecycle.launcher import error_line, minimum_node_count


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "2026-01-01 00:00:00,000\tVINFO command_runner.py:399 -- Running `RAY_timeout_ms=3 x`\n"
            "jsonschema.exceptions.ValidationError: Additional properties ('idle' was unexpected)\n"
            "On instance:\n    {'x': 'RAY_error=1'}\n",
            "jsonschema.exceptions.ValidationError: Additional properties ('idle' was unexpected)",
        ),
        (
            "ubuntu@1.2.3.4: Permission denied (publickey).\r\n"
            "\x1b[31m!!!\x1b[39m\nSSH command failed.\nError: Failed to setup head node.\n",
            "ubuntu@1.2.3.4: Permission denied (publickey).",
        ),
        (
            "\x1b[31m│\x1b[0m   ERROR: No matching distribution found for setuptools>=77\n"
            "note: This error originates from a subprocess, and is no problem with pip.\n"
            "Shared connection to 1.2.3.4 closed.\nclick.exceptions.ClickException: SSH command "
            "failed.\nERR updater.py:194 -- !!!\nPANIC commands.py:925 -- Failed to setup\n",
            "ERROR: No matching distribution found for setuptools>=77",
        ),
        ("", "ended without a word"),
    ],
)
def test_the_line_that_says_why(output: str, reason: str) -> None:
    assert error_line(output) == reason


def test_minimum_nodes_count_the_head() -> None:
    local = {"provider": {"type": "local", "worker_ips": ["1.1.1.1", "1.1.1.2"]}}
    assert minimum_node_count(local) == 3
    assert minimum_node_count({**local, "min_workers": 1}) == 2
    kinds = {"head": {}, "spot": {"min_workers": 2}, "dear": {"min_workers": 1}}
    cloud = {"provider": {"type": "aws"}, "head_node_type": "head", "available_node_types": kinds}
    assert minimum_node_count(cloud) == 4
