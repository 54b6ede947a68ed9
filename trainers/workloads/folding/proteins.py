"""Windows of protein backbones, generated or from files, and their contact scores.

The docstring of `workload.py` describes the data.
"""

import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from cluster.base.errors import SpecError
from trainers.data.tables import table
from trainers.workload import PartitionedWorkload, SplitFractions, shipped_or_path
from trainers.workloads.folding.folds import (
    Array,
    beta_carbons,
    distances,
    draw_sequences,
    generate_folds,
)
from trainers.workloads.folding.structures import chain_segments, structure_files, windows

# Suffixes: B samples, L residues. Backbones are [B, L, A, X], as in `folds.py`, and have none.

CHAINS_PER_PART = 256
"""Chains that a part folds; some are rejected."""
CONTACT_DISTANCE, MIN_SEPARATION = 8.0, 3
"""Largest distance of beta carbons in contact, in Å; smallest distance in the chain of a scored
pair."""
FILES_PER_PART = 16
"""Files that a part reads."""
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class ProteinPart(NamedTuple):
    """Generated chains of one split, by a seed; or chains of files, split by their hash."""

    split: str = ""
    seed: int = 0
    paths: tuple[str, ...] = ()


class Proteins(PartitionedWorkload):
    """Base of workloads whose data are protein backbones, in windows of `length` residues."""

    class Data(SplitFractions):
        """The proteins, and how informative their contact scores are."""

        source: Annotated[str, shipped_or_path("generated")] = "generated"
        """generated; or a folder of .pdb, .ent and .cif files, which may be gzipped."""
        length: Annotated[int, Field(ge=12)] = 36
        """Residues per sample. Chains of files are cut into windows that overlap by half; shorter
        and interrupted pieces are dropped."""
        signal: Annotated[float, Field(ge=0)] = 2.0
        """Amount that a contact adds to a pair's score, in standard deviations of the noise."""
        train_parts: PositiveInt = 6
        """Generated training parts, of about 220 folds each; there is one part more for validation
        and one for testing."""
        seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
        """Seed of the generated chains and of the noise."""
        val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
        """Share of the files' chains for validation."""
        test_fraction: Fraction = 0.1
        """Share of the files' chains for testing."""

    data: Data

    def made_with(self) -> dict[str, str]:
        if self.data.source == "generated":
            return {}
        try:
            return {"gemmi": version("gemmi")}
        except PackageNotFoundError:
            raise SpecError(
                "data.source: structure files need the package gemmi, which is not installed "
                "(pip install 'heliostat[folding]')"
            ) from None

    def parts(self) -> list[ProteinPart]:
        if self.data.source != "generated":
            files = structure_files(Path(self.data.source))
            return [
                ProteinPart(paths=tuple(files[start : start + FILES_PER_PART]))
                for start in range(0, len(files), FILES_PER_PART)
            ]
        splits = [*["train"] * self.data.train_parts, "val", "test"]
        return [ProteinPart(split, number) for number, split in enumerate(splits)]

    def part(self, part: ProteinPart, common: Mapping[str, bytes]) -> dict[str, pa.Table]:
        if not part.paths:
            random = np.random.default_rng((self.data.seed, part.seed))
            backbone, kind = generate_folds(CHAINS_PER_PART, self.data.length, random)
            residue = draw_sequences(backbone, kind, random)
            return {
                part.split: table(**sample_columns(residue, backbone, self.data.signal, random))
            }
        self.made_with()
        found: dict[str, list[tuple[Array, Array]]] = {"train": [], "val": [], "test": []}
        for path in part.paths:
            for piece in chain_segments(Path(path)):
                found[self._split(piece.chain_sequence)] += windows(piece, self.data.length)
        names = "/".join(Path(path).name for path in part.paths).encode()
        seed = int.from_bytes(hashlib.sha256(names).digest()[:8], "big")
        random = np.random.default_rng((self.data.seed, seed))
        tables = {}
        for split, cut in found.items():
            if cut:
                residue, backbone = (np.stack(each) for each in zip(*cut, strict=True))
                tables[split] = table(**sample_columns(residue, backbone, self.data.signal, random))
        return tables

    def _split(self, sequence: str) -> str:
        """By a hash of the whole chain's sequence, so that its copies are in the same split."""
        digest = hashlib.sha256(sequence.encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        if place < self.data.test_fraction:
            return "test"
        return "val" if place < self.data.test_fraction + self.data.val_fraction else "train"


def sample_columns(
    residue_BL: Array, backbone: Array, signal: float, random: np.random.Generator
) -> dict[str, Array]:
    """The columns of the data set: `score` is noise, plus `signal` for pairs in contact."""
    length = residue_BL.shape[1]
    scored_LL = np.triu(np.ones((length, length), bool), MIN_SEPARATION)
    contact_BLL = (distances(beta_carbons(backbone)) < CONTACT_DISTANCE) & (scored_LL | scored_LL.T)
    noise_BLL = np.where(scored_LL, random.standard_normal(contact_BLL.shape), 0)
    score_BLL = signal * contact_BLL + noise_BLL + noise_BLL.swapaxes(1, 2)
    centred = backbone - backbone[:, :, 1].mean(1)[:, None, None]
    return {
        "residue": residue_BL.astype(np.uint8),
        "backbone": centred.astype(np.float32),
        "contact": contact_BLL.astype(np.uint8),
        "score": score_BLL.astype(np.float16),
    }
