"""The data of `folding`, generated and from files; its metrics; its network."""

import gzip
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import pytest
import tmtools
import torch
from torch import Tensor

from cluster.base.config import validate
from cluster.base.errors import DataError, SpecError
from trainers.counter_rng import SampleRandom
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_splits
from trainers.devices import Cpu
from trainers.engine.evaluate import evaluate
from trainers.engine.step import TrainStep
from trainers.modeling.build import build_network
from trainers.spec import RunSpec, find_spec, resolve
from trainers.worker import Worker
from trainers.workloads.folding import folds, proteins
from trainers.workloads.folding.folds import (
    ANGLE_AT_C,
    ANGLE_AT_CA,
    ANGLE_AT_N,
    C_N,
    CA_C,
    HELIX,
    MIN_CA_DISTANCE,
    N_CA,
    beta_carbons,
    build_backbone,
    distances,
    generate_folds,
    radius_of_gyration,
    torsion_gradient,
)
from trainers.workloads.folding.geometry import best_rotation, pairwise_distances
from trainers.workloads.folding.metrics import lddt, tm_score_and_gdt_ts
from trainers.workloads.folding.network import (
    DISTANCE_BINS,
    StructureLayer,
    bin_edges,
    initial_frames,
    rotations_from_vectors,
)
from trainers.workloads.folding.proteins import CONTACT_DISTANCE, Array, ProteinPart
from trainers.workloads.folding.structures import AMINO_ACIDS, UNKNOWN_INDEX, chain_segments
from trainers.workloads.folding.workload import Folding, fape, in_local_frames, input_features
from tuning.programs.program import Program
from tuning.programs.program_signature import Variant
from tuning.spaces.space import SweepRunSpec, check_parameters, trial_spec_data

LENGTH = 36
ATOM = "ATOM  {:5}  {:3} ALA A   1    {:>8}   2.000   3.000  1.00  0.00"
"""A line of a PDB file."""
ATOM_SITE = "".join(
    f"_atom_site.{name}\n"
    for name in (
        *("group_PDB", "id", "type_symbol", "label_atom_id", "label_alt_id", "label_comp_id"),
        *("label_asym_id", "label_entity_id", "label_seq_id", "Cartn_x", "Cartn_y", "Cartn_z"),
        *("auth_seq_id", "auth_asym_id", "occupancy", "pdbx_PDB_model_num"),
    )
)
"""The columns of atoms in an mmCIF file."""


def folding(model: dict[str, Any] | None = None, **data: Any) -> Folding:
    return Folding(validate(Folding.Data, data), validate(Folding.Model, model or {}))


@pytest.fixture(scope="module")
def folded() -> tuple[Array, Array]:
    """Backbones [B, L, 3, 3], and helices, strands and loops."""
    return generate_folds(48, LENGTH, np.random.default_rng(3))


@pytest.fixture(scope="module")
def batch(folded: tuple[Array, Array]) -> dict[str, Tensor]:
    random = np.random.default_rng(0)
    residue = folds.draw_sequences(*folded, random)
    columns = proteins.sample_columns(residue, folded[0], 2.0, random)
    batch = {name: torch.from_numpy(values[:6]) for name, values in columns.items()}
    return {name: v.double() if v.is_floating_point() else v for name, v in batch.items()}


def small(**sections: Any) -> tuple[RunSpec, dict[str, Tensor]]:
    """A short run of a small network, and its training data."""
    data = {
        "workload": "folding",
        "data": {"length": 12},
        "model": {"blocks": 1, "width": 8, "iterations": 2},
        "train": {"global_batch": 4, "precision": "fp64", "steps": 3},
        "tracking": {"every_steps": 1},
        **sections,
    }
    random = np.random.default_rng(0)
    backbone, kind = generate_folds(8, 12, random)
    columns = proteins.sample_columns(
        folds.draw_sequences(backbone, kind, random), backbone, 2.0, random
    )
    spec, _ = resolve(data, RunSpec)
    return spec, {name: torch.from_numpy(values) for name, values in columns.items()}


def losses(**sections: Any) -> list[float]:
    spec, samples = small(**sections)
    _, workload = resolve(spec.model_dump(), RunSpec)
    stepper = TrainStep(spec, workload, samples, Worker(), 3)
    return [stepper.run(step).item() for step in range(3)]


def random_rotation(seed: int = 0) -> Tensor:
    """A rotation."""
    axes, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))
    return (axes * torch.linalg.det(axes)).double()


def angle(at: Array, one: Array, other: Array) -> Array:
    one, other = one - at, other - at
    sizes = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return np.arccos((one * other).sum(-1) / sizes)


class TestGeneratedFolds:
    def test_bonds_and_angles_are_ideal(self, folded: tuple[Array, Array]) -> None:
        nitrogen, alpha, carbon = (folded[0][:, :, atom] for atom in range(3))
        assert len(alpha) > 24
        for bond, size in (
            (alpha - nitrogen, N_CA),
            (carbon - alpha, CA_C),
            (nitrogen[:, 1:] - carbon[:, :-1], C_N),
        ):
            assert np.linalg.norm(bond, axis=-1) == pytest.approx(size, abs=1e-6)
        assert angle(alpha, nitrogen, carbon) == pytest.approx(ANGLE_AT_CA, abs=1e-6)
        before, after = np.s_[:, :-1], np.s_[:, 1:]
        ahead = angle(carbon[before], alpha[before], nitrogen[after])
        assert ahead == pytest.approx(ANGLE_AT_C, abs=1e-6)
        assert angle(nitrogen[after], carbon[before], alpha[after]) == pytest.approx(
            ANGLE_AT_N, abs=1e-6
        )
        # Flat and trans: Pauling's 3.8 Å from one alpha carbon to the next.
        assert np.linalg.norm(np.diff(alpha, axis=1), axis=-1) == pytest.approx(3.8, abs=0.05)

    def test_folds_have_no_clashes_and_are_as_compact_as_proteins(
        self, folded: tuple[Array, Array]
    ) -> None:
        alpha = folded[0][:, :, 1]
        near = distances(alpha)[:, *np.triu_indices(LENGTH, 3)]
        assert near.min() > MIN_CA_DISTANCE
        assert radius_of_gyration(alpha) == pytest.approx(2.2 * LENGTH**0.38, rel=0.25)
        assert np.median(radius_of_gyration(alpha)) == pytest.approx(2.2 * LENGTH**0.38, rel=0.25)
        contacts = (near < 8).sum(1) / LENGTH
        assert 0.5 < np.median(contacts) < 5

    def test_helices_are_right_handed_with_the_usual_rise(
        self, folded: tuple[Array, Array]
    ) -> None:
        """1.5 Å per residue: 15 Å in ten."""
        alpha, kind = folded[0][:, :, 1], folded[1]
        step = np.diff(alpha, axis=1)
        hand = (np.cross(step[:, :-2], step[:, 1:-1]) * step[:, 2:]).sum(-1)
        inside = np.stack([kind[:, at : LENGTH - 3 + at] == HELIX for at in range(4)]).all(0)
        assert (hand[inside] > 0).mean() > 0.9
        whole = np.stack([kind[:, at : LENGTH - 10 + at] == HELIX for at in range(11)]).all(0)
        rise = np.linalg.norm(alpha[:, 10:] - alpha[:, :-10], axis=-1)[whole]
        assert np.median(rise) == pytest.approx(15, abs=1)

    def test_the_gradient_of_torsions(self) -> None:
        random = np.random.default_rng(0)
        torsion = random.uniform(-3, 3, (2, 9, 2))
        weight = random.standard_normal((2, 9, 3))
        slope = torsion_gradient(build_backbone(torsion), weight)
        for residue, which in ((0, 1), (3, 0), (5, 1), (7, 0)):
            ends = []
            for step in (1e-5, -1e-5):
                moved = torsion.copy()
                moved[:, residue, which] += step
                # The first torsion also turns the whole chain around the origin.
                ends.append((build_backbone(moved)[:, :, 1] * weight).sum((1, 2)))
            if residue:
                assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope[:, residue, which])

    def test_a_seed_determines_a_part(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(proteins, "CHAINS_PER_PART", 8)
        monkeypatch.setattr(folds, "FOLDING_STEPS", 10)
        monkeypatch.setattr(folds, "MIN_CA_DISTANCE", 0)
        monkeypatch.setattr(folds, "MIN_ATOM_DISTANCE", 0)
        workload = folding(length=16)
        parts = [workload.part(ProteinPart("train", seed), {})["train"] for seed in (1, 1, 2)]
        assert parts[0].equals(parts[1])
        assert not parts[0].equals(parts[2])
        assert parts[0].column_names == ["residue", "backbone", "contact", "score"]
        other = folding(length=16, seed=1).part(ProteinPart("train", 1), {})["train"]
        assert not parts[0].equals(other)

    def test_scores_depend_on_contacts_only(self, folded: tuple[Array, Array]) -> None:
        random = np.random.default_rng(0)
        residue = folds.draw_sequences(*folded, random)
        columns = proteins.sample_columns(residue, folded[0], 3.0, random)
        score, contact = columns["score"].astype(float), columns["contact"] > 0
        apart = np.abs(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH)))
        assert (score == score.swapaxes(1, 2)).all()
        assert not score[:, apart < 3].any()
        near = distances(beta_carbons(folded[0])) < CONTACT_DISTANCE
        assert (contact == (near & (apart >= 3))).all()
        assert score[contact].mean() == pytest.approx(3, abs=0.1)
        noise = score[:, apart >= 3] - 3 * contact[:, apart >= 3]
        assert noise.mean() == pytest.approx(0, abs=0.02)
        assert noise.std() == pytest.approx(1, abs=0.02)

    def test_hydrophobic_residues_are_inside(self, folded: tuple[Array, Array]) -> None:
        residue = folds.draw_sequences(*folded, np.random.default_rng(0))
        buried = (distances(beta_carbons(folded[0])) < 10).sum(2)
        greasy = np.isin(residue, [AMINO_ACIDS.index(letter) for letter in "ILVF"])
        charged = np.isin(residue, [AMINO_ACIDS.index(letter) for letter in "DEKR"])
        assert buried[greasy].mean() > buried[charged].mean() + 1


def structure(folded: tuple[Array, Array], count: int = 12) -> gemmi.Structure:
    """The first folds as chains of one model."""
    made, model = gemmi.Structure(), gemmi.Model(1)
    names = gemmi.expand_one_letter_sequence(AMINO_ACIDS * 2, gemmi.ResidueKind.AA)
    for number, backbone in enumerate(folded[0][:count]):
        chained = gemmi.Chain(chr(ord("A") + number))
        for place, atoms in enumerate(backbone):
            residue = gemmi.Residue()
            residue.name = names[(place + number) % 20]
            residue.seqid = gemmi.SeqId(place + 1, " ")
            for name, position in zip(("N", "CA", "C"), atoms, strict=True):
                atom = gemmi.Atom()
                atom.name, atom.element = name, gemmi.Element(name[0])
                atom.pos = gemmi.Position(*position)
                residue.add_atom(atom)
            chained.add_residue(residue)
        model.add_chain(chained)
    made.add_model(model)
    made.setup_entities()
    return made


class TestFiles:
    @pytest.mark.parametrize("ending", ["pdb", "cif", "pdb.gz"])
    def test_chains_are_read(
        self, folded: tuple[Array, Array], tmp_path: Path, ending: str
    ) -> None:
        path = tmp_path / f"folds.{ending}"
        if ending == "cif":
            structure(folded).make_mmcif_document().write_file(str(path))
        else:
            text = structure(folded).make_pdb_string().encode()
            path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
        found = chain_segments(path)
        assert [len(piece.residue_L) for piece in found] == [LENGTH] * 12
        for number, (_, residue, backbone) in enumerate(found):
            assert residue.tolist() == [(place + number) % 20 for place in range(LENGTH)]
            assert backbone == pytest.approx(folded[0][number], abs=1e-3)

    def test_interrupted_chains_are_not_joined(
        self, folded: tuple[Array, Array], tmp_path: Path
    ) -> None:
        made = structure(folded, 1)
        chained = made[0][0]
        chained[9].remove_atom("CA", "\0", gemmi.Element("C"))
        chained[20].name = "XYZ"
        made.write_pdb(str(tmp_path / "one.pdb"))
        first, second = chain_segments(tmp_path / "one.pdb")
        assert (len(first.residue_L), len(second.residue_L)) == (9, 26)
        assert second.residue_L[10] == UNKNOWN_INDEX
        assert first.chain_sequence == second.chain_sequence

    def test_windows_of_a_folder_become_splits(
        self, folded: tuple[Array, Array], tmp_path: Path
    ) -> None:
        for name in ("one.pdb", "copy.pdb"):
            structure(folded, 24).write_pdb(str(tmp_path / name))
        workload = folding(source=str(tmp_path), length=12, val_fraction=0.3, test_fraction=0.3)
        found = workload.dataset()
        assert set(found) == {"train", "val", "test"}
        assert sum(len(rows) for rows in found.values()) == 2 * 24 * 5
        sequences = {split: set(rows["residue"].to_pylist()) for split, rows in found.items()}
        for split, rows in found.items():
            assert len(rows) % 10 == 0, split  # copies, and windows of a chain, stay together
            assert len(sequences[split]) <= len(rows) // 2
        assert workload.made_with().keys() == {"gemmi"}

    @pytest.mark.parametrize(
        ("name", "text", "line"),
        [
            (
                "word.pdb",
                f"{ATOM.format(1, 'N', '1.000')}\n{ATOM.format(2, 'CA', 'x')}\n",
                "{path}: line 2: 'x   2.000   3.000' are not coordinates",
            ),
            ("short.pdb", "ATOM      1  N   ALA\n", "{path}: line 1: '' are not coordinates"),
            ("none.ent", "HEADER\n", "{path}: has no residue with the atoms N, CA and C"),
            (
                "loop.cif",
                "data_x\nloop_\n_atom_site.id\n_atom_site.Cartn_x\n1 2.0\n3\n",
                "{path}: line 2: Wrong number of values in loop _atom_site.*",
            ),
            ("none.cif", "hello", "{path}: line 1: expected block header (data_)"),
            (
                "word.cif",
                f"data_x\nloop_\n{ATOM_SITE}ATOM 1 N N . ALA A 1 1 1.0 2.0 3.0 7 A 1.0 1\n"
                "ATOM 2 C CA . ALA A 1 1 1.0 x 3.0 7 A 1.0 1\n"
                "ATOM 3 C C . ALA A 1 1 1.0 2.0 3.0 7 A 1.0 1\n",
                "{path}: residue 7 of chain A: its coordinates are not numbers",
            ),
            ("empty.cif", "data_x\n", "{path}: has no atoms"),
            ("plain.pdb.gz", "HEADER\n", "{path}: cannot be read: Not a gzipped file (b'HE')"),
        ],
    )
    def test_a_malformed_file_is_one_line(
        self, tmp_path: Path, name: str, text: str, line: str
    ) -> None:
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            folding(source=str(tmp_path)).dataset()
        assert str(caught.value) == line.format(path=path)

    def test_no_files(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="has no structure files"):
            folding(source=str(tmp_path)).dataset()

    def test_without_gemmi(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> str:
            raise proteins.PackageNotFoundError(name)

        monkeypatch.setattr(proteins, "version", missing)
        assert folding().made_with() == {}
        with pytest.raises(SpecError, match=r"which is not installed \(pip install 'heliostat\[f"):
            folding(source=str(tmp_path)).made_with()


class TestMetrics:
    def test_a_moved_structure_scores_one(self, folded: tuple[Array, Array]) -> None:
        true = torch.from_numpy(folded[0][:8, :, 1].copy())
        for found in (true @ random_rotation() + 5, true @ random_rotation(1) - 9):
            for score in (lddt(found, true), *tm_score_and_gdt_ts(found, true)):
                assert score.tolist() == pytest.approx([1.0] * 8, abs=1e-6)

    def test_only_superposition_detects_a_mirror_image(self, folded: tuple[Array, Array]) -> None:
        true = torch.from_numpy(folded[0][:8, :, 1].copy())
        assert lddt(-true, true).tolist() == pytest.approx([1.0] * 8)
        tm, gdt = tm_score_and_gdt_ts(-true, true)
        assert tm.max() < 0.7
        assert gdt.max() < 0.9

    def test_lddt_counts_reproduced_distances(self) -> None:
        """Four atoms in a row, 3 Å apart; the last one is moved by 1.5 Å along the row."""
        true = torch.zeros(1, 4, 3)
        true[0, :, 0] = torch.arange(4) * 3.0
        found = true.clone()
        found[0, 3, 0] += 1.5
        # Six pairs, of which three are off by 1.5 Å: within 2 and 4 Å, not within 0.5 and 1.
        assert lddt(found, true).item() == pytest.approx((3 * 1 + 3 * 0.5) / 6)

    def test_far_pairs_do_not_count_in_lddt(self) -> None:
        true = torch.zeros(1, 3, 3)
        true[0, :, 0] = torch.tensor([0.0, 3.0, 30.0])
        found = true.clone()
        found[0, 2, 0] += 7
        assert lddt(found, true).item() == pytest.approx(1)

    def test_gdt_counts_near_residues(self) -> None:
        """A long rod with a quarter of its residues far away."""
        true = torch.zeros(1, 80, 3)
        true[0, :, 0] = torch.arange(80) * 3.8
        true[0, :, 1] = 10 * torch.sin(torch.arange(80) / 3.0)
        found = true.clone()
        found[0, 60:, 2] += 500
        _, gdt = tm_score_and_gdt_ts(found, true)
        assert gdt.item() == pytest.approx(0.75, abs=0.01)

    @pytest.mark.parametrize(("noise", "within"), [(0.5, 0.03), (1.5, 0.06)])
    def test_tm_scores_are_those_of_tm_align(
        self, folded: tuple[Array, Array], noise: float, within: float
    ) -> None:
        """TM-align also searches for the alignment, so the scores differ more for worse matches."""
        true = torch.from_numpy(folded[0][:16, :, 1].copy())
        random = torch.Generator().manual_seed(1)
        found = (
            true @ random_rotation() + noise * torch.randn(true.shape, generator=random).double()
        )
        ours = tm_score_and_gdt_ts(found, true)[0].numpy()
        letters = "A" * LENGTH
        theirs = np.array(
            [
                tmtools.tm_align(one, other, letters, letters).tm_norm_chain2
                for one, other in zip(found.numpy(), true.numpy(), strict=True)
            ]
        )
        assert ours == pytest.approx(theirs, abs=within)

    def test_rotations_are_found(self) -> None:
        points = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
        rotation = random_rotation()
        found = best_rotation(points.T @ (points @ rotation.T))
        assert torch.allclose(found, rotation, atol=1e-9)


class TestNetwork:
    def test_the_backbone_is_ideal_and_has_the_shape_of_the_example(self) -> None:
        torch.manual_seed(0)
        workload = folding({"width": 16}, length=20)
        example = workload.example()
        assert example.shape == (1, 20, len(AMINO_ACIDS) + 20)
        backbone = workload.build()(torch.cat([example] * 2) + torch.rand(2, 20, 1))
        assert backbone.shape == (2, 20, 3, 3)
        nitrogen, alpha, carbon = (atom.numpy() for atom in backbone.detach().unbind(2))
        assert np.linalg.norm(alpha - nitrogen, axis=-1) == pytest.approx(N_CA, abs=1e-4)
        assert angle(alpha, nitrogen, carbon) == pytest.approx(ANGLE_AT_CA, abs=1e-3)

    def test_rotations_and_translations_change_nothing(self, batch: dict[str, Tensor]) -> None:
        """Loss and metrics, to 1e-4. A mirror image does change them."""
        torch.manual_seed(0)
        workload = folding({"width": 16})
        network = workload.build().double()
        output = workload.forward(network, batch)
        rotation = random_rotation()
        moved = {**batch, "backbone": batch["backbone"] @ rotation + 7}
        mirrored = {**batch, "backbone": -batch["backbone"]}
        for say in (
            lambda batch: workload.loss(output, batch),
            lambda batch: workload.metrics(output, batch)["tm_score"],
            lambda batch: workload.metrics(output, batch)["lddt_ca"],
            lambda batch: workload.metrics(output, batch)["gdt_ts"],
        ):
            assert torch.allclose(say(moved), say(batch), atol=1e-4)
        assert not torch.allclose(workload.loss(output, mirrored), workload.loss(output, batch))

    def test_the_structure_layer_is_equivariant(self) -> None:
        """In float32, to 1e-4."""
        torch.manual_seed(0)
        layer = StructureLayer(32, 16)
        torch.nn.init.normal_(layer.move.weight, std=0.1)
        single, pair = torch.randn(2, 12, 32), torch.randn(2, 12, 12, 16)
        rotation = rotations_from_vectors(torch.randn(2, 12, 3), torch.randn(2, 12, 3))
        place, turn = 5 * torch.randn(2, 12, 3), random_rotation().float()
        channels, (found, where) = layer(single, pair, (rotation, place))
        shift = torch.tensor([3.0, -8.0, 1.0])
        again, (turned_found, moved) = layer(
            single, pair, (turn @ rotation, place @ turn.T + shift)
        )
        assert torch.allclose(again, channels, atol=1e-4)
        assert torch.allclose(turned_found, turn @ found, atol=1e-4)
        assert torch.allclose(moved, where @ turn.T + shift, atol=1e-3)

    def test_it_starts_from_the_distances_that_it_predicts(self, batch: dict[str, Tensor]) -> None:
        true = batch["backbone"][:, :, 1]
        bins = (pairwise_distances(true)[..., None] > bin_edges(true)).sum(-1)
        certain = 1e4 * torch.nn.functional.one_hot(bins, DISTANCE_BINS).double()
        rotation, place = initial_frames(certain)
        assert lddt(place, true).mean() > 0.8
        tm, _ = tm_score_and_gdt_ts(place, true)
        mirrored, _ = tm_score_and_gdt_ts(-place, true)
        assert (tm > mirrored).all()
        assert torch.linalg.det(rotation).tolist() == [pytest.approx([1.0] * LENGTH)] * len(true)

    def test_the_true_structure_has_no_error(self, batch: dict[str, Tensor]) -> None:
        nitrogen, alpha, carbon = batch["backbone"].unbind(2)
        frames = rotations_from_vectors(carbon - alpha, nitrogen - alpha)
        true = in_local_frames((frames, alpha), alpha)
        assert fape((frames, alpha), true).max() < 2e-3
        rotation = random_rotation()
        moved = rotation @ frames, alpha @ rotation.T + 30
        assert fape(moved, true).max() < 2e-3
        away = alpha.clone()
        away[:, 0] += 50  # of which 10 Å count whole, and a tenth of the others
        expected = 2 * (LENGTH - 1) / LENGTH**2 * (10 + 0.1 * (50 * 3**0.5 - 10)) / 10
        assert fape((frames, away), true).tolist() == pytest.approx([expected] * 6, abs=0.05)

    def test_training_draws_new_noise(self, batch: dict[str, Tensor]) -> None:
        workload = folding(signal=3.0)
        score = workload.augment(batch, SampleRandom(0, torch.arange(6)))["score"]
        again = workload.augment(batch, SampleRandom(0, torch.arange(6)))["score"]
        other = workload.augment(batch, SampleRandom(0, torch.arange(6) + 6))["score"]
        assert torch.equal(score, again)
        assert not torch.equal(score, other)
        assert torch.equal(score, score.mT)
        place = torch.arange(LENGTH)
        scored = (place - place[:, None]).abs() >= 3
        assert not score[:, ~scored].any()
        noise = (score - 3 * batch["contact"])[:, scored]
        assert noise.mean().abs() < 0.05
        assert noise.std().item() == pytest.approx(1, abs=0.05)

    def test_blocks_can_be_recomputed(self) -> None:
        train = {"global_batch": 4, "precision": "fp64", "steps": 3}
        again = losses(train={**train, "activation_checkpointing": True})
        assert again == pytest.approx(losses(), rel=1e-9)

    def test_positions_are_exact_in_half_precision(self) -> None:
        train = {"global_batch": 4, "steps": 3}
        whole, half = (losses(train={**train, "precision": each}) for each in ("fp32", "bf16"))
        assert half == pytest.approx(whole, rel=0.02)

    @pytest.mark.slow
    def test_fused_trials_learn_as_single_ones(self) -> None:
        variants = []
        for lr in (0.001, 0.002):
            spec, samples = small(optimizer={"lr": lr})
            variants.append(Variant(*resolve(spec.model_dump(), RunSpec), 3))
        program = Program(variants[0], 2, samples, Cpu())
        for slot, variant in enumerate(variants):
            network = build_network(variant.spec.train, variant.workload)
            assert program.fits(variant, network)
            program.load_trial(slot, variant, network)
        together = np.array(program.run([0, 1], 3))
        alone = [losses(optimizer={"lr": lr}) for lr in (0.001, 0.002)]
        assert together.T.tolist() == [pytest.approx(each, rel=1e-9) for each in alone]

    def test_a_residue_may_be_unknown(self) -> None:
        found = input_features(
            torch.tensor([[0, UNKNOWN_INDEX]], dtype=torch.uint8), torch.ones(1, 2, 2)
        )
        assert found[0, :, : len(AMINO_ACIDS)].sum(1).tolist() == [1, 0]


def test_the_shipped_spec_trains_and_sweeps_this_workload() -> None:
    data = find_spec("folding")[1]
    spec, workload = resolve(data, SweepRunSpec)
    assert isinstance(workload, Folding)
    check_parameters(spec.model_dump(mode="json"), spec.sweep)
    _, trial = resolve(trial_spec_data(data, {"model.triangles": False}), RunSpec)
    weights, fewer = (
        sum(weight.numel() for weight in each.build().parameters()) for each in (workload, trial)
    )
    assert fewer < weights


@pytest.mark.slow
def test_training_improves_the_folds(tmp_path: Path) -> None:
    """In about a minute, most of the way to the shipped spec's results in docs/answers.md."""
    data = find_spec("folding")[1]
    data["data"] |= {"train_parts": 2}
    data["model"] |= {"width": 16, "iterations": 2}
    data["train"] |= {"epochs": None, "steps": 300}
    spec, workload = resolve(data, RunSpec)
    splits = open_splits(prepare_dataset(workload, tmp_path))
    stepper = TrainStep(spec, workload, splits["train"], Worker(), 300)
    before = evaluate(spec, workload, stepper.forward, splits["test"], Worker())
    for step in range(300):
        stepper.run(step)
    found = evaluate(spec, workload, stepper.forward, splits["test"], Worker())
    assert before["lddt_ca"] < 0.35
    assert found["lddt_ca"] > 0.5
    assert found["tm_score"] > before["tm_score"] + 0.1
