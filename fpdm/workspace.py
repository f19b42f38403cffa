"""The static buffers of one batch on its way: every launch of the plan reads and writes these only.

Beside them a launch reads weights, the sampler's tables, and nothing else, so that a captured
launch can be replayed at any timestep of any batch: what varies from step to step is looked up by
device counters. B samples, R = G B rows (G = 2 branches under guidance, else 1), K the most
iterations of a timestep, U = R T D elements. Memory: u 2 U, iterates 2 U, intermediates 7 U, up to
2 U of earlier solutions, 1 U of results while a residual is watched, and one chunk of tables.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fpdm.block import Activations, forward_workspace
from fpdm.config import ModelConfig
from fpdm.model import Modulation
from fpdm.plan import GROUP

_tokens = itertools.count()


@dataclass(frozen=True)
class Sizes:
    """What a workspace is made for: B, G, K, timesteps of a table, solutions kept, whether a
    residual decides, compute and residual dtype, device."""

    batch: int
    branches: int
    most: int
    table: int
    keep: int
    watched: bool
    dtype: torch.dtype
    residual_dtype: torch.dtype
    device: torch.device


@dataclass
class Watch:
    """Who is done. ``slots`` (4,R), one column per slot: ``rows`` of the batch that they hold,
    ``count`` iterations run, ``cap`` of them, ``place`` of the next residual in the table; ``done``
    (R,). Per row: ``bank``, iterations left in all, and ``used`` ones of this timestep; ``result``
    (R,T,D). ``left`` (1,): slots that go on."""

    slots: Tensor
    rows: Tensor
    count: Tensor
    cap: Tensor
    place: Tensor
    done: Tensor
    bank: Tensor
    used: Tensor
    left: Tensor
    result: Tensor

    @classmethod
    def like(cls, z: Tensor) -> Watch:
        """Of an iterate z (R,T,D)."""
        slots, bank, used, left = (
            z.new_zeros(shape, dtype=torch.int64) for shape in ((4, len(z)), len(z), len(z), 1)
        )
        rows, count, cap, place = slots.unbind()
        done = z.new_zeros(len(z), dtype=torch.bool)
        result = torch.empty_like(z)
        return cls(slots, rows, count, cap, place, done, bank, used, left, result)


@dataclass
class Workspace:
    """Buffers for ``sizes``; a smaller batch uses their first rows. ``vectors`` of the adaLN layers
    (fixed-point block, pre, post, final) and ``tables`` of those that depend on t. ``residual``
    (K,R); ``step`` and ``j`` (1,) count timesteps and iterations on the device. ``token`` names the
    addresses in the keys of graphs."""

    sizes: Sizes
    x: Tensor
    x0: Tensor
    noise: Tensor
    keys: Tensor
    y: Tensor
    step: Tensor
    j: Tensor
    vectors: list[Tensor]
    tables: list[Tensor]
    u: Tensor
    z: tuple[Tensor, Tensor]
    acts: Activations
    norms: Tensor
    residual: Tensor
    solutions: list[Tensor]
    watch: Watch | None
    pre_depth: int
    token: int = field(default_factory=lambda: next(_tokens))

    @classmethod
    def allocate(cls, c: ModelConfig, s: Sizes) -> Workspace:
        """Empty buffers for a model; a DiT has no iterates, vectors or tables."""
        rows, looped = s.batch * s.branches, c.kind == "fpdm"
        wide: dict[str, Any] = {"dtype": torch.float32, "device": s.device}
        integers: dict[str, Any] = {"dtype": torch.int64, "device": s.device}
        d, t = c.hidden_size, c.tokens if looped else 0

        def iterate(width: int = 1, dtype: torch.dtype = s.residual_dtype) -> Tensor:
            return torch.empty(rows, t, width * d, dtype=dtype, device=s.device)

        widths = [6] * (1 + c.pre_depth + c.post_depth) + [2] if looped else []
        timed = len(widths) if c.pre_post_timestep_conditioning else len(widths[:1])
        vectors = [torch.empty(rows, w * d, dtype=s.dtype, device=s.device) for w in widths]
        tables = [v.new_empty(s.table, *v.shape) for v in vectors[:timed]]
        image = (s.batch, c.in_channels, c.input_size, c.input_size)
        z = iterate(), iterate()
        return cls(
            sizes=s,
            x=torch.empty(image, **wide),
            x0=torch.empty(image, **wide),
            noise=torch.empty(image, **wide),
            keys=torch.empty(s.batch, **integers),
            y=torch.empty(rows, **integers),
            step=torch.zeros(1, **integers),
            j=torch.zeros(1, **integers),
            vectors=vectors,
            tables=tables,
            u=iterate(2, s.dtype),
            z=z,
            acts=forward_workspace(z[0], s.dtype, "full"),
            norms=torch.empty(GROUP * 2 * rows, **wide),
            residual=torch.empty(s.most, rows, **wide),
            solutions=[iterate() for _ in range(s.keep)],
            watch=Watch.like(z[0]) if s.watched else None,
            pre_depth=c.pre_depth,
        )

    @property
    def watching(self) -> Watch:
        """``watch`` of a workspace that has one."""
        assert self.watch is not None
        return self.watch

    def modulation(self, rows: int) -> Modulation:
        """The vectors of the first ``rows`` rows."""
        fp, *others, final = (v[:rows] for v in self.vectors)
        return Modulation(others[: self.pre_depth], fp, others[self.pre_depth :], final)

    def tensors(self) -> list[Tensor]:
        """Every buffer."""
        owners = [self, self.acts] + ([self.watch] if self.watch else [])
        values = [value for owner in owners for value in vars(owner).values()]
        flat = [
            v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])
        ]
        return [v for v in flat if isinstance(v, Tensor)]

    def nbytes(self) -> int:
        """Bytes of all buffers, each counted once."""
        storages = {s._cdata: s for s in (t.untyped_storage() for t in self.tensors())}
        return sum(storage.nbytes() for storage in storages.values())
