"""The line of a launcher's output that says why it failed."""

import pytest

from cluster.lifecycle.launcher_output import error_line


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
        ("", "ended without a message"),
    ],
)
def test_the_line_that_names_the_cause_is_found(output: str, reason: str) -> None:
    assert error_line(output) == reason
