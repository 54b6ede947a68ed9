"""What looks like a key and must not leave this machine: in files, and in words.

Patterns are of the kind that hit hardly anything else: the marks that issuers put into their
tokens, the armour of private keys, the files of cloud credentials. Random-looking strings alone
are not taken for secrets.
"""

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

MAX_SCANNED_BYTES = 4 << 20
"""How much of a file is looked at, from its beginning; keys are small."""

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
    """A line for each of the `files` below `folder` that looks like it holds a key."""
    return [f"{path}: {what}" for path in files if (what := _secret_in_file(folder / path, path))]


def secret_in_text(text: str) -> str | None:
    """What kind of key a text such as a value on the command line holds; None for none."""
    data = text.encode(errors="replace")
    found = _PASSWORD.search(data)
    if found and not _PLACEHOLDER.search(found["value"]):
        return "a password in a URL"
    return _match_key_patterns(data)


def _secret_in_file(path: Path, name: Path) -> str | None:
    for what, patterns in _CREDENTIAL_FILES.items():
        if any(fnmatch.fnmatch(f"/{name.as_posix()}", f"*/{pattern}") for pattern in patterns):
            return what
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SCANNED_BYTES)
    except OSError:  # cannot be read, so cannot be sent either
        return None
    if re.fullmatch(r"\.env(\..+)?|.+\.env", name.name):
        for found in (*_SETTING.finditer(data), *_PASSWORD.finditer(data)):
            if not _PLACEHOLDER.search(found["value"]):
                return f"a secret, in line {_line_number(data, found)}"
    return _match_key_patterns(data, lines=True)


def _match_key_patterns(data: bytes, lines: bool = False) -> str | None:
    for what, pattern in _KEY_PATTERNS.items():
        for found in re.finditer(pattern, data):
            if b"EXAMPLE" not in found[0]:
                return f"{what}, in line {_line_number(data, found)}" if lines else what
    return None


def _line_number(data: bytes, found: re.Match[bytes]) -> int:
    return data.count(b"\n", 0, found.end()) + 1
