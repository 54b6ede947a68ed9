"""Finds credentials that must not leave this machine, in files and in command-line arguments.

The patterns have hardly any false positives: prefixes that issuers put into their tokens, headers
of private keys, names of cloud credential files. A random-looking string alone is not a finding.
"""

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

MAX_SCANNED_BYTES = 4 << 20
"""How much of a file is read, from its beginning; files with keys are small."""

_CREDENTIAL_FILES = {
    "credentials of AWS": (".aws/credentials",),
    "credentials of Google Cloud": ("application_default_credentials.json", "credentials.db"),
    "credentials of Azure": ("accessTokens.json", "msal_token_cache.*"),
    "credentials of a package index": (".pypirc", ".npmrc"),
    "passwords of hosts": (".netrc", "_netrc", ".pgpass", ".git-credentials"),
    "credentials of Kaggle": ("kaggle.json",),
    "a token of a Ray cluster": (".ray/auth_token",),
    "credentials of container registries": (".docker/config.json", ".dockercfg"),
    "credentials of Kubernetes": (".kube/config",),
    "a private key": ("id_rsa", "id_ed25519", "id_ecdsa", "id_dsa", "*.p12", "*.pfx"),
}

_KEY_PATTERNS = {
    "a private key": rb"-----BEGIN (?:[A-Z0-9]+ ){0,2}PRIVATE KEY(?: BLOCK)?-----",
    "an access key of AWS": rb"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z2-7]{16}(?![A-Z0-9])",
    "a secret key of AWS": rb"(?i)aws_secret_access_key['\"]?\s*[=:]\s*['\"]?[a-z0-9/+]{40}\b",
    "a key of Google": rb"(?<![\w-])AIza[\w-]{35}(?![\w-])",
    "a key of Azure storage": rb"AccountKey=[A-Za-z0-9+/]{86}==",
    "a token of GitHub": rb"(?<!\w)(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{60,})",
    "a token of GitLab": rb"(?<!\w)glpat-[\w-]{20,}",
    "a token of Hugging Face": rb"(?<!\w)hf_[A-Za-z]{34}(?!\w)",
    "a token of Slack": rb"(?<!\w)xox[abprs]-[0-9A-Za-z-]{20,}",
    "a token of a package index": rb"(?<!\w)(?:pypi-AgE[\w-]{50,}|npm_[A-Za-z0-9]{36}(?!\w))",
    "a key of Weights & Biases": rb"WANDB_API_KEY\s*=\s*['\"]?[0-9a-f]{40}",
    "a key of a language-model service": rb"(?<!\w)sk-(?:ant-|proj-)?[\w-]{0,12}[A-Za-z0-9]{32,}",
    "a key of a Kubernetes client": rb"client-key-data:\s*[A-Za-z0-9+/]{100,}",
}

_SETTING = re.compile(
    rb"(?im)^\s*(?:export\s+)?\w*(?:SECRET|TOKEN|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)"
    rb"\w*\s*=\s*['\"]?(?P<value>[^\s'\"#]{8,})"
)
"""A line of an .env file that sets a secret."""

_PASSWORD = re.compile(rb"[a-zA-Z][\w+.-]*://[^\s/:@'\"]*:(?P<value>[^\s/@'\"]+)@")
"""A URL with a password in it."""

_PLACEHOLDER = re.compile(rb"(?i)[<>${}*]|example|change|your|dummy|placeholder|xxx|redacted")


def find_secrets(folder: Path, files: Iterable[Path]) -> list[str]:
    """A line for each of the `files` below `folder` that seems to contain a credential."""
    return [f"{path}: {kind}" for path in files if (kind := _secret_in_file(folder / path, path))]


def secret_in_text(text: str) -> str | None:
    """The kind of credential in a text, such as a command-line argument, or None."""
    data = text.encode(errors="replace")
    found = _PASSWORD.search(data)
    if found and not _PLACEHOLDER.search(found["value"]):
        return "a password in a URL"
    return _match_key_patterns(data)


def _secret_in_file(path: Path, name: Path) -> str | None:
    for kind, patterns in _CREDENTIAL_FILES.items():
        if any(fnmatch.fnmatch(f"/{name.as_posix()}", f"*/{pattern}") for pattern in patterns):
            return kind
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SCANNED_BYTES)
    except OSError:  # it cannot be packaged either
        return None
    if re.fullmatch(r"\.env(\..+)?|.+\.env", name.name):
        for found in (*_SETTING.finditer(data), *_PASSWORD.finditer(data)):
            if not _PLACEHOLDER.search(found["value"]):
                return f"a secret, in line {_line_number(data, found)}"
    return _match_key_patterns(data, lines=True)


def _match_key_patterns(data: bytes, lines: bool = False) -> str | None:
    for kind, pattern in _KEY_PATTERNS.items():
        for found in re.finditer(pattern, data):
            if b"EXAMPLE" not in found[0]:
                return f"{kind}, in line {_line_number(data, found)}" if lines else kind
    return None


def _line_number(data: bytes, found: re.Match[bytes]) -> int:
    return data.count(b"\n", 0, found.end()) + 1
