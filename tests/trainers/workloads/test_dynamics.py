"""The data of `dynamics`, simulated and from files, and the symmetries of its network."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.io import write
from ase.neighborlist import neighbor_list
from torch import Tensor

from cluster.base.config import validate
from cluster.base.errors import DataError, SpecError
from trainers.checkpoints.export import export_model, load_model
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_splits
from trainers.devices import Cpu
from trainers.engine.evaluate import evaluate
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.engine.step import TrainStep
from trainers.modeling.build import build_network
from trainers.modeling.operations import OperationCounter
from trainers.run_folder import CHECKPOINTS
from trainers.spec import RunSpec, find_spec, resolve
from trainers.worker import Worker
from trainers.workloads.dynamics import atoms, copper
from trainers.workloads.dynamics.atoms import (
    REFERENCES_FILE,
    StructurePart,
    empty_structure,
    neighbor_array,
)
from trainers.workloads.dynamics.copper import simulate_trajectory
from trainers.workloads.dynamics.workload import Dynamics, Potential, calculator
from tuning.programs.program import Program
from tuning.programs.program_signature import Variant
from tuning.spaces.space import SweepRunSpec, check_parameters, trial_spec_data

CUTOFF = 4.0


def dynamics(model: dict[str, Any] | None = None, **data: Any) -> Dynamics:
    return Dynamics(validate(Dynamics.Data, data), validate(Dynamics.Model, model or {}))


def columns(rows: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The atoms, energies and forces of a table of the data set."""
    count = len(rows)
    as_bytes = {name: b"".join(rows[name].to_pylist()) for name in ("atoms", "forces")}
    forces = np.frombuffer(as_bytes["forces"], np.float32).reshape(count, -1, 3)
    found = np.frombuffer(as_bytes["atoms"], np.float32).reshape(count, forces.shape[1], -1, 4)
    return {"atoms": found, "forces": forces, "energy": rows["energy"].to_numpy()}


def alloy(seed: int = 0, periodic: bool = True) -> Any:
    """Six atoms in a skew cell smaller than the cutoff, so that atoms neighbour their images."""
    random = np.random.default_rng(seed)
    cell = 3.9 * np.eye(3) + random.uniform(-0.4, 0.4, (3, 3))
    corners = np.array([[0, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]]) / 2
    places = corners @ cell + random.uniform(-0.1, 0.1, (6, 3))
    return Atoms("Cu3AuNiCu", places, cell=cell, pbc=periodic)


@pytest.fixture(scope="module")
def potential() -> Potential:
    torch.manual_seed(0)
    network = dynamics({"features": 8, "layers": 3}, cutoff=CUTOFF).build().double()
    assert isinstance(network, Potential)
    return network


def predict(potential: torch.nn.Module, structure: Any) -> tuple[float, np.ndarray[Any, Any]]:
    """Energy and forces by the network in float64."""
    with torch.no_grad():
        found_NX = potential(torch.from_numpy(neighbor_array(structure, CUTOFF))[None])[0]
    return float(found_NX[:, 0].sum()), found_NX[:, 1:].numpy()


def rotated(structure: Any, by_33: np.ndarray[Any, Any]) -> Any:
    other = structure.copy()
    other.set_cell(structure.cell.array @ by_33.T)
    other.positions = structure.positions @ by_33.T
    return other


class TestPotential:
    @pytest.mark.parametrize("mirror", [1, -1], ids=["rotation", "reflection"])
    def test_a_rotated_structure_has_the_same_energy_and_rotated_forces(
        self, potential: Potential, mirror: int
    ) -> None:
        by_33, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))
        by_33 *= mirror * np.sign(np.linalg.det(by_33))
        energy, forces = predict(potential, alloy())
        assert np.abs(forces).max() > 1e-3
        energy_turned, forces_turned = predict(potential, rotated(alloy(), by_33))
        assert energy_turned == pytest.approx(energy, abs=1e-10)
        assert forces_turned == pytest.approx(forces @ by_33.T, abs=1e-10)

    def test_the_same_in_float32_to_1e_5(self) -> None:
        torch.manual_seed(0)
        network = dynamics().build()
        structure = bulk("Cu", cubic=True) * (2, 2, 2)
        structure.rattle(0.1, seed=0)
        by_33, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))
        found = []
        for each in (structure, rotated(structure, by_33)):
            with torch.no_grad():
                found.append(network(torch.from_numpy(neighbor_array(each, 5.0)).float()[None])[0])
        assert found[0][:, 1:].abs().max() > 1e-3
        turn_33 = torch.from_numpy(by_33).float()
        assert torch.allclose(found[1][:, 1:], found[0][:, 1:] @ turn_33.T, atol=1e-5)
        assert torch.allclose(found[1][:, 0], found[0][:, 0], atol=1e-5)

    def test_translations_and_permutations_change_nothing(self, potential: Potential) -> None:
        energy, forces = predict(potential, alloy())
        moved = alloy()
        moved.positions += [7.0, -3.0, 0.4]
        moved.wrap()
        order = np.random.default_rng(0).permutation(len(moved))
        energy_moved, forces_moved = predict(potential, moved[order])
        assert energy_moved == pytest.approx(energy, abs=1e-10)
        assert forces_moved == pytest.approx(forces[order], abs=1e-10)
        assert forces.sum(0) == pytest.approx(np.zeros(3), abs=1e-10)

    @pytest.mark.parametrize("periodic", [True, False])
    def test_forces_are_the_derivative_of_the_energy(
        self, potential: Potential, periodic: bool
    ) -> None:
        structure, step = alloy(periodic=periodic), 1e-4
        _, forces = predict(potential, structure)
        for atom in range(len(structure)):
            for axis in range(3):
                ends = []
                for sign in (1, -1):
                    moved = structure.copy()
                    moved.positions[atom, axis] += sign * step
                    ends.append(predict(potential, moved)[0])
                slope = (ends[0] - ends[1]) / (2 * step)
                assert -slope == pytest.approx(forces[atom, axis], abs=1e-7)

    def test_energy_is_smooth_at_the_cutoff(self, potential: Potential) -> None:
        """Energy and force vanish at the cutoff and beyond."""
        alone, _ = predict(potential, Atoms("Cu2", [[0, 0, 0], [9, 0, 0]]))
        for distance, limit in ((CUTOFF - 0.01, 1e-4), (CUTOFF + 0.01, 0)):
            energy, forces = predict(potential, Atoms("Cu2", [[0, 0, 0], [distance, 0, 0]]))
            assert abs(energy - alone) <= limit
            assert np.abs(forces).max() <= 20 * limit

    def test_padding_changes_nothing(self, potential: Potential) -> None:
        exact = neighbor_array(alloy(), CUTOFF)
        roomy = empty_structure(9, 100, CUTOFF).astype(float)
        roomy[: exact.shape[0], : exact.shape[1]] = exact
        with torch.no_grad():
            found = potential(torch.from_numpy(np.stack([roomy, empty_structure(9, 100, CUTOFF)])))
        energy, forces = predict(potential, alloy())
        assert found[0, :6, 1:].numpy() == pytest.approx(forces, abs=1e-12)
        assert float(found[0, :, 0].sum()) == pytest.approx(energy, abs=1e-12)
        assert not found[0, 6:].any()
        assert not found[1].any()

    def test_is_a_calculator_of_ase(self, potential: Potential) -> None:
        structure = alloy()
        structure.calc = calculator(potential)
        energy, forces = predict(potential, structure)
        assert structure.get_potential_energy() == pytest.approx(energy)
        assert structure.get_forces() == pytest.approx(forces)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """A few frames of a trajectory, in the form of the data set."""
    workload = dynamics(frames=3)
    rows = workload.part(StructurePart("val", 3, 900.0), {})["val"]
    return {name: torch.from_numpy(values.copy()) for name, values in columns(rows).items()}


class TestTrajectories:
    def test_are_in_one_split_each(self) -> None:
        parts = dynamics(trajectories=3).parts()
        assert [part.split for part in parts] == ["train"] * 3 + ["val"] * 5 + ["test"] * 10
        assert len({part.seed for part in parts}) == len(parts)
        assert [part.temperature_k for part in parts[:3]] == pytest.approx(
            [20, 494.4, 1600], abs=0.1
        )

    def test_a_seed_determines_a_trajectory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(copper, "BURN_IN_STEPS", 3)
        monkeypatch.setattr(copper, "STEPS_PER_FRAME", 2)
        workload = dynamics(frames=2)
        rows = [
            workload.part(StructurePart("train", seed, 900.0), {})["train"] for seed in (1, 1, 2)
        ]
        assert rows[0].equals(rows[1])
        assert not rows[0].equals(rows[2])
        other = dynamics(frames=2, seed=1).part(StructurePart("train", 1, 900.0), {})["train"]
        assert not rows[0].equals(other)

    def test_have_the_energies_and_forces_of_emt(self, batch: dict[str, Tensor]) -> None:
        for frame, found in enumerate(
            simulate_trajectory(dynamics().data.seed, number=3, temperature_k=900.0, frames=3)
        ):
            structure = found.atoms.copy()
            structure.calc = EMT()
            assert structure.get_potential_energy() == pytest.approx(float(batch["energy"][frame]))
            assert structure.get_forces() == pytest.approx(batch["forces"][frame].numpy(), abs=1e-5)
            kept = batch["atoms"][frame].numpy()
            there = np.linalg.norm(kept[:, 1:, 1:], axis=-1) < 5.0
            assert there.sum() == len(neighbor_list("i", structure, 5.0))
            assert kept[:, 0, 1:] == pytest.approx(structure.positions, abs=1e-4)

    def test_shapes_and_scores(self, batch: dict[str, Tensor]) -> None:
        workload = dynamics({"features": 8})
        assert {name: tuple(values.shape) for name, values in batch.items()} == {
            "atoms": (3, 32, 65, 4),
            "energy": (3,),
            "forces": (3, 32, 3),
        }
        exact = torch.cat(
            [batch["energy"][:, None, None].expand(-1, 32, 1) / 32, batch["forces"]], -1
        )
        off = torch.tensor([0.002, 0.03, 0.03, 0.03])  # eV per atom, eV/Å
        loss = workload.loss(exact + off, batch)
        assert loss.tolist() == pytest.approx([0.03**2 + 1000 * 0.002**2] * 3, rel=1e-3)
        scores = {
            k: v.double().mean().item() for k, v in workload.metrics(exact + off, batch).items()
        }
        assert workload.summary({"loss": 1.0, **scores}) == {
            "loss": 1.0,
            "energy_mae_mev_per_atom": pytest.approx(2, rel=1e-3),
            "energy_rmse_mev_per_atom": pytest.approx(2, rel=1e-3),
            "force_mae_mev_per_a": pytest.approx(30, rel=1e-3),
            "force_rmse_mev_per_a": pytest.approx(30, rel=1e-3),
        }

    def test_operations_are_counted(self, batch: dict[str, Tensor]) -> None:
        workload = dynamics({"features": 8})
        counter = OperationCounter()
        with counter.counting(len(batch["energy"])):
            output = workload.forward(workload.build(), batch)
            counter.in_backward = True
            workload.loss(output, batch).sum().backward()
        assert counter.per_sample is not None
        assert counter.per_sample > 1e6


def labelled(count: int, start: int = 0) -> list[Any]:
    """Alloys with energies that are a sum over their atoms, and made-up forces."""
    found = []
    for seed in range(start, start + count):
        structure = alloy(seed)[: 4 + seed % 3]
        energy = float(sum({29: -3.0, 79: -5.0, 28: -4.0}[z] for z in structure.numbers))
        forces = np.random.default_rng(seed).standard_normal((len(structure), 3))
        structure.calc = SinglePointCalculator(structure, energy=energy, forces=forces)
        found.append(structure)
    return found


def write_xyz(path: Path, structures: list[Any]) -> Path:
    write(path, structures, format="extxyz")
    return path


def write_database(path: Path, structures: list[Any]) -> Path:
    with connect(path) as database:
        for structure in structures:
            database.write(structure)
    return path


OWN = {"cutoff": CUTOFF, "max_atoms": 6, "max_neighbors": 90}


class TestFiles:
    @pytest.mark.parametrize("name", ["own.xyz", "own.extxyz", "own.db", "own.json"])
    def test_are_read_exactly_and_split(
        self, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(atoms, "STRUCTURES_PER_PART", 3)
        written = labelled(10)
        write_file = write_xyz if name.endswith("xyz") else write_database
        source = write_file(tmp_path / name, written)
        workload = dynamics(source=str(source), val_fraction=0.2, test_fraction=0.1, **OWN)
        parts = workload.parts()
        assert [(part.split, len(part.records)) for part in parts] == [
            *(("train", count) for count in (3, 3, 1)),
            ("val", 2),
            ("test", 1),
        ]
        found = {split: columns(rows) for split, rows in workload.dataset().items()}
        whole = {
            column: np.concatenate([found[split][column] for split in ("train", "val", "test")])
            for column in ("atoms", "forces", "energy")
        }
        assert whole["energy"] == pytest.approx(np.zeros(10), abs=1e-5)  # all is in references
        for kept, forces, structure in zip(whole["atoms"], whole["forces"], written, strict=True):
            count = len(structure)
            assert kept[:count, 0, 0].tolist() == structure.numbers.tolist()
            assert not kept[count:, 0].any()
            assert kept[:count, 0, 1:] == pytest.approx(structure.positions, abs=1e-5)
            assert forces[:count] == pytest.approx(structure.get_forces(), abs=1e-6)

    def test_energies_of_single_atoms_are_fitted_to_the_training_split(
        self, tmp_path: Path
    ) -> None:
        workload = dynamics(source=str(write_xyz(tmp_path / "own.xyz", labelled(10))), **OWN)
        found = json.loads(workload.common(workload.parts())[REFERENCES_FILE])
        assert found == pytest.approx({"28": -4.0, "29": -3.0, "79": -5.0})

    def test_a_folder_may_have_its_splits(self, tmp_path: Path) -> None:
        for split, count in (("train", 6), ("val", 2), ("test", 3)):
            (tmp_path / split).mkdir()
            write_xyz(tmp_path / split / "a.xyz", labelled(count))
        found = dynamics(source=str(tmp_path), **OWN).dataset()
        assert {split: len(rows) for split, rows in found.items()} == {
            "train": 6,
            "val": 2,
            "test": 3,
        }

    def test_energy_and_forces_by_other_names(self, tmp_path: Path) -> None:
        written = labelled(10)
        for structure in written:
            structure.info["dft_energy"] = structure.calc.results["energy"]
            structure.arrays["dft_forces"] = 2 * structure.calc.results["forces"]
            structure.calc = None
        source = write_xyz(tmp_path / "own.xyz", written)
        named = {"energy": "dft_energy", "forces": "dft_forces"}
        found = columns(dynamics(source=str(source), **named, **OWN).dataset()["train"])
        assert found["forces"][0, :4] == pytest.approx(written[0].arrays["dft_forces"], abs=1e-6)
        with pytest.raises(DataError, match=r"own\.xyz: line 1: has no 'energy' \(data\.energy\)"):
            dynamics(source=str(source), **OWN).dataset()

    @pytest.mark.parametrize(
        ("spoil", "line"),
        [
            (lambda lines: ["many", *lines[1:]], "line 1: 'many' is not a number of atoms"),
            (lambda lines: lines[:-2], "line 22: ends after 2 of 4 atoms"),
            (
                lambda lines: [*lines[:8], lines[8].replace("0.", "O."), *lines[9:]],
                "line 7: cannot be read: could not convert string to float: ",
            ),
            (lambda lines: [*lines[:8], "Cu 0 0", *lines[9:]], "line 7: cannot be read: "),
            (
                lambda lines: [*lines[:7], lines[7].replace("energy=", "e="), *lines[8:]],
                "line 7: has no 'energy' (data.energy)",
            ),
            (
                lambda lines: [
                    *lines[:7],
                    re.sub("energy=\\S*", "energy=nan", lines[7]),
                    *lines[8:],
                ],
                "line 7: energy or forces are not finite",
            ),
            (lambda lines: ["0", "", *lines], "line 1: has no atoms"),
        ],
        ids=["head", "cut short", "word", "few columns", "no energy", "no number", "no atoms"],
    )
    def test_a_malformed_xyz_file_is_one_line(
        self, tmp_path: Path, spoil: Callable[[list[str]], list[str]], line: str
    ) -> None:
        source = write_xyz(tmp_path / "own.xyz", labelled(4))
        source.write_text("\n".join(spoil(source.read_text().splitlines())))
        with pytest.raises(DataError) as caught:
            dynamics(source=str(source), val_fraction=0.25, test_fraction=0.0, **OWN).dataset()
        assert str(caught.value).startswith(f"{source}: {line}")
        assert "\n" not in str(caught.value)

    def test_a_malformed_database_is_one_line(self, tmp_path: Path) -> None:
        source = tmp_path / "own.db"
        source.write_text("no database at all, but long enough to be looked at as one" * 100)
        with pytest.raises(DataError) as caught:
            dynamics(source=str(source), **OWN).parts()
        assert str(caught.value).startswith(f"{source}: is not readable as an ASE database: ")
        source.unlink()
        bare = labelled(3)
        bare[1].calc = None
        write_database(source, bare)
        with pytest.raises(DataError) as caught:
            dynamics(source=str(source), val_fraction=0.3, test_fraction=0.0, **OWN).dataset()
        assert str(caught.value) == f"{source}: row 2: has no 'energy' (data.energy)"

    def test_a_structure_that_is_too_large_is_reported_with_its_size(self, tmp_path: Path) -> None:
        source = write_xyz(tmp_path / "own.xyz", labelled(3))
        with pytest.raises(DataError, match=r"line 7: has 5 atoms, data\.max_atoms is 4"):
            dynamics(source=str(source), val_fraction=0.3, **{**OWN, "max_atoms": 4}).dataset()
        message = r"an atom has \d\d neighbours within 4 Å, data\.max_neigh"
        with pytest.raises(DataError, match=message):
            dynamics(source=str(source), **{**OWN, "max_neighbors": 9}).dataset()

    def test_an_empty_file_is_one_line(self, tmp_path: Path) -> None:
        source = tmp_path / "own.xyz"
        source.write_text("\n")
        with pytest.raises(DataError, match=r"own\.xyz: has no structures to train on"):
            dynamics(source=str(source), **OWN).parts()

    def test_without_ase_it_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from importlib.metadata import PackageNotFoundError

        def missing(name: str) -> str:
            raise PackageNotFoundError(name)

        monkeypatch.setattr(atoms, "version", missing)
        with pytest.raises(
            SpecError, match=r"needs the package ase, .* \(pip install 'heliostat\[dynamics\]'\)"
        ):
            dynamics().made_with()


def short(tmp_path: Path, **changes: Any) -> tuple[RunSpec, Dynamics]:
    """A run of a few steps on a few structures from a file."""
    source = write_xyz(tmp_path / "own.xyz", labelled(10))
    spec, workload = resolve(
        {
            "workload": "dynamics",
            "data": {"source": str(source), **OWN},
            "model": {"features": 4},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 3, "global_batch": 4, **changes},
        },
        RunSpec,
    )
    assert isinstance(workload, Dynamics)
    return spec, workload


def test_a_trained_model_is_exported_and_loaded(tmp_path: Path) -> None:
    spec, workload = short(tmp_path)
    dataset = prepare_dataset(workload, tmp_path)
    outcome = train(spec, workload, dataset, tmp_path / "run", NullReporter())
    assert outcome.complete
    assert outcome.metrics["val/force_mae_mev_per_a"] > 0
    newest = max((tmp_path / "run" / CHECKPOINTS).iterdir())
    export_model(tmp_path / "model", spec, workload, newest)
    loaded = load_model(tmp_path / "model")
    structure = alloy()
    structure.calc = calculator(loaded)
    assert np.abs(structure.get_forces()).max() > 0
    with torch.inference_mode():  # as MLflow's flavour calls it
        assert not loaded(
            torch.from_numpy(neighbor_array(alloy(), CUTOFF)).float()[None]
        ).requires_grad


def test_trials_of_it_are_fused(tmp_path: Path) -> None:
    """With the losses of the single trials, although forces are derivatives."""
    spec, workload = short(tmp_path)
    samples = open_splits(prepare_dataset(workload, tmp_path))["train"]
    trials = []
    for weight in (100.0, 1000.0):
        varied = {
            "model.energy_weight": weight,
            "optimizer.lr": 1 / weight,
            "train.precision": "fp64",
        }
        trials.append(
            Variant(*resolve(trial_spec_data(spec.model_dump(mode="json"), varied), RunSpec), 3)
        )
    program = Program(trials[0], 2, samples, Cpu(), {"energy_weight": [100.0, 1000.0]})
    for slot, trial in enumerate(trials):
        network = build_network(trial.spec.train, trial.workload)
        assert program.fits(trial, network)
        program.load_trial(slot, trial, network)
    fused = program.run([0, 1], 3)
    for slot, trial in enumerate(trials):
        alone = TrainStep(trial.spec, trial.workload, samples, Worker(), 3)
        losses = [alone.run(step).item() for step in range(3)]
        assert [both[slot] for both in fused] == pytest.approx(losses, rel=1e-9)


@pytest.mark.slow
def test_it_learns_most_of_the_forces(tmp_path: Path) -> None:
    data = find_spec("dynamics")[1]
    data["data"] |= {"trajectories": 12}
    data["model"] |= {"features": 16}
    data["train"] |= {"epochs": 20}
    spec, workload = resolve(data, SweepRunSpec)
    check_parameters(spec.model_dump(mode="json"), spec.sweep)
    assert isinstance(workload, Dynamics)
    splits = open_splits(prepare_dataset(workload, tmp_path))
    total = spec.train.total_steps(len(splits["train"]["energy"]))
    stepper = TrainStep(spec, workload, splits["train"], Worker(), total)
    for step in range(total):
        stepper.run(step)
    found = evaluate(spec, workload, stepper.forward, splits["test"], Worker())
    usual = 1e3 * splits["test"]["forces"].square().mean().sqrt().item()
    assert found["force_rmse_mev_per_a"] < 0.25 * usual
