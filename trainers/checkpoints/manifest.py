"""The manifest of a checkpoint: its step, its scalars, and the size and SHA-256 of every file.

And which files are pickles: loading one runs any code that its author put there.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from cluster.base.errors import CheckpointError
from trainers.stores import MANIFEST

PICKLE_PROTOCOLS = (b"\x02", b"\x03", b"\x04", b"\x05")
PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, by its suffix or its first bytes."""
    with path.open("rb") as file:
        start = file.read(9)
    # Pickle protocols 2 to 5, and the archives of torch.save. A safetensors file begins with the
    # length of its header, which can look like a protocol, and then the header.
    pickled = start[:1] == b"\x80" and start[1:2] in PICKLE_PROTOCOLS and start[8:] != b"{"
    return path.suffix in PICKLE_SUFFIXES or pickled or start.startswith(b"PK\x03\x04")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint and check every file against it.

    Raises CheckpointError if the manifest or a file is missing, truncated or damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if not isinstance(manifest, dict) or manifest.get("sha256") != _manifest_digest(manifest):
            raise CheckpointError(f"{path}: {MANIFEST} is damaged")
        for name, expected in manifest["files"].items():
            if (path / name).stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{path}: {name} is truncated")
            if file_digest(path / name) != expected:
                raise CheckpointError(f"{path}: {name} is damaged (its SHA-256 differs)")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is not a checkpoint: {error}") from error
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest into `folder`, with a digest of its own."""
    content = {**manifest, "sha256": _manifest_digest(manifest)}
    (folder / MANIFEST).write_text(json.dumps(content))


def file_digest(path: Path) -> dict[str, Any]:
    """The entry of a file in a manifest."""
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _manifest_digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
