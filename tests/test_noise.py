"""Philox against Random123's known answers and a second implementation; statistics; batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fpdm import noise

SEEDS = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0xA4093822299F31D0]
# Random123 1.14, kat_vectors: counter, key, words
KNOWN = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def known_answers() -> bool:
    """All vectors at once, one sample each."""
    counters = torch.tensor([c for c, _, _ in KNOWN]).T[:, :, None]
    keys = noise.as_keys([k[0] | k[1] << 32 for _, k, _ in KNOWN])
    even, odd = noise.philox(counters[0::2], counters[1::2], keys)
    words = torch.stack((even, odd), 1).reshape(4, -1).T
    return words.tolist() == [[int(w, 16) for w in text.split()] for _, _, text in KNOWN]


def plain_philox(counter: list[int], key: int) -> list[int]:
    """The paper's round, word by word, in Python integers."""
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & noise.MASK, p0 >> 32 ^ c[3] ^ k[1], p0 & noise.MASK]
        k = [(k[0] + 0x9E3779B9) & noise.MASK, (k[1] + 0xBB67AE85) & noise.MASK]
    return c


def plain_stream(key: int, c1: int, c2: int, domain: int, count: int) -> list[int]:
    words: list[int] = []
    for block in range(-(-count // 4)):
        words += plain_philox([block, c1, c2, domain], key)
    return words[:count]


def test_known_answers() -> None:
    assert known_answers()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ROUNDS", 9),
        ("MULTIPLIERS", noise.MULTIPLIERS[::-1]),
        ("WEYL", noise.WEYL[::-1]),
        ("MASK", 0x7FFFFFFF),
    ],
)
def test_known_answers_bite(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    monkeypatch.setattr(noise, name, value)
    assert not known_answers()


@pytest.mark.parametrize("count", [1, 3, 4, 5, 64])
def test_streams_against_plain_python(count: int) -> None:
    c1 = [0, 1, 2**31, 2**32 - 1, 7, 5]
    got = noise.uint32(noise.as_keys(SEEDS), torch.tensor(c1), 2**32 - 1, 3, count)
    assert got.dtype == torch.int64
    assert got.tolist() == [plain_stream(s, c, 2**32 - 1, 3, count) for s, c in zip(SEEDS, c1)]
    steps = torch.tensor([0, 2, 2**32 - 1, 1, 3, 9])
    swapped = noise.uint32(noise.as_keys(SEEDS), 11, steps, 0, count)
    assert swapped.tolist() == [
        plain_stream(s, 11, c, 0, count) for s, c in zip(SEEDS, steps.tolist())
    ]


def test_box_muller_on_the_words() -> None:
    keys = noise.as_keys(SEEDS)
    z = noise.normals(keys, 4, 2, noise.SAMPLE_STEP, (3, 5))
    assert z.shape == (6, 3, 5)
    assert z.dtype == torch.float32
    words = noise.uint32(keys, 4, 2, noise.SAMPLE_STEP, 16).tolist()
    for row, flat in zip(words, z.reshape(6, -1).tolist()):
        for i, value in enumerate(flat):
            w, angle = row[i - i % 2], row[i - i % 2 + 1]
            radius = math.sqrt(-2 * math.log((w + 0.5) / 2**32))
            turn = (math.sin if i % 2 else math.cos)(2 * math.pi * angle / 2**32)
            assert value == pytest.approx(radius * turn, rel=2e-7, abs=1e-12)


def test_extreme_words(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = noise.as_keys([0])
    for word in (0, noise.MASK):
        monkeypatch.setattr(
            noise, "philox", lambda e, o, k, w=word: (torch.full_like(e, w), torch.full_like(e, w))
        )
        u = noise.uniforms(keys, 0, 0, 0, 4)
        assert u.dtype == torch.float64
        assert u.min() > 0.0
        assert u.max() < 1.0
        z = noise.normals(keys, 0, 0, 0, (4,))
        assert z.isfinite().all()
        assert z.abs().max() < 6.8


def same_in_every_batch(c1_of: object) -> bool:
    """Sample i alone, in a slice and in a permutation; ``c1_of`` maps (ids, positions) to c1."""
    seeds = torch.arange(67) * 2**57 + 3
    ids = torch.arange(67)

    def draw(chosen: Tensor) -> Tensor:
        c1 = c1_of(chosen, torch.arange(len(chosen)))  # type: ignore[operator]
        return noise.normals(noise.as_keys(seeds[chosen]), c1, 9, 2, (1, 3, 5))

    whole = draw(ids)
    order = torch.randperm(67, generator=torch.Generator().manual_seed(0))
    parts = [order, *ids.split(1), *ids.split(5), *ids.split(32)]
    return all(torch.equal(draw(part), whole[part]) for part in parts)


def test_batch_composition() -> None:
    assert same_in_every_batch(lambda ids, positions: ids)
    assert not same_in_every_batch(lambda ids, positions: positions)  # keyed by slot: caught


def test_prefix() -> None:
    keys = noise.as_keys(SEEDS)
    long = noise.uint32(keys, 1, 2, 3, 1000)
    for count in (1, 2, 6, 999):
        assert torch.equal(noise.uint32(keys, 1, 2, 3, count), long[:, :count])
        assert torch.equal(noise.normals(keys, 1, 2, 3, (count,)),
                           noise.normals(keys, 1, 2, 3, (1000,))[:, :count])  # fmt: skip


def test_streams_differ() -> None:
    """Key (either half), c1, c2 and domain each make another stream."""
    domains = [
        noise.SAMPLE_INIT, noise.SAMPLE_STEP, noise.TRAIN_NOISE, noise.TRAIN_T, noise.TRAIN_DROP,
        noise.TRAIN_FLIP, noise.TRAIN_ITERS, noise.ENCODE, noise.ENCODE_FLIP,
    ]  # fmt: skip
    assert len(set(domains)) == 9
    calls = [(k, a, b, d) for k in (0, 1, 2**32) for a in (0, 1) for b in (0, 1) for d in domains]
    streams = [noise.uint32(noise.as_keys([k]), a, b, d, 16)[0].tolist() for k, a, b, d in calls]
    words = [word for stream in streams for word in stream]
    assert len(set(words)) > len(words) - 3


def kolmogorov(sample: Tensor, cdf: Tensor) -> float:
    """sqrt(N) sup |F_N - F|; above 1.95 with probability 1e-3."""
    n = len(sample)
    f = cdf.sort().values
    rank = torch.arange(n, dtype=torch.float64)
    return math.sqrt(n) * max((f - rank / n).max().item(), ((rank + 1) / n - f).max().item())


def normal_faults(z: Tensor) -> list[str]:
    """What is wrong with supposed normals (rows, N): limits of 4.5 sigma, KS at 1e-3."""
    z = z.double()
    n, flat = z.numel(), z.flatten()
    checks = {
        "mean": flat.mean().abs() * math.sqrt(n) < 4.5,
        "variance": (flat.var() - 1).abs() * math.sqrt(n / 2) < 4.5,
        "kurtosis": ((flat**4).mean() - 3).abs() * math.sqrt(n / 96) < 4.5,
        "rows": (z.mean(1) * math.sqrt(z.shape[1])).abs().max() < 5.5,
        "neighbours": (flat[1:] * flat[:-1]).mean().abs() * math.sqrt(n) < 4.5,
        "between rows": (z[1:] * z[:-1]).mean().abs() * math.sqrt(n) < 4.5,
        "ks": kolmogorov(flat, torch.special.ndtr(flat)) < 1.95,
    }
    return [name for name, good in checks.items() if not good]


@pytest.mark.parametrize("vary", ["key", "c1", "c2"])
def test_normals_are_normal(vary: str) -> None:
    ids = torch.arange(512)
    keys = ids if vary == "key" else torch.full_like(ids, -(2**62))
    c1 = ids if vary == "c1" else 5
    c2 = ids if vary == "c2" else 5
    z = noise.normals(keys, c1, c2, noise.TRAIN_NOISE, (512,))
    assert normal_faults(z) == []
    assert "variance" in normal_faults(z * 1.02)
    assert "ks" in normal_faults((z.double().abs() ** 0.97) * z.sign())
    assert "neighbours" in normal_faults(z + 0.1 * z.roll(1, 1))
    assert "between rows" in normal_faults(z + 0.1 * z.roll(1, 0))


def test_uniforms_are_uniform() -> None:
    u = noise.uniforms(noise.as_keys(range(256)), 3, 4, noise.TRAIN_T, 1024).flatten()
    assert kolmogorov(u, u) < 1.95
    assert kolmogorov(u**1.02, u**1.02) > 1.95
    first = noise.uniforms(noise.as_keys([7]).expand(1 << 16), torch.arange(1 << 16), 0, 3, 1)
    assert kolmogorov(first.flatten(), first.flatten()) < 1.95


def test_integers() -> None:
    for seed in SEEDS:
        draws = [noise.integers(seed, c, 8, noise.TRAIN_ITERS, -3, 12) for c in range(400)]
        assert set(draws) == set(range(-3, 13))
        words = noise.uint32(
            noise.as_keys([seed]).expand(400), torch.arange(400), 8, noise.TRAIN_ITERS, 1
        )
        assert draws == (-3 + (words[:, 0] * 16 >> 32)).tolist()
        expected = 400 / 16
        chi = sum((draws.count(v) - expected) ** 2 / expected for v in range(-3, 13))
        assert chi < 44  # 15 degrees of freedom, 1e-4
    assert noise.integers(0, 0, 0, 0, 4, 4) == 4
    assert noise.integers(0, 0, 0, 0, 0, 2**32 - 1) == plain_stream(0, 0, 0, 0, 1)[0]


def test_no_generator_and_no_synchronisation() -> None:
    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    keys, c1 = noise.as_keys(range(128)), torch.arange(128)
    state = torch.get_rng_state()
    with Recorder() as recorder:
        noise.normals(keys, c1, 5, noise.TRAIN_NOISE, (1, 8, 8))
    assert torch.equal(state, torch.get_rng_state())
    assert len(recorder.names) < 130  # the training step pays for each on the CPU
    waits = ("_local_scalar_dense", "nonzero", "rand")
    assert not [n for n in recorder.names if any(w in n for w in waits)]
    with Recorder() as control:
        int(torch.randn(1))
    assert [n for n in control.names if any(w in n for w in waits)]


def test_keys() -> None:
    assert noise.as_keys([0, 2**63, 2**64 - 1]).tolist() == [0, -(2**63), -1]
    same = torch.tensor([1, -1])
    assert torch.equal(noise.as_keys(same), same)
    assert noise.as_keys(same.view(torch.uint64)).tolist() == [1, -1]
    assert len(noise.as_keys([])) == 0
    assert noise.normals(noise.as_keys([]), 0, 0, 0, (2, 2)).shape == (0, 2, 2)


@pytest.mark.parametrize(
    "seeds", [[-1], [2**64], [0, 1.5], ["1"], torch.zeros(2), torch.zeros(2, 2).long()]
)
def test_bad_seeds(seeds: object) -> None:
    with pytest.raises(ValueError, match=r"seeds?: got .* expected .*int"):
        noise.as_keys(seeds)  # type: ignore[arg-type]


def test_bad_counters_and_ranges() -> None:
    keys = noise.as_keys([0])
    with pytest.raises(ValueError, match="c1: got -1, expected"):
        noise.uint32(keys, -1, 0, 0, 1)
    with pytest.raises(ValueError, match="c2: got 4294967296, expected"):
        noise.uint32(keys, 0, 2**32, 0, 1)
    with pytest.raises(ValueError, match=r"range: got 3\.\.2, expected"):
        noise.integers(0, 0, 0, 0, 3, 2)


@pytest.mark.gpu
def test_same_words_on_the_gpu() -> None:
    keys, c1 = noise.as_keys(SEEDS), torch.arange(6)
    words = noise.uint32(keys, c1, 3, 1, 1000)
    z = noise.normals(keys, c1, 3, 1, (1000,))
    keys, c1 = keys.cuda(), c1.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu, z_gpu = noise.uint32(keys, c1, 3, 1, 1000), noise.normals(keys, c1, 3, 1, (1000,))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(on_gpu.cpu(), words)
    torch.testing.assert_close(z_gpu.cpu(), z, rtol=2e-7, atol=0)
