"""Ray's authentication token: one secret, the same on this machine and on every node."""

import os
import secrets
from pathlib import Path


def ensure_token() -> Path:
    """The token's file, which only its owner may read; it is created if there is none.

    Ray creates one too, but with permissions that let every user of the machine read it.
    """
    path = token_path()
    path.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        path.chmod(0o600)
        return path
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return path


def token_path() -> Path:
    """Where Ray looks for the token by default."""
    return Path("~/.ray/auth_token").expanduser()


def read_token() -> str | None:
    """The token that Ray's clients would send, or None.

    RAY_AUTH_TOKEN comes first, then the file RAY_AUTH_TOKEN_PATH, then the default file.
    """
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or token_path()).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def auth_headers() -> dict[str, str]:
    """The HTTP headers that authenticate a request to a dashboard; empty without a token."""
    token = read_token()
    return {"Authorization": f"Bearer {token}"} if token else {}
