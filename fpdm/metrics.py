"""Distances between sets of samples: Frechet, maximum mean discrepancy, nearest neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fpdm.config import ConfigError
from fpdm.data import stream_indices


def moments(f: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N,d) -> mean (d,), covariance (d,d) with divisor N - 1, float64."""
    if f.dim() != 2 or len(f) < 2:
        raise ConfigError(f"features: got shape {tuple(f.shape)}, expected (N,d) with N >= 2")
    return f.double().mean(dim=0), torch.cov(f.double().mT).reshape(f.shape[1], f.shape[1])


def frechet(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), by eigenvalues of symmetric matrices.

    Means (d,), covariances (d,d), which may be singular; eigenvalues that rounding made negative
    count as zero.
    """
    values, vectors = torch.linalg.eigh(cov1.double())
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    inner = root @ cov2.double() @ root
    cross = torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp_min(0).sqrt().sum()
    gap = (mean1.double() - mean2.double()).square().sum()
    return (gap + cov1.double().trace() + cov2.double().trace() - 2 * cross).item()


def mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD of features (N,d), (M,d) under k(u,v) = (u.v / d + 1)^3.

    sum_{i != j} k(a_i,a_j) / N(N-1) + the same of b - 2 sum_{i,j} k(a_i,b_j) / NM; may be negative.
    """
    a, b = a.double(), b.double()

    def within(f: Tensor) -> Tensor:
        k = (f @ f.mT / f.shape[1] + 1) ** 3
        return (k.sum() - k.diagonal().sum()) / (len(f) * (len(f) - 1))

    return (within(a) + within(b) - 2 * ((a @ b.mT / a.shape[1] + 1) ** 3).mean()).item()


def nearest_distances(x: Tensor, pool: Iterable[Tensor]) -> Tensor:
    """Euclidean distance (N,) float64 of every x (N,C,h,w) to its nearest image in ``pool``,
    batches (n,C,h,w). The neighbour is found by inner products, its distance taken from the
    difference, so that a copy is at exactly 0. Raises ConfigError when the pool is empty or of
    another shape."""
    flat = x.double().flatten(1)
    best = torch.full((len(x),), math.inf, dtype=torch.float64)
    for batch in pool:
        if batch.shape[1:] != x.shape[1:]:
            raise ConfigError(f"data: got {tuple(batch.shape[1:])}, expected {tuple(x.shape[1:])}")
        other = batch.double().flatten(1)
        index = (other.square().sum(dim=1) - 2 * flat @ other.mT).argmin(dim=1)
        best = torch.minimum(best, (flat - other[index]).norm(dim=1))
    if best.isinf().any():
        raise ConfigError("data: got no images, expected some to compare with")
    return best


def split_halves(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Two disjoint halves of the ids 0..n-1, equal in size, permuted per label by
    ``stream_indices`` and cut in the middle; ids left over by odd labels go to either half in turn,
    and a last one without partner to neither."""
    classes = int(labels.max()) + 1
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    over: list[Tensor] = []
    for label in range(classes):
        ids = (labels == label).nonzero()[:, 0]
        if not len(ids):
            continue
        ids = ids[torch.from_numpy(stream_indices(len(ids), seed * classes + label, 0, len(ids)))]
        half = len(ids) // 2
        halves[0].append(ids[:half])
        halves[1].append(ids[half : 2 * half])
        over.append(ids[2 * half :])
    spare = torch.cat(over)
    pairs = 2 * (len(spare) // 2)
    return torch.cat([*halves[0], spare[0:pairs:2]]), torch.cat([*halves[1], spare[1:pairs:2]])
