"""Molecular dynamics of copper crystals by ASE's effective medium theory."""

from collections.abc import Iterator

import numpy as np

from trainers.workloads.dynamics.structure_files import LabelledStructure

LATTICE_CONSTANT, CELLS_PER_SIDE = 3.61, 2
"""The side of copper's cubic cell in Å, and the number of cells along each side of a crystal."""
STRAIN = 0.03
"""The largest relative change of a cell's length along each axis, and the largest shear."""
TIME_STEP_FS, FRICTION_PER_FS = 5.0, 0.02
BURN_IN_STEPS, STEPS_PER_FRAME = 50, 10
"""Steps before the first frame, for equilibration, and between frames."""


def simulate_trajectory(
    seed: int, number: int, temperature_k: float, frames: int
) -> Iterator[LabelledStructure]:
    """Frames of a strained copper crystal in a heat bath; `number` tells trajectories apart."""
    from ase import units
    from ase.build import bulk
    from ase.calculators.emt import EMT
    from ase.md.langevin import Langevin
    from ase.md.velocitydistribution import thermalize_momenta

    random = np.random.default_rng((seed, number))
    shear_33 = random.uniform(-STRAIN, STRAIN, (3, 3)) / 2
    strain_33 = np.diag(random.uniform(-STRAIN, STRAIN, 3)) + (shear_33 + shear_33.T) / 2
    atoms = bulk("Cu", "fcc", a=LATTICE_CONSTANT, cubic=True) * (3 * (CELLS_PER_SIDE,))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain_33), scale_atoms=True)
    atoms.calc = EMT()
    thermalize_momenta(atoms, temperature_K=temperature_k, rng=random)
    dynamics = Langevin(
        atoms,
        TIME_STEP_FS * units.fs,
        temperature_K=temperature_k,
        friction=FRICTION_PER_FS / units.fs,
        fixcm=False,  # the energy does not depend on the drift of the crystal
        rng=random,
    )
    dynamics.run(BURN_IN_STEPS)
    for frame in range(frames):
        dynamics.run(STEPS_PER_FRAME)
        where = f"emt: trajectory {number}, frame {frame}"
        yield LabelledStructure(where, atoms, atoms.get_potential_energy(), atoms.get_forces())
