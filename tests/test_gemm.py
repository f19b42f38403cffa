"""Fused GEMMs under the interpreter: every way to cut and load, bits, edges, and the route taken.

The values of whole operators on generated cases are in test_triton.py; this is what is particular
to these kernels. They run in a process of their own, because the interpreter is chosen when a
kernel is defined; ``TRITON_INTERPRET=1 pytest tests/test_gemm.py`` runs them in this one.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contract import violation
from interpreter import inside, outside, run_inside
from torch import Tensor

from fpdm.kernels import reference
from fpdm.kernels.gemm_table import Choice, Tile

pytest.importorskip("triton")
# pointers and descriptors, one block a program and several, blocks within and across samples
TILES = [
    Tile(16, 16, 16, 4, 2),
    Tile(32, 16, 32, 4, 2, tma=True),
    Tile(16, 32, 64, 4, 3, tma=True, persistent=True),
    Tile(64, 32, 16, 4, 2, persistent=True),
]
# B, T, D, O: blocks divide; nothing does; one row; no sample; many blocks of rows
SHAPES = [(2, 32, 64, 32), (3, 17, 40, 72), (1, 1, 24, 17), (0, 4, 48, 16), (2, 96, 16, 32)]
ODD = (3, 11, 24, 40)
# of the operands, of the residual stream
DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float16),
          (torch.float16, torch.float32)]  # fmt: skip


@outside
def test_interpreter() -> None:
    run_inside(__file__)


def kernels() -> Any:
    from fpdm.kernels import gate_residual, gemm, mlp

    return SimpleNamespace(
        adaln_linear=gemm.adaln_linear, add_gelu=gemm.linear_add_gelu,
        gate=gemm.linear_gate_residual, module=gemm, mlp=mlp,
        gate_residual=gate_residual.gate_residual,
    )  # fmt: skip


def case(shape: tuple[int, ...], dtype: torch.dtype, residual: torch.dtype) -> SimpleNamespace:
    """Operands; modulation vectors are chunks of one (B,6D), weights are slices of wider ones."""
    b, t, d, o = shape
    g = torch.Generator().manual_seed(0)

    def normal(*size: int, of: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=g) * scale).to(of)

    shift, scale, gate, *_ = normal(b, 6 * d, scale=0.5).chunk(6, -1)
    return SimpleNamespace(
        z=normal(b, t, d, of=residual), prev=normal(b, t, d, of=residual), shift=shift,
        scale=scale, gate=gate, x=normal(b, t, o), up=normal(o, 2 * d, scale=d**-0.5)[:, d:],
        down=normal(d, o, scale=o**-0.5), wide_bias=normal(o), bias=normal(d), u=normal(b, t, o),
        y=normal(b, t, d),
    )  # fmt: skip


def doubled(c: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(**{k: v.double() for k, v in vars(c).items()})


def empty(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.full(size, float("nan"), dtype=dtype)


def results(c: SimpleNamespace, tile: Tile) -> dict[str, Tensor]:
    """Every output of the three, everything kept, into buffers full of NaN."""
    k, (b, t, d), o = kernels(), c.z.shape, c.up.shape[0]
    dtype, found = c.up.dtype, {}
    found["y"], found["qkv"] = empty(b, t, d, dtype=dtype), empty(b, t, o, dtype=dtype)
    k.adaln_linear(c.z, c.shift, c.scale, c.up, c.wide_bias, found["y"], found["qkv"], fused=tile)
    for name, addend in (("bias", c.wide_bias), ("tensor", c.u)):
        pre, out = empty(b, t, o, dtype=dtype), empty(b, t, o, dtype=dtype)
        k.add_gelu(c.y, c.up, addend, pre, out, fused=tile)
        found |= {f"pre {name}": pre, f"gelu {name}": out}
    found["p"], found["norms"] = empty(b, t, d, dtype=dtype), empty(2, b, dtype=torch.float32)
    found["z'"] = c.z.clone()
    k.gate(
        c.x, c.down, c.bias, c.z if b == 0 else found["z'"], c.gate, found["p"], found["z'"],
        c.prev, found["norms"], fused=tile,
    )  # fmt: skip
    return found


def expected(c: SimpleNamespace) -> dict[str, Tensor]:
    """The same in plain operators, in the operands' dtype."""
    found = {"y": reference.adaln(c.z, c.shift, c.scale)}
    found["qkv"] = reference.linear(found["y"], c.up, c.wide_bias)
    for name, addend in (("bias", c.wide_bias), ("tensor", c.u)):
        pre = torch.empty_like(found["qkv"])
        found[f"gelu {name}"] = reference.linear_add_gelu(c.y, c.up, addend, pre=pre)
        found[f"pre {name}"] = pre
    found["p"] = reference.linear(c.x, c.down, c.bias)
    wide = torch.promote_types(c.z.dtype, torch.float32)
    found["norms"] = torch.empty(2, c.z.shape[0], dtype=wide)
    found["z'"] = reference.gate_residual(
        c.z, found["p"], c.gate, prev=c.prev, norms=found["norms"]
    )
    return found


@inside
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("dtype", "residual"), DTYPES)
def test_every_tile_keeps_the_contract(
    tile: Tile, dtype: torch.dtype, residual: torch.dtype
) -> None:
    for shape in SHAPES:
        c = case(shape, dtype, residual)
        ours, plain, oracle = results(c, tile), expected(c), expected(doubled(c))
        norm = 0.0
        if c.z.numel():
            rstd = c.z.double().var(-1, unbiased=False).add(1e-6).rsqrt()
            norm = (c.z.abs().max() * rstd.max()).item()
        for name, found in ours.items():
            behind = norm if name in ("y", "qkv") else 0.0
            line = violation(found, plain[name], oracle[name], dtype, behind)
            assert line is None, (shape, name, line)


@inside
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("dtype", "residual"), DTYPES)
def test_what_the_backward_rebuilds_is_what_the_forward_had(
    tile: Tile, dtype: torch.dtype, residual: torch.dtype
) -> None:
    """z' from z and the kept p, GELU from the kept pre: bit for bit, kept or not."""
    k = kernels()
    c = case(ODD, dtype, residual)
    kept = results(c, tile)
    assert torch.equal(kept["z'"], k.gate_residual(c.z, kept["p"], c.gate))
    free = k.gate(c.x, c.down, c.bias, c.z, c.gate, fused=tile)
    assert torch.equal(kept["z'"], free)
    for name, addend in (("bias", c.wide_bias), ("tensor", c.u)):
        assert torch.equal(kept[f"gelu {name}"], k.mlp.gelu(kept[f"pre {name}"]))
        assert torch.equal(kept[f"gelu {name}"], k.add_gelu(c.y, c.up, addend, fused=tile))
    assert torch.equal(
        kept["qkv"],
        k.adaln_linear(c.z, c.shift, c.scale, c.up, c.wide_bias, fused=tile),
    )
    if dtype == torch.float16:
        # control: an unrounded product would show
        p = reference.linear(c.x.float(), c.down.float(), c.bias.float())
        loose = reference.gate_residual(c.z.float(), p, c.gate.float()).to(residual)
        assert not torch.equal(kept["z'"], loose)


@inside
def test_columns_beyond_a_constant_row_are_zero() -> None:
    """Beyond K the normalised row is -mean rstd: -Inf in float16, which times 0 is NaN."""
    c = case((1, 16, 40, 32), torch.float16, torch.float16)
    c.z.fill_(60000.0)
    for tile in TILES:
        assert kernels().adaln_linear(
            c.z, c.shift, c.scale, c.up, c.wide_bias, fused=tile
        ).isfinite().all()  # fmt: skip


@inside
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 65504.0])
def test_a_bad_sample_stays_alone(bad: float) -> None:
    """Also where one block holds rows of several samples."""
    for tile in TILES[1:]:
        clean = case(ODD, torch.float16, torch.float16)
        dirty = case(ODD, torch.float16, torch.float16)
        for operand in (dirty.z, dirty.x, dirty.y):
            operand[1, 3] = bad
        pairs = zip(results(clean, tile).items(), results(dirty, tile).values())
        for (name, a), b in pairs:
            if name == "norms":
                a, b = a.t(), b.t()
            assert torch.equal(a[0], b[0]), name
            assert torch.equal(a[2], b[2]), name


@inside
def test_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table decides unless ``fused`` does; what it measured best comes with its tile."""
    gemm, c = kernels().module, case(SHAPES[0], torch.float16, torch.float16)
    asked: list[Any] = []
    ran: list[Any] = []
    tile = TILES[0]

    def choose(*key: Any) -> Choice:
        if key[0] == "linear":
            # the product inside of library and glue
            return Choice("library", "")
        asked.append(key)
        return Choice("fused", "", tile)

    plan = gemm._plan
    monkeypatch.setattr(gemm, "choice", choose)
    monkeypatch.setattr(gemm, "_plan", lambda *a: ran.append(a[-1]) or plan(*a))

    def all_three(fused: bool | None) -> None:
        gemm.adaln_linear(c.z, c.shift, c.scale, c.up, c.wide_bias, y=c.y.clone(), fused=fused)
        buffer = torch.empty_like(c.u)
        gemm.linear_add_gelu(c.y, c.up, c.u, pre=buffer, out=buffer, fused=fused)
        gemm.linear_gate_residual(c.x, c.down, c.bias, c.z, c.gate, fused=fused)
        gemm.linear_gate_residual_adaln(
            c.x, c.down, c.bias, c.z, c.gate, c.shift, c.scale, fused=fused
        )

    all_three(False)
    assert (asked, ran) == ([], [])
    all_three(True)
    assert (asked, ran) == ([], [None] * 4)
    all_three(None)
    assert ran[4:] == [tile] * 4
    (m, d, o), cpu, half = (64, 64, 32), torch.device("cpu"), torch.float16
    down = ("linear_gate_residual", m, d, o, half, cpu, False)
    up = [
        ("adaln_linear", m, o, d, half, cpu, True),
        ("linear_add_gelu", m, o, d, half, cpu, False),
    ]
    assert asked == [*up, down, ("linear_gate_residual_adaln", *down[1:])]


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_composite_with_adaln_behind(dtype: torch.dtype) -> None:
    """z' as from the GEMM alone, then adaLN of it; the kept product is filled on either route."""
    gemm, c = kernels().module, case(ODD, dtype, torch.float32)
    for fused in (False, True):
        p, z_out = empty(*c.z.shape, dtype=dtype), empty(*c.z.shape, dtype=torch.float32)
        found = gemm.linear_gate_residual_adaln(
            c.x, c.down, c.bias, c.z, c.gate, c.shift, c.scale, p=p, z_out=z_out, fused=fused
        )
        assert found[0] is z_out
        assert torch.equal(z_out, gemm.gate_residual(c.z, p, c.gate))
        assert torch.equal(found[1], gemm.adaln(z_out, c.shift, c.scale))
        plain, oracle = expected(c), expected(doubled(c))
        assert violation(p, plain["p"], oracle["p"], dtype) is None
        assert violation(z_out, plain["z'"], oracle["z'"], dtype) is None


@inside
def test_tuning_makes_entries_that_the_table_takes(tmp_path: Path) -> None:
    """On a CPU the times mean nothing; every arm must run, agree, and end in a valid entry."""
    from bench import gemm as bench
    from fpdm.kernels import gemm_table

    table = tmp_path / "table.json"
    table.write_text('{"entries": []}')
    cuts = {(s.op, s.keep) for s in bench.shapes(2, torch.float16)}
    for op, keep in sorted(cuts):
        s = bench.Shape(op, 1, 8, 32, 16, torch.float16, keep)
        found = bench.entry(s, (1, 9), torch.device("cpu"), "here", 1)
        assert found["refused"] == {}
        fused = gemm_table.tiles(op, 8, 32, torch.float16, 90) if op != "linear" else ()
        assert len(found["all_ms"]) == 1 + len(fused)
        gemm_table.write([found], table)
    assert table.read_text().count('"source": "here"') == len(cuts) == 11


@inside
def test_a_wrong_result_is_not_timed() -> None:
    from bench import gemm as bench

    s = bench.Shape("linear_bias_gelu", 1, 8, 32, 16, torch.float16, True)
    found, written = bench.arms(s, torch.device("cpu"))
    out, kept = written
    right = found["library"][1]

    def forgets() -> Tensor:
        right()
        kept.fill_(torch.nan)
        return out

    # the right numbers are in the buffers from the arm before
    found["idle"] = None, lambda: out
    found["forgetful"] = None, forgets
    found["wrong"] = None, lambda: right().mul_(1.01)
    found["broken"] = None, lambda: torch.empty(1, 2) @ torch.empty(1, 2)
    good, refused = bench.agreeing(found, written)
    assert set(refused) == {"idle", "forgetful", "wrong", "broken"}
    assert set(good) == set(found) - set(refused)
