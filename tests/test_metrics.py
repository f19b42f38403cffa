"""The measures against other ways to compute them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fpdm import metrics
from fpdm.config import ConfigError, DataConfig
from fpdm.data import open_dataset

GENERATOR = torch.Generator()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR.manual_seed(seed), dtype=torch.float64)


def whole(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    data = open_dataset(DataConfig(split=split))  # type: ignore[arg-type]
    return data.batch(np.arange(len(data)))


def test_frechet_of_commuting_covariances_is_analytic():
    q = torch.linalg.qr(normal(6, 6)).Q
    a, b = torch.tensor([4.0, 1, 9, 7, 2, 5]).double(), torch.tensor([1.0, 1, 8, 3, 2, 6]).double()
    m = normal(6, seed=1)
    expected = m.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    got = metrics.frechet(m, q * a @ q.mT, torch.zeros(6), q * b @ q.mT)
    assert got == pytest.approx(expected.item(), rel=1e-12)


def test_frechet_agrees_with_a_general_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    f, g = normal(90, 12) @ normal(12, 12, seed=1), normal(70, 12, seed=2) + 0.3
    (m1, s1), (m2, s2) = metrics.moments(f), metrics.moments(g)
    root = linalg.sqrtm((s1 @ s2).numpy()).real
    expected = (m1 - m2).square().sum().item() + np.trace(s1.numpy() + s2.numpy() - 2 * root)
    assert metrics.frechet(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet(m2, s2, m1, s1) == pytest.approx(expected, rel=1e-9)
    # the root of one product is not the product of the roots: the shortcut would be noticed
    roots = linalg.sqrtm(s1.numpy()) @ linalg.sqrtm(s2.numpy())
    naive = (m1 - m2).square().sum().item() + np.trace(s1.numpy() + s2.numpy() - 2 * roots)
    assert abs(naive - expected) > 1e-3 * expected


def test_frechet_of_equal_and_of_singular_features():
    f = normal(40, 3) @ normal(3, 8, seed=1)
    assert abs(metrics.frechet(*metrics.moments(f), *metrics.moments(f))) < 1e-6
    shifted = metrics.frechet(*metrics.moments(f), *metrics.moments(f + 2.0))
    assert shifted == pytest.approx(32.0, rel=1e-6)


def test_mmd_is_the_unbiased_double_sum():
    a, b = normal(7, 4), normal(5, 4, seed=1) + 0.5

    def k(u, v):
        return (u @ v / 4 + 1) ** 3

    within_a = sum(k(u, v) for i, u in enumerate(a) for j, v in enumerate(a) if i != j) / 42
    within_b = sum(k(u, v) for i, u in enumerate(b) for j, v in enumerate(b) if i != j) / 20
    across = sum(k(u, v) for u in a for v in b) / 35
    expected = (within_a + within_b - 2 * across).item()
    assert metrics.mmd(a, b) == pytest.approx(expected, rel=1e-12)
    assert metrics.mmd(a, a.flip(0)) < 0  # the biased estimate would be 0


def test_mmd_of_equal_distributions_has_mean_zero():
    values = [metrics.mmd(normal(50, 3, seed=i), normal(50, 3, seed=1000 + i)) for i in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(300)
    assert metrics.mmd(normal(50, 3), normal(50, 3, seed=1) + 0.5) > 3 * np.std(values)


def test_nearest_distances_are_those_of_all_pairs_and_zero_for_copies():
    x, pool = normal(9, 1, 8, 8).float(), normal(30, 1, 8, 8, seed=1).float()
    expected = (x.double()[:, None] - pool.double()).flatten(2).norm(dim=2).amin(dim=1)
    got = metrics.nearest_distances(x, pool.split(7))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert metrics.nearest_distances(pool[5:8] * 1, pool.split(4)).tolist() == [0, 0, 0]


def test_nearest_distances_refuse_other_shapes_and_nothing():
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"\(1, 4, 4\), expected \(1, 8, 8\)"):
        metrics.nearest_distances(x, [torch.zeros(3, 1, 4, 4)])
    with pytest.raises(ConfigError, match="no images"):
        metrics.nearest_distances(x, [])


def test_halves_are_disjoint_equal_stratified_and_fixed():
    _, labels = whole("all")
    for seed in (0, 19):
        a, b = metrics.split_halves(labels, seed)
        assert len(a) == len(b) == 898
        assert len(torch.cat([a, b]).unique()) == 1796
        counts = labels[a].bincount(minlength=10) - labels[b].bincount(minlength=10)
        assert counts.abs().max() <= 1
    again = metrics.split_halves(labels, 19)
    assert torch.equal(a, again[0])
    assert not torch.equal(a.sort().values, metrics.split_halves(labels, 0)[0].sort().values)
