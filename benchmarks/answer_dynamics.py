"""`dynamics` compared with the potential that it learns: errors, crystals, free motion."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answers import is_tiny, shipped_spec, table
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.eos import EquationOfState
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from torch import nn

from trainers.checkpoints.export import export_model, load_model
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_splits
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.run_folder import CHECKPOINTS
from trainers.spec import RunSpec, resolve
from trainers.workloads.dynamics.workload import Dynamics, calculator

FOLDER = Path(tempfile.gettempdir()) / "heliostat-answers"
STRAIN = 0.005
STEP_FS = 5.0
STEPS, WARM_UP = (4, 1) if is_tiny() else (200, 50)
NVE_K = (300, 900)

Calculators = dict[str, Callable[[], Any]]


def answer() -> str:
    spec, workload = resolve(shipped_spec("dynamics"), RunSpec)
    assert isinstance(workload, Dynamics)
    began = time.monotonic()
    dataset = prepare_dataset(workload, FOLDER)
    made_s, began = time.monotonic() - began, time.monotonic()
    folder = Path(tempfile.mkdtemp(dir=FOLDER))
    outcome = train(spec, workload, dataset, folder, NullReporter())
    trained_s = time.monotonic() - began
    export_model(folder / "model", spec, workload, max((folder / CHECKPOINTS).iterdir()))
    potential = load_model(folder / "model")
    splits = open_splits(dataset)
    frames = f"{len(splits['train']['energy'])} frames, {len(splits['test']['energy'])} held out"
    worst = equivariance(potential, splits["test"])
    exact = potential.double()
    known: Calculators = {"EMT": EMT, "learned": lambda: calculator(exact)}
    return "\n\n".join(
        [
            f"Copper with ASE's effective medium theory (EMT): {frames} in separate trajectories, "
            f"made in {made_s:.0f} s. The columns are the mean absolute errors (MAE) and the root "
            "mean square errors (RMSE) of the energy in meV per atom and of the components of the "
            "forces in meV/Å.",
            table(
                [
                    ("", "energy MAE", "force MAE", "energy RMSE", "force RMSE"),
                    ("mean energy of the training set, zero forces", *constant(splits)),
                    (
                        f"`dynamics` as shipped, {trained_s:.0f} s",
                        *(f"{outcome.metrics[f'test/{name}']:.2f}" for name in SCORES),
                    ),
                ]
            ),
            "If held-out structures are rotated at random, their forces in float32 differ from the "
            f"rotated forces by at most {worst:.1e} eV/Å.",
            "Properties of perfect crystals. The learned potential was trained on strained ones "
            "only, from 20 K on.",
            table([("", *known, "difference"), *crystals(known)]),
            f"Molecular dynamics of 108 atoms without a heat bath, {STEPS * STEP_FS / 1e3:.0f} ps "
            f"with {STEP_FS:.0f} fs per step. The drift is the slope of the total energy, and the "
            "fluctuation its root mean square deviation from that slope.",
            table(
                [
                    ("", "mean K", "drift, meV/atom/ps", "fluctuation, meV/atom"),
                    *(
                        (f"{name}, started at {kelvin} K", *free_motion(make(), kelvin))
                        for kelvin in NVE_K
                        for name, make in known.items()
                    ),
                ]
            ),
        ]
    )


SCORES = (
    "energy_mae_mev_per_atom",
    "force_mae_mev_per_a",
    "energy_rmse_mev_per_atom",
    "force_rmse_mev_per_a",
)


def constant(splits: dict[str, dict[str, torch.Tensor]]) -> tuple[str, ...]:
    """The scores of a prediction by the mean energy and zero forces."""
    test = splits["test"]
    off = 1e3 * (test["energy"] - splits["train"]["energy"].mean()) / test["atoms"].shape[1]
    forces = 1e3 * test["forces"]
    rms = off.square().mean().sqrt(), forces.square().mean().sqrt()
    return tuple(f"{each:.2f}" for each in (off.abs().mean(), forces.abs().mean(), *rms))


def equivariance(potential: nn.Module, test: dict[str, torch.Tensor]) -> float:
    """The largest difference between the forces on rotated structures and the rotated forces."""
    turn_33, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    atoms = test["atoms"][::10].clone()
    with torch.no_grad():
        forces = potential(atoms)[..., 1:] @ turn_33.T
        atoms[..., 1:] = atoms[..., 1:] @ turn_33.T
        return float((potential(atoms)[..., 1:] - forces).abs().max())


def energy(make: Callable[[], Any], side: float, strain: np.ndarray) -> float:
    """The energy in eV of a strained cubic cell of copper."""
    crystal = bulk("Cu", "fcc", a=side, cubic=True)
    crystal.set_cell(crystal.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    crystal.calc = make()
    return float(crystal.get_potential_energy())


def crystals(known: Calculators) -> list[tuple[str, ...]]:
    """Lattice constant, bulk modulus and elastic constants, by each potential."""
    names = ("lattice constant, Å", "bulk modulus, GPa", "C11, GPa", "C12, GPa", "C44, GPa")
    found = [properties(make) for make in known.values()]
    return [
        (name, f"{one:.4g}", f"{other:.4g}", f"{other / one - 1:+.2%}")
        for name, one, other in zip(names, *found, strict=True)
    ]


def properties(make: Callable[[], Any]) -> tuple[float, ...]:
    """Lattice constant and bulk modulus by a fit of Birch and Murnaghan's equation of state, and
    the elastic constants by second differences.
    """
    sides = 3.6 * np.linspace(0.97, 1.03, 9)
    energies = [energy(make, side, np.zeros((3, 3))) for side in sides]
    volume, _, bulk_modulus = EquationOfState(sides**3, energies, "birchmurnaghan").fit()
    side = float(np.cbrt(volume))

    def curvature(strain: np.ndarray) -> float:
        """The second derivative of the energy density along a strain, in GPa."""
        ends = [energy(make, side, sign * STRAIN * strain) for sign in (1, 0, -1)]
        return (ends[0] - 2 * ends[1] + ends[2]) / STRAIN**2 / volume / units.GPa

    c11 = curvature(np.diag([1.0, 0, 0]))
    c12 = c11 - curvature(np.diag([1.0, -1.0, 0])) / 2
    shear = np.zeros((3, 3))
    shear[0, 1] = shear[1, 0] = 0.5
    return side, bulk_modulus / units.GPa, c11, c12, curvature(shear)


def free_motion(calculator: Any, kelvin: float) -> tuple[str, str, str]:
    """Temperature, drift and fluctuation of the total energy, which should be conserved."""
    crystal: Atoms = bulk("Cu", "fcc", a=3.63, cubic=True) * (3, 3, 3)
    crystal.calc = calculator
    random = np.random.default_rng(0)
    # Half of the energy goes into the potential energy of a crystal that was at rest.
    thermalize_momenta(crystal, temperature_K=2 * kelvin, rng=random)
    Stationary(crystal)
    dynamics = VelocityVerlet(crystal, STEP_FS * units.fs)
    dynamics.run(WARM_UP)
    totals, temperatures = [], []
    for _ in range(STEPS):
        dynamics.run(1)
        totals.append(1e3 * crystal.get_total_energy() / len(crystal))
        temperatures.append(crystal.get_temperature())
    time_ps = STEP_FS / 1e3 * np.arange(STEPS)
    slope, start = np.polyfit(time_ps, totals, 1)
    about = np.array(totals) - slope * time_ps - start
    return f"{np.mean(temperatures):.0f}", f"{slope:+.4f}", f"{about.std():.4f}"
