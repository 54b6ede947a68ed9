"""Distances and rotations in three dimensions, as differentiable tensors."""

import torch
from torch import Tensor

# Suffixes: B samples, L residues, X coordinates in Å.


def pairwise_distances(place_BLX: Tensor) -> Tensor:
    """Distances [B, L, L], differentiable at zero."""
    square_BLL = (place_BLX[:, :, None] - place_BLX[:, None]).square().sum(-1)
    return (square_BLL + 1e-8).sqrt()


def best_rotation(product: Tensor) -> Tensor:
    """Least-squares rotations [..., 3, 3] between point sets, from the sums of their products.

    The eigenvector of the largest eigenvalue of a symmetric matrix is the rotation's quaternion:
    Horn 1987 (doi:10.1364/JOSAA.4.000629).
    """
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in product.unbind(-2))
    rows = [
        [xx + yy + zz, yz - zy, zx - xz, xy - yx],
        [yz - zy, xx - yy - zz, xy + yx, zx + xz],
        [zx - xz, xy + yx, yy - xx - zz, yz + zy],
        [xy - yx, zx + xz, yz + zy, zz - xx - yy],
    ]
    matrix = torch.stack([torch.stack(row, -1) for row in rows], -2)
    return quaternion_to_rotation(torch.linalg.eigh(matrix).eigenvectors[..., -1])


def quaternion_to_rotation(quaternion: Tensor) -> Tensor:
    """Rotations [..., 3, 3] of unit quaternions [..., 4], the real part first."""
    w, x, y, z = quaternion.unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
