"""Credentials are found, and text that only resembles them is not."""

from pathlib import Path

import pytest

from cluster.jobs.secret_scan import find_secrets, secret_in_text

# Assembled here, so that scanners do not find keys in this file.
AWS = "AKIA" + "ABCDEFGHIJKLMNOP"
GITHUB = "ghp" + "_" + "a1B2" * 9
ARMOUR = "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nb3BlbnNzaC1rZXk=\n"


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("deploy/id_ed25519", "", "a private key"),
        ("keys/server.txt", ARMOUR, "a private key, in line 1"),
        ("home/.aws/credentials", "[default]\n", "credentials of AWS"),
        ("settings.py", f"import os\n\nKEY = '{AWS}'\n", "an access key of AWS, in line 3"),
        ("notes.md", f"use {GITHUB}\n", "a token of GitHub, in line 1"),
        ("account.json", '{"private_key": "' + ARMOUR.replace("\n", "\\n"), "a private key, in"),
        (".env", "DEBUG=1\nDB_PASSWORD=hunter2hunter2\n", "a secret, in line 2"),
        (".env.production", "URL=postgres://me:secretword@db/x\n", "a secret, in line 1"),
        (".netrc", "machine x\n", "passwords of hosts"),
    ],
)
def test_keys_are_found(tmp_path: Path, name: str, text: str, what: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    (line,) = find_secrets(tmp_path, [Path(name)])
    assert line.startswith(f"{name}: {what}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("id_rsa.pub", "ssh-rsa AAAAB3NzaC1yc2E me@here\n"),
        ("server.pem", "-----BEGIN CERTIFICATE-----\nMIIB\n"),
        ("README.md", "set AWS_ACCESS_KEY_ID to AKIA" + "IOSFODNN7EXAMPLE and you are done\n"),
        (".env.example", "TOKEN=<your token>\nPASSWORD=changeme123\n"),
        (".env", "TOKENIZERS_PARALLELISM=false\nSECRET=${FROM_VAULT}\nSEED=1234567890\n"),
        ("train.py", "token = tokens[0]; password = None; sk = 'sk-learn'\n"),
        ("digest.txt", "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08\n"),
        ("link.md", "https://user:<password>@host/ and http://127.0.0.1:8265\n"),
    ],
)
def test_text_that_resembles_a_key_is_not_found(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert find_secrets(tmp_path, [Path(name)]) == []


def test_arguments_of_a_command() -> None:
    assert (
        secret_in_text("tracking.uri=https://me:secretword@mlflow.internal")
        == "a password in a URL"
    )
    assert secret_in_text(f"data.key={AWS}") == "an access key of AWS"
    assert secret_in_text("checkpoint.uri=s3://bucket/path?region=eu-west-1") is None
    assert secret_in_text("tracking.uri=http://10.0.0.1:5000") is None


def test_this_checkout_contains_no_keys() -> None:
    home = Path(__file__).parents[3]
    files = [path.relative_to(home) for path in (home / "cluster").rglob("*") if path.is_file()]
    files += [path.relative_to(home) for path in (home / "tests").rglob("*.py")]
    assert find_secrets(home, files) == []
