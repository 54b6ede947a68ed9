"""The token that all of Ray asks for: one secret, on this machine and on every node."""

import os
import secrets
from pathlib import Path


def ensure_token() -> Path:
    """The token's file, which nobody else may read; made if there is none.

    Ray makes one too, but readable by everybody on the machine.
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
    return Path("~/.ray/auth_token").expanduser()


def read_token() -> str | None:
    """What Ray's own clients would send: the environment's token, or its file's, or ours."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or token_path()).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def auth_headers() -> dict[str, str]:
    """The headers of a request to a cluster's dashboard; none without a token."""
    token = read_token()
    return {"Authorization": f"Bearer {token}"} if token else {}
