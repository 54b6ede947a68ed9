"""Molecular dynamics: the energy of a structure of atoms, and the force on each of them.

**Data.** `emt` is copper in the effective medium theory (EMT) of Jacobsen, Stoltze and Norskov
(Surface Science 366, 394, 1996), as in ASE: crystals of 32 atoms whose cells are strained and
sheared at random by up to 3 %, in a heat bath at 20 to 1600 K (Langevin dynamics), with a frame
every 50 fs. Each trajectory is a part, and lies in one split. Your own data: extended XYZ and ASE
databases from quantum chemistry, periodic or not. Energies are relative to those of single atoms,
which are fitted to the training structures and stored in `references.json` of the data set.

**Model.** PaiNN (Schütt, Unke and Gastegger 2021, arXiv:2102.03150): each atom has `features`
scalars, which are invariant to rotations, and as many vectors, which rotate with the structure.
Neighbours within `data.cutoff` exchange messages of both, `layers` times. The energy is the sum of
the atoms' energies, and the forces are its exact derivative. So energy is conserved, forces add up
to zero, and they rotate with the structure.

**Metrics** are the usual ones: mean absolute and root mean square errors of the energy in meV per
atom, and of the components of the forces in meV/Å. Measured: `docs/answers.md`, which also compares
dynamics and elastic constants of copper.

**Not shown:** chemistry. EMT is itself a model of metals, and a network trained on copper crystals
knows neither surfaces nor liquids, nor distances outside its training data.
"""

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from cluster.base.config import Spec
from trainers.workload import Batch, model_dtype
from trainers.workloads.dynamics.atoms import Structures, empty_structure, neighbor_array

# Suffixes: B structures, N atoms, K neighbours of an atom, R = 1 + K, X four numbers, 3 of space,
# C features, Q functions of a distance, Y = 3 Q, D = 3 C, M = B N K.

PositiveInt = Annotated[int, Field(gt=0)]

ELEMENTS = 120
"""Atomic numbers are below this; 0 stands for no atom."""
TYPICAL_NEIGHBORS = 16
"""Sums of messages are divided by its square root, to be of order one."""


class Dynamics(Structures):
    """Predicts the energy and the forces of structures of atoms."""

    class Model(Spec):
        """The size of the network, and the weight of the energy in the loss."""

        features: PositiveInt = 32
        """Number of scalars, and of vectors, per atom."""
        layers: PositiveInt = 2
        """Message-passing layers."""
        radial: PositiveInt = 8
        """Radial basis functions of a distance."""
        energy_weight: Annotated[float, Field(ge=0)] = 1000.0
        """Weight of the squared error of the energy, in eV per atom; that of a force component, in
        eV/Å, has weight 1."""

    data: Structures.Data
    model: Model

    def build(self) -> nn.Module:
        return Potential(self.model, self.data.cutoff)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Energy in eV and force in eV/Å of each atom [B, N, X]."""
        found_BNX: Tensor = model(batch["atoms"])
        return found_BNX

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        energy_B, forces_BN3, count_B = _errors(output, batch)
        forces_B = forces_BN3.square().sum((1, 2)) / (3 * count_B)
        return forces_B + self.model.energy_weight * energy_B.square()

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        energy_B, forces_BN3, count_B = _errors(output, batch)
        return {
            "energy": energy_B.abs(),
            "energy_squared": energy_B.square(),
            "forces": forces_BN3.abs().sum((1, 2)),
            "forces_squared": forces_BN3.square().sum((1, 2)),
            "components": 3 * count_B,
        }

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        components = means["components"]
        return {
            "loss": means["loss"],
            "energy_mae_mev_per_atom": 1e3 * means["energy"],
            "energy_rmse_mev_per_atom": 1e3 * math.sqrt(means["energy_squared"]),
            "force_mae_mev_per_a": 1e3 * means["forces"] / components,
            "force_rmse_mev_per_a": 1e3 * math.sqrt(means["forces_squared"] / components),
        }

    def example(self) -> Tensor:
        """Two atoms of copper."""
        atoms_NRX = empty_structure(self.data.max_atoms, self.data.max_neighbors, self.data.cutoff)
        atoms_NRX[:2, 0, 0] = 29
        atoms_NRX[1, 0, 1] = 2.5
        if self.data.max_atoms > 1:
            atoms_NRX[:2, 1] = [[1, 2.5, 0, 0], [0, -2.5, 0, 0]]
        return torch.from_numpy(atoms_NRX)[None]

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """None: forces are a derivative through all layers, so the model is sharded as one unit."""
        return []

    @property
    def evaluation_batch(self) -> int:
        """As many samples as have 2**15 neighbour pairs: forces need as much memory as training."""
        return min(512, max(1, (1 << 15) // (self.data.max_atoms * self.data.max_neighbors)))


def _errors(output_BNX: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Errors of the energy per atom [B] and of the forces [B, N, 3]; number of atoms [B]."""
    count_B = (batch["atoms"][:, :, 0, 0] > 0).sum(1)
    energy_B = (output_BNX[:, :, 0].sum(1) - batch["energy"]) / count_B
    return energy_B, output_BNX[:, :, 1:] - batch["forces"], count_B


class Potential(nn.Module):
    """Energy and force of each atom [B, N, X], in eV and eV/Å, of structures [B, N, R, X].

    Structures are arrays of `neighbor_array`, with any number of rows for atoms and neighbours. The
    energies of a structure's atoms add up to its energy.
    """

    frequency_Q: Tensor

    def __init__(self, spec: Dynamics.Model, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.embed = nn.Embedding(ELEMENTS, spec.features)
        self.layers = nn.ModuleList(
            InteractionLayer(spec.features, spec.radial, first=index == 0)
            for index in range(spec.layers)
        )
        self.energy = _mlp(spec.features, spec.features, 1)
        pi_Q = math.pi * torch.arange(1, spec.radial + 1)
        self.register_buffer("frequency_Q", pi_Q / cutoff, persistent=False)

    def forward(self, atoms_BNRX: Tensor) -> Tensor:
        """Computes derivatives even where autograd is off, as in evaluation."""
        recorded = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            atoms_BNRX = atoms_BNRX.clone()  # inference tensors cannot be differentiated
            still_BN3 = torch.zeros_like(atoms_BNRX[:, :, 0, 1:])
            slope_BN3, energy_BN = torch.func.grad(self._total_energy, has_aux=True)(
                still_BN3, atoms_BNRX
            )
            found_BNX = torch.cat([energy_BN[..., None], -slope_BN3], -1)
        return found_BNX if recorded else found_BNX.detach()

    def _total_energy(self, moved_BN3: Tensor, atoms_BNRX: Tensor) -> tuple[Tensor, Tensor]:
        energy_BN = self.energies(moved_BN3, atoms_BNRX)
        return energy_BN.sum(), energy_BN

    def energies(self, moved_BN3: Tensor, atoms_BNRX: Tensor) -> Tensor:
        """The energy of each atom [B, N], after small displacements of all atoms."""
        batch, atoms = atoms_BNRX.shape[:2]
        first_B = torch.arange(batch, device=atoms_BNRX.device) * atoms
        place_BNK = atoms_BNRX[:, :, 1:, 0].long() + first_B[:, None, None]  # among all atoms
        near_BNK3 = _gather_neighbors(moved_BN3, place_BNK) - moved_BN3[:, :, None]
        vector_BNK3 = atoms_BNRX[:, :, 1:, 1:] + near_BNK3
        distance_BNK1 = vector_BNK3.square().sum(-1, keepdim=True).sqrt()
        fade_BNK1 = (distance_BNK1 * (math.pi / self.cutoff)).clamp(max=math.pi).cos() / 2 + 0.5
        waves_BNKQ = (distance_BNK1 * self.frequency_Q).sin() * (self.cutoff / distance_BNK1)
        basis_BNKQ = torch.cat([fade_BNK1, waves_BNKQ * fade_BNK1], -1)
        unit_BNK3 = vector_BNK3 / distance_BNK1
        toward_BNKY = (unit_BNK3[..., None] * basis_BNKQ[:, :, :, None]).flatten(3)
        number_BN = atoms_BNRX[:, :, 0, 0].long()
        scalar_BNC, vector_BN3C = self.embed(number_BN), None
        for layer in self.layers:
            scalar_BNC, vector_BN3C = layer(
                scalar_BNC, vector_BN3C, place_BNK, basis_BNKQ, toward_BNKY
            )
        energy_BN = self.energy(scalar_BNC).squeeze(-1).to(atoms_BNRX.dtype)
        return torch.where(number_BN > 0, energy_BN, 0)


class InteractionLayer(nn.Module):
    """Adds the neighbours' messages to an atom's scalars and vectors, then mixes these.

    A message is the neighbour's features times a function of its distance, which is a sum over the
    radial basis. The neighbours are summed for each basis function first, by matrix products, so
    that pairs of atoms, which are by far the most numerous, need no features beyond the gathered
    ones.
    """

    def __init__(self, features: int, radial: int, first: bool) -> None:
        super().__init__()
        self.features, kinds = features, 2 if first else 3
        self.say = _mlp(features, features, kinds * features)
        self.far = nn.Parameter(torch.empty(kinds, radial + 1, features))
        nn.init.normal_(self.far, std=(radial + 1) ** -0.5)
        self.mix = nn.Linear(features, 2 * features, bias=False)
        self.update = _mlp(2 * features, features, 3 * features)

    def forward(
        self,
        scalar_BNC: Tensor,
        vector_BN3C: Tensor | None,
        place_BNK: Tensor,
        basis_BNKQ: Tensor,
        toward_BNKY: Tensor,
    ) -> tuple[Tensor, Tensor]:
        more_BNC, toward_BNC, *gate_BNC = self.say(scalar_BNC).split(self.features, -1)
        far_QC, vector_far_QC, *gate_far_QC = self.far.unbind()
        more_BNQC = basis_BNKQ.mT @ _gather_neighbors(more_BNC, place_BNK)
        scalar_BNC = scalar_BNC + (more_BNQC * far_QC).sum(2) / TYPICAL_NEIGHBORS**0.5
        message_BNYC = toward_BNKY.mT @ _gather_neighbors(toward_BNC, place_BNK)
        message_BN3QC = message_BNYC.reshape(*message_BNYC.shape[:2], 3, -1, self.features)
        message_BN3C = (message_BN3QC * vector_far_QC).sum(3)
        if vector_BN3C is not None:
            gated_BN3C = vector_BN3C * gate_BNC[0][:, :, None]
            message_BNQD = basis_BNKQ.mT @ _gather_neighbors(gated_BN3C.flatten(2), place_BNK)
            message_BNQ3C = message_BNQD.reshape(*message_BNQD.shape[:3], 3, -1)
            message_BN3C = message_BN3C + (message_BNQ3C * gate_far_QC[0][:, None]).sum(2)
        message_BN3C = message_BN3C / TYPICAL_NEIGHBORS**0.5
        vector_BN3C = message_BN3C if vector_BN3C is None else vector_BN3C + message_BN3C

        left_BN3C, right_BN3C = self.mix(vector_BN3C).split(self.features, -1)
        length_BNC = (1 + right_BN3C.square().sum(2)).sqrt()  # differentiable at zero
        both = self.update(torch.cat([scalar_BNC, length_BNC], -1))
        keep_BNC, inner_BNC, turn_BNC = both.split(self.features, -1)
        scalar_BNC = scalar_BNC + keep_BNC + inner_BNC * (left_BN3C * right_BN3C).sum(2)
        return scalar_BNC, vector_BN3C + turn_BNC[:, :, None] * left_BN3C


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


def _gather_neighbors(values_BNC: Tensor, place_BNK: Tensor) -> Tensor:
    """The values of each atom's neighbours [B, N, K, C]."""
    found_MC = values_BNC.flatten(0, 1).index_select(0, place_BNK.flatten())
    return found_MC.view(*place_BNK.shape, -1)


def calculator(potential: nn.Module) -> Any:
    """An ASE calculator of energies and forces by a trained `Potential`, such as of `load_model`.

    Energies are relative to those of single atoms; see the data set's `references.json`.
    """
    from ase.calculators.calculator import Calculator

    assert isinstance(potential, Potential)
    cutoff = potential.cutoff

    class Learned(Calculator):  # type: ignore[misc]
        implemented_properties = ["energy", "energies", "free_energy", "forces"]

        def calculate(self, atoms: Any = None, *what: Any) -> None:
            super().calculate(atoms, *what)
            atoms_NRX = torch.from_numpy(neighbor_array(self.atoms, cutoff))
            with torch.no_grad():
                found_NX = potential(atoms_NRX[None].to(model_dtype(potential)))[0].double().numpy()
            energy = found_NX[:, 0].sum()
            self.results = {
                "energy": energy,
                "free_energy": energy,
                "energies": found_NX[:, 0],
                "forces": found_NX[:, 1:],
            }

    return Learned()
