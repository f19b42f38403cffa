"""Counter-based random numbers: every number is a function of (key, c1, c2, domain, element).

    words = Philox4x32-10(counter = (element // 4, c1, c2, domain), key = 64-bit seed)

bit for bit Random123's (Salmon et al., SC 2011) on any device, in int64 arithmetic: no generator
state, no global generator, no host synchronisation. A sample's numbers do not depend on its batch.

    sampling   key = the sample's seed, c1 = step index in the plan, c2 = 0
    training   key = the run's seed, c1 = slot in the global batch, c2 = step
    encoding   key = the seed, (c1, c2) = the first 64 bits of the image file's SHA-256

The domain keeps streams with the same key and counters apart. B is the batch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpdm.kernels import implementations
from fpdm.settings import integer

# domains; 7 is free, and none may change its number: the same seeds would draw other images
SAMPLE_INIT, SAMPLE_STEP, TRAIN_NOISE, TRAIN_T, TRAIN_DROP, TRAIN_FLIP, TRAIN_ITERS = range(7)
ENCODE, ENCODE_FLIP = 8, 9

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
HALF_ULP = 2.0**-33


def as_keys(seeds: Sequence[int] | Tensor) -> Tensor:
    """Keys (B,) int64, the two's complement of integer seeds with 0 <= seed < 2^64.

    A tensor of int64 or uint64 is taken as such keys already, on its device. Raises ValueError for
    anything else.
    """
    if isinstance(seeds, Tensor):
        if seeds.dtype not in (torch.int64, torch.uint64) or seeds.dim() != 1:
            raise ValueError(
                f"seeds: got {seeds.dtype} {tuple(seeds.shape)}, expected int64 or uint64 (B,)"
            )
        return seeds.view(torch.int64)
    values = [_seed(seed) for seed in seeds]
    return torch.tensor([v - (1 << 64) if v >> 63 else v for v in values], dtype=torch.int64)


def _seed(seed: object) -> int:
    value = integer(seed)
    if value is None or not 0 <= value < 1 << 64:
        raise ValueError(f"seed: got {seed!r}, expected an integer, 0 <= seed < 2^64")
    return value


def _pair(first: int, second: int, device: torch.device) -> Tensor:
    """(2,1,1) int64 by two fills: a copy from the host would synchronise."""
    pair = torch.full((2, 1, 1), first, dtype=torch.int64, device=device)
    pair[1] = second
    return pair


def philox(even: Tensor, odd: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Philox4x32-10 of counters (c0, c1, c2, c3) under keys (B,) int64.

    even = (c0, c2) (2,B,N) and odd = (c1, c3), broadcastable to it: int64 in [0, 2^32). Returns the
    words the same way, even = (w0, w2), odd = (w1, w3).

    Both products of a round are one multiplication, whose 64 bits wrap into the sign without loss;
    bits above the low 32 are cleared only where the next product would see them.
    """
    multiplier, weyl = _pair(*MULTIPLIERS, keys.device), _pair(*WEYL, keys.device)
    key = torch.stack((keys, keys >> 32)).unsqueeze(-1)
    for number in range(ROUNDS):
        if number:
            key = key + weyl
        product = (even * multiplier).flip(0)
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(MASK)
        odd = product
    return even, odd.bitwise_and_(MASK)


def _kernels(keys: Tensor) -> Any:
    """The same in one launch (fpdm.kernels.philox), where Triton is what runs on the device."""
    if (
        keys.device.type != "cuda"
        or implementations.resolve("auto", keys.device).name not in implementations.TRITON
    ):
        return None
    return importlib.import_module("fpdm.kernels.philox")


def _check_counters(*values: int | Tensor) -> None:
    for name, value in zip(("c1", "c2", "domain"), values):
        if not isinstance(value, Tensor) and not 0 <= value <= MASK:
            raise ValueError(f"{name}: got {value}, expected 0 <= {name} < 2^32")


def _counters(value: int | Tensor, keys: Tensor) -> Tensor:
    """A counter word as (B,), on the device of the keys."""
    return value & MASK if isinstance(value, Tensor) else torch.full_like(keys, value)


def _words(
    keys: Tensor, c1: int | Tensor, c2: int | Tensor, domain: int | Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Philox words of elements 0..4N-1, N = ceil(count / 4): ((w0, w2), (w1, w3)), each (2,B,N)."""
    blocks = -(-count // 4)
    even = torch.empty((2, len(keys), blocks), dtype=torch.int64, device=keys.device)
    even[0] = torch.arange(blocks, device=keys.device)
    even[1] = _counters(c2, keys).unsqueeze(-1)
    domains = _counters(domain, keys)
    odd = torch.stack((_counters(c1, keys).expand_as(keys), domains)).unsqueeze(-1)
    return philox(even, odd, keys)


def _interleave(first: Tensor, second: Tensor, count: int) -> Tensor:
    """(2,B,N) twice -> (B,count) in the order first[0], second[0], first[1], second[1], ..."""
    return torch.stack((first, second), -1).permute(1, 2, 0, 3).flatten(1)[:, :count]


def uint32(
    keys: Tensor, c1: int | Tensor, c2: int | Tensor, domain: int | Tensor, count: int
) -> Tensor:
    """Elements 0..count-1 of the streams, int64 in [0, 2^32), (B,count).

    keys (B,) int64 as from ``as_keys``; c1, c2, domain: integers in [0, 2^32), or int64 tensors
    (B,) on the device of the keys, whose low 32 bits count. Raises ValueError for an integer out of
    range.
    """
    _check_counters(c1, c2, domain)
    if (kernels := _kernels(keys)) is not None:
        return kernels.draw(keys, c1, c2, domain, count, normal=False)
    return _interleave(*_words(keys, c1, c2, domain, count), count)


def uniforms(
    keys: Tensor, c1: int | Tensor, c2: int | Tensor, domain: int | Tensor, count: int
) -> Tensor:
    """(word + 1/2) / 2^32, float64 (B,count), 0 and 1 excluded. Arguments as ``uint32``."""
    words = uint32(keys, c1, c2, domain, count)
    return words.double().mul_(2 * HALF_ULP).add_(HALF_ULP)


def normals(
    keys: Tensor, c1: int | Tensor, c2: int | Tensor, domain: int | Tensor, shape: Sequence[int]
) -> Tensor:
    """Standard normals, float32 (B,*shape), by Box-Muller on word pairs. Arguments as ``uint32``.

    z = sqrt(-2 log((w + 1/2) / 2^32)) (cos, sin)(2 pi w' / 2^32), |z| <= 6.8, in float64, so that
    libraries that differ in the last bit almost never differ in the float32 that leaves.
    """
    count = math.prod(shape)
    _check_counters(c1, c2, domain)
    if (kernels := _kernels(keys)) is not None:
        return kernels.draw(keys, c1, c2, domain, count, normal=True).view(len(keys), *shape)
    even, odd = _words(keys, c1, c2, domain, count)
    radius = even.double().mul_(2 * HALF_ULP).add_(HALF_ULP).log_().mul_(-2.0).sqrt_()
    angle = odd.double().mul_(2 * math.pi * 2 * HALF_ULP)
    cosine = torch.cos(angle).mul_(radius).float()
    z = _interleave(cosine, angle.sin_().mul_(radius).float(), count)
    return z.reshape(len(keys), *shape)


def _first_word(key: int, c1: int, c2: int, domain: int) -> int:
    """Element 0 of ``uint32`` in Python's integers: 10 us where 60 small tensors take 180."""
    (k0, k1), (a, b, c, d) = (key & MASK, key >> 32), (0, c1, c2, domain)
    for _ in range(ROUNDS):
        p, q = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b, c, d = q >> 32 ^ b ^ k0, q & MASK, p >> 32 ^ d ^ k1, p & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return a


def integers(key: int, c1: int, c2: int, domain: int, low: int, high: int) -> int:
    """An integer in low..high, both included, on the host: low + floor(w (high - low + 1) / 2^32).

    w is element 0 of ``uint32``. Probabilities are equal to (high - low + 1) / 2^32. Raises
    ValueError for an empty range, one wider than 2^32, a counter that is no 32-bit word or a seed
    that ``as_keys`` refuses.
    """
    span = high - low + 1
    if not 1 <= span <= 1 << 32:
        raise ValueError(f"range: got {low}..{high}, expected 1 to 2^32 integers")
    _check_counters(c1, c2, domain)
    return low + (_first_word(_seed(key), c1, c2, domain) * span >> 32)
