"""Generates protein backbones under physical geometry, and sequences that suit them."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from trainers.workloads.folding.structures import AMINO_ACIDS

# Suffixes: B samples, L residues, A atoms (N, CA, C of a residue), X coordinates in Å, T torsions
# (phi and psi). Backbones are [B, L, A, X] and have none.

Array = npt.NDArray[Any]

RESIDUE_PROPENSITIES = """
A  1.8 0.66 1.42 0.83
R -4.5 0.95 0.98 0.93
N -3.5 1.56 0.67 0.89
D -3.5 1.46 1.01 0.54
C  2.5 1.19 0.70 1.19
Q -3.5 0.98 1.11 1.10
E -3.5 0.74 1.51 0.37
G -0.4 1.56 0.57 0.75
H -3.2 0.95 1.00 0.87
I  4.5 0.47 1.08 1.60
L  3.8 0.59 1.21 1.30
K -3.9 1.01 1.16 0.74
M  1.9 0.60 1.45 1.05
F  2.8 0.60 1.13 1.38
P -1.6 1.52 0.57 0.55
S -0.8 1.43 0.77 0.75
T -0.7 0.96 0.83 1.19
W -0.9 0.96 1.08 1.37
Y -1.3 1.14 0.69 1.47
V  4.2 0.50 1.06 1.70
"""
"""Amino acids: hydropathy (Kyte and Doolittle 1982, doi:10.1016/0022-2836(82)90515-0) and relative
frequencies in turns, helices and strands (Chou and Fasman 1978, doi:10.1002/9780470122921.ch2)."""
LOOP, HELIX, STRAND = range(3)

N_CA, CA_C, C_N = 1.458, 1.525, 1.329
ANGLE_AT_CA, ANGLE_AT_C, ANGLE_AT_N = (math.radians(angle) for angle in (111.0, 116.6, 121.7))
"""The backbone's bond lengths in Å and bond angles in radians; Engh and Huber 1991
(doi:10.1107/S0108767391001071)."""
FOLDING_STEPS, FOLDING_RATE = 100, 0.08
"""Steps of Adam that fold a chain, and their size in radians."""
MIN_CA_DISTANCE, MIN_ATOM_DISTANCE = 3.9, 2.8
"""Smallest distances in Å of alpha carbons, and of any backbone atoms, of residues 3 or more apart
in the chain."""
MAX_RELATIVE_GYRATION = 1.25
"""Largest radius of gyration, relative to the usual one of a globular protein."""


def generate_folds(count: int, length: int, random: np.random.Generator) -> tuple[Array, Array]:
    """Folded chains: backbones [B, L, A, X], and each residue's LOOP, HELIX or STRAND [B, L].

    Chains get a random secondary structure. Then their torsions, mostly those of loops, minimise an
    energy of clashes, contacts and the radius of gyration, 2.2 L^0.38 Å for globular proteins
    (Kuszewski et al. 1999, J. Am. Chem. Soc. 121:2337). Chains that clash or stay too long are
    dropped: B <= count.
    """
    kind_BL = _secondary_structure(count, length, random)
    start_BLT = _torsions(kind_BL, random)
    usual = 2.2 * length**0.38
    target_B = usual * (0.95 + 0.4 * random.random(count) ** 2)
    pull_B = random.uniform(0.02, 0.10, count)
    give_BL1 = np.where(kind_BL == LOOP, 1.06, 0.06)[..., None]
    energy = _Energy(kind_BL, target_B, pull_B)
    shift_BLT = np.zeros_like(start_BLT)
    mean, square = np.zeros_like(shift_BLT), np.zeros_like(shift_BLT)
    for step in range(1, FOLDING_STEPS + 1):
        backbone = build_backbone(start_BLT + give_BL1 * shift_BLT)
        slope = torsion_gradient(backbone, energy.gradient(backbone[:, :, 1])) * give_BL1
        slope += 0.3 * give_BL1 * shift_BLT
        mean = 0.9 * mean + 0.1 * slope
        square = 0.999 * square + 0.001 * slope**2
        size = np.sqrt(square / (1 - 0.999**step)) + 1e-8
        shift_BLT -= FOLDING_RATE * mean / (1 - 0.9**step) / size
    backbone = build_backbone(start_BLT + give_BL1 * shift_BLT)
    good_B = _is_free_of_clashes(backbone) & (
        radius_of_gyration(backbone[:, :, 1]) < MAX_RELATIVE_GYRATION * usual
    )
    return backbone[good_B], kind_BL[good_B]


def _secondary_structure(count: int, length: int, random: np.random.Generator) -> Array:
    """Helices of 6 to 19 and strands of 4 to 7 residues, joined by loops; half have no strand."""
    kind_BL = np.full((count, length), LOOP)
    for chain_L in kind_BL:
        helices = 1.0 if random.random() < 0.5 else 0.5
        place = random.integers(0, 3)
        while place < length:
            helix = random.random() < helices
            size = random.integers(6, 20) if helix else random.integers(4, 8)
            chain_L[place : place + size] = HELIX if helix else STRAND
            place += size + random.integers(2, 6)
    return kind_BL


def _torsions(kind_BL: Array, random: np.random.Generator) -> Array:
    """phi and psi [B, L, T] in radians, around the populated regions of the Ramachandran plot."""
    basins = np.array([[-65, -35], [-115, 130], [57, 45], [-62, -43], [-120, 130]])
    spread = np.array([15, 15, 15, 4, 10])
    loop_BL = np.digitize(random.random(kind_BL.shape), (0.45, 0.9))
    basin_BL = np.where(kind_BL == LOOP, loop_BL, kind_BL + 2)
    noise_BLT = random.standard_normal((*kind_BL.shape, 2)) * spread[basin_BL][..., None]
    torsion_BLT: Array = np.radians(basins[basin_BL] + noise_BLT)
    return torsion_BLT


def build_backbone(torsion_BLT: Array) -> Array:
    """The backbone [B, L, A, X] with these phi and psi; all peptide bonds are planar and trans.

    Each bond is the x axis of a frame: the frame of the bond before, turned by the torsion and bent
    by the bond angle.
    """
    count, length, _ = torsion_BLT.shape
    atoms = np.empty((count, length, 3, 3))
    place = np.zeros((count, 3))
    along, up, aside = (np.broadcast_to(axis, (count, 3)) for axis in np.eye(3))
    for index in range(length):
        before, flat = torsion_BLT[:, max(0, index - 1), 1], np.full(count, np.pi)
        turns = before, flat, torsion_BLT[:, index, 0]
        bends = (ANGLE_AT_C, C_N), (ANGLE_AT_N, N_CA), (ANGLE_AT_CA, CA_C)
        for atom, (turn_B, (angle, bond)) in enumerate(zip(turns, bends, strict=True)):
            cos_B1, sin_B1 = np.cos(turn_B)[:, None], np.sin(turn_B)[:, None]
            bent, aside = cos_B1 * up + sin_B1 * aside, cos_B1 * aside - sin_B1 * up
            up = -math.cos(angle) * bent - math.sin(angle) * along
            along = -math.cos(angle) * along + math.sin(angle) * bent
            place = place + bond * along
            atoms[:, index, atom] = place
    return atoms


def torsion_gradient(backbone: Array, force_BLX: Array) -> Array:
    """Derivatives by phi and psi [B, L, T] from those by the positions of the alpha carbons.

    A torsion turns all following atoms around its bond. Its derivative is their torque, summed from
    the end of the chain (Abe et al. 1984, doi:10.1016/0097-8485(84)85015-9).
    """
    carbon_BLX = backbone[:, :, 1]
    later_BLX = _sum_of_following(force_BLX)
    torque_BLX = _sum_of_following(np.cross(carbon_BLX, force_BLX)) - np.cross(
        carbon_BLX, later_BLX
    )
    axis_BLTX = np.diff(backbone, axis=2)
    axis_BLTX /= np.linalg.norm(axis_BLTX, axis=-1, keepdims=True)
    slope_BLT: Array = (axis_BLTX * torque_BLX[:, :, None]).sum(-1)
    return slope_BLT


def _sum_of_following(values_BLX: Array) -> Array:
    return np.cumsum(values_BLX[:, ::-1], axis=1)[:, ::-1] - values_BLX


class _Energy:
    """An energy of alpha carbons that penalises clashes, rewards contacts and sets the radius."""

    def __init__(self, kind_BL: Array, target_B: Array, pull_B: Array) -> None:
        length = kind_BL.shape[1]
        apart_LL = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
        strands_BLL = (kind_BL[:, :, None] == STRAND) & (kind_BL[:, None] == STRAND)
        self._reach_BLL = np.where(apart_LL > 4, 5.8 - 1.1 * strands_BLL, 4.6) * (apart_LL >= 3)
        self._pull_BLL = pull_B[:, None, None] * (apart_LL > 4)
        self._target_B = target_B

    def gradient(self, carbon_BLX: Array) -> Array:
        """The energy's derivatives by the positions."""
        distance_BLL = distances(carbon_BLX) + np.eye(carbon_BLX.shape[1])  # avoids a division by 0
        near_BLL = 1 / (1 + np.exp(distance_BLL - 9.5))
        slope_BLL = self._pull_BLL * near_BLL * (1 - near_BLL)
        slope_BLL -= 2 * np.maximum(0, self._reach_BLL - distance_BLL)
        slope_BLL /= distance_BLL
        pairs_BLX: Array = slope_BLL.sum(2)[..., None] * carbon_BLX
        pairs_BLX -= np.einsum("bij,bjx->bix", slope_BLL, carbon_BLX)
        radius_B = radius_of_gyration(carbon_BLX)
        size_B = 8 * (radius_B - self._target_B) / radius_B / carbon_BLX.shape[1]
        pairs_BLX += size_B[:, None, None] * (carbon_BLX - carbon_BLX.mean(1, keepdims=True))
        return pairs_BLX


def distances(place_BLX: Array) -> Array:
    """Pairwise distances [B, L, L] in Å."""
    centred = place_BLX - place_BLX.mean(1, keepdims=True)
    square_BL = (centred**2).sum(2)
    product_BLL = np.einsum("bix,bjx->bij", centred, centred)
    square_BLL = square_BL[:, :, None] + square_BL[:, None] - 2 * product_BLL
    distance_BLL: Array = np.sqrt(np.maximum(square_BLL, 0))
    return distance_BLL


def radius_of_gyration(carbon_BLX: Array) -> Array:
    """Radius of gyration [B] in Å."""
    centred = carbon_BLX - carbon_BLX.mean(1, keepdims=True)
    radius_B: Array = np.sqrt((centred**2).sum(2).mean(1))
    return radius_B


def _is_free_of_clashes(backbone: Array) -> Array:
    """Whether all residues 3 or more apart in the chain keep the minimum distances [B]."""
    length = backbone.shape[1]
    atom = np.repeat(np.arange(length), 3)
    pair_LL, pair_AA = (np.abs(np.subtract.outer(i, i)) >= 3 for i in (np.arange(length), atom))
    carbons_BLL = np.where(pair_LL, distances(backbone[:, :, 1]), np.inf)
    all_BAA = np.where(pair_AA, distances(backbone.reshape(len(backbone), -1, 3)), np.inf)
    good_B: Array = (carbons_BLL.min((1, 2)) > MIN_CA_DISTANCE) & (
        all_BAA.min((1, 2)) > MIN_ATOM_DISTANCE
    )
    return good_B


def beta_carbons(backbone: Array) -> Array:
    """Positions of beta carbons [B, L, X] by ideal geometry, of virtual ones for glycine."""
    first, second = (np.diff(backbone, axis=2)[:, :, bond] for bond in (0, 1))
    normal = np.cross(first, second)
    beta_BLX: Array = (
        -0.58273431 * normal + 0.56802827 * first - 0.54067466 * second + backbone[:, :, 1]
    )
    return beta_BLX


def draw_sequences(backbone: Array, kind_BL: Array, random: np.random.Generator) -> Array:
    """Random amino acids [B, L] that suit the structure, such as hydrophobic ones inside."""
    neighbours_BL = (distances(beta_carbons(backbone)) < 10).sum(2)
    spread_B1 = neighbours_BL.std(1, keepdims=True) + 1e-6
    buried_BL = (neighbours_BL - neighbours_BL.mean(1, keepdims=True)) / spread_B1
    rows = {
        letter: tastes
        for letter, *tastes in map(str.split, RESIDUE_PROPENSITIES.strip().splitlines())
    }
    hydropathy, *propensities = np.array([rows[letter] for letter in AMINO_ACIDS], float).T
    likes = 1.2 * buried_BL[..., None] * hydropathy / 4.5 + np.log(propensities)[kind_BL]
    residue_BL: Array = np.argmax(likes + random.gumbel(size=likes.shape), axis=-1)
    return residue_BL
