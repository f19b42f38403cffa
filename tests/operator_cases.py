"""Generated cases for every operator of an implementation, with red zones around every buffer.

``run_case(module, case)`` calls one operator of ``module`` (fpdm.kernels.reference, triton, cpu,
cuda through the shim: anything with the same functions) on buffers cut out of larger ones, and
returns what is wrong as lines of text, nothing when all is well:

    values      tolerance contract of contract.py, against plain PyTorch and float64
    coverage    outputs start as NaN: a missing store stays one
    bounds      nothing outside the outputs changes, inputs neither (red zones, strides' gaps)
    isolation   a bad sample (NaN, Inf, 65504) leaves the others bitwise as they were

Plain PyTorch is written here once more, independent of the reference; backward operators are
compared with autograd.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from contract import violation
from torch import Tensor

TOKENS = (1, 7, 17, 64, 255, 256, 1024)
WIDTHS = (48, 96, 384, 1000, 1152)
HEAD_SIZES = (12, 24, 64, 72, 80)
LAYOUTS = ("dense", "offset", "strided", "expanded")
EXTREMES = ("nan", "inf", "-inf", "65504", "constant", "mean")
CAP = 2**16
Values = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call. ``residual``: dtype of the residual stream; ``alias``: out is an input, where the
    operator allows it; ``variant``: which of an operator's forms."""

    op: str
    dtype: torch.dtype
    b: int
    t: int
    d: int
    heads: int
    layout: str = "dense"
    residual: torch.dtype | None = None
    alias: bool = False
    extreme: str = ""
    variant: int = 0
    seed: int = 0

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), f"B{self.b} T{self.t} D{self.d}"]
        words += [f"H{self.heads}"] if "attention" in self.op else []
        words += [self.layout] if self.layout != "dense" else []
        words += ["fp32 stream"] if self.residual not in (None, self.dtype) else []
        words += ["in place"] if self.alias else []
        words += [self.extreme] if self.extreme else []
        words += [f"form {self.variant}"] if self.variant else []
        return f"{self.op}[{' '.join(words)}]"

    @property
    def stream(self) -> torch.dtype:
        """dtype of z, z' and the iterate."""
        return self.residual or self.dtype


@dataclass(frozen=True)
class Spec:
    """An operator: operands, how it is called, and the same in plain PyTorch.

    inputs, outs, sums: name -> shape of (case); a shape starting with "v" is a vector (B,D) of the
    modulation. ``stream`` names live in the residual dtype, ``sums`` in float32 and accumulate.
    """

    inputs: Callable[[Case], dict[str, Any]]
    outs: Callable[[Case], dict[str, Any]]
    call: Callable[[Any, Values, Case], Any]
    plain: Callable[[Values, Case], dict[str, Tensor]]
    sums: Callable[[Case], dict[str, Any]] = lambda c: {}
    stream: tuple[str, ...] = ()
    alias: tuple[str, str] | None = None
    variants: int = 1
    norm: str = ""  # operand whose LayerNorm is taken


def btd(c: Case, width: float = 1) -> tuple[int, int, int]:
    return (c.b, c.t, int(c.d * width))


INNER = 24  # width of the other side of a GEMM in these cases


def plain_adaln(z: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(z, z.shape[-1:], eps=1e-6)
    return (normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).to(scale.dtype)


def plain_attention(qkv: Tensor, heads: int) -> Tensor:
    b, t, width = qkv.shape
    q, k, v = qkv.view(b, t, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    p = torch.softmax((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5, dim=-1)
    return (p @ v).transpose(1, 2).reshape(b, t, width // 3)


def plain_linear(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return x @ w.t() + bias


def grads(fn: Callable[..., Tensor], dy: Tensor, *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
    return list(torch.autograd.grad(fn(*leaves), leaves, dy))


def with_norms(out: Tensor, v: Values, c: Case) -> dict[str, Tensor]:
    if not c.variant:
        return {"out": out}
    prev = v["prev"]
    wide = torch.promote_types(out.dtype, torch.float32)
    # of what is stored: the rounded out
    moved, whole = (out.to(wide) - prev.to(wide)), out.to(wide)
    return {"out": out, "norms": torch.stack([x.flatten(1).norm(dim=1) for x in (moved, whole)])}


def gate_call(m: Any, v: Values, c: Case) -> None:
    extra = {"prev": v["prev"], "norms": v["norms"]} if c.variant else {}
    m.gate_residual(v["z"], v["y"], v["gate"], out=v["out"], **extra)


def gelu_pre(v: Values, c: Case) -> Tensor:
    u = v["bias"] if c.variant else v["u"]
    return plain_linear(v["x"], v["w"], u)


def norms_of(c: Case) -> dict[str, Any]:
    return {"norms": (2, c.b)} if c.variant else {}


def linear_gate(v: Values) -> tuple[Tensor, Tensor]:
    p = plain_linear(v["x"], v["w"], v["bias"]).to(v["gate"].dtype)
    return p, v["z"] + v["gate"].unsqueeze(1) * p


SPECS: dict[str, Spec] = {
    "adaln": Spec(
        lambda c: {"z": btd(c), "shift": "v", "scale": "v"},
        lambda c: {"out": btd(c)},
        lambda m, v, c: m.adaln(v["z"], v["shift"], v["scale"], out=v["out"]),
        lambda v, c: {"out": plain_adaln(v["z"], v["shift"], v["scale"])},
        stream=("z",), norm="z",
    ),
    "adaln_backward": Spec(
        lambda c: {"dy": btd(c), "z": btd(c), "scale": "v"},
        lambda c: {},
        lambda m, v, c: m.adaln_backward(
            v["dy"], v["z"], v["scale"], v["dz"], v["dshift"], v["dscale"]),
        lambda v, c: dict(zip(("dz", "dshift", "dscale"), (
            v[n] + g for n, g in zip(("dz", "dshift", "dscale"), grads(
                plain_adaln, v["dy"], v["z"], torch.zeros_like(v["scale"]), v["scale"]))))),
        sums=lambda c: {"dz": btd(c), "dshift": "v", "dscale": "v"},
        stream=("z", "dz"), norm="z",
    ),
    "gate_residual": Spec(
        lambda c: {"z": btd(c), "y": btd(c), "gate": "v", "prev": btd(c)},
        lambda c: {"out": btd(c), **norms_of(c)},
        gate_call,
        lambda v, c: with_norms((v["z"] + v["gate"].unsqueeze(1) * v["y"]), v, c),
        stream=("z", "out", "prev"), alias=("out", "z"), variants=2,
    ),
    "gate_residual_backward": Spec(
        lambda c: {"dout": btd(c), "y": btd(c), "gate": "v"},
        lambda c: {"dy": btd(c)},
        lambda m, v, c: m.gate_residual_backward(
            v["dout"], v["y"], v["gate"], v["dgate"], out=v["dy"]),
        lambda v, c: {
            "dy": (v["dout"] * v["gate"].unsqueeze(1)).to(v["y"].dtype),
            "dgate": v["dgate"] + (v["dout"] * v["y"]).sum(1)},
        sums=lambda c: {"dgate": "v"}, stream=("dout",),
    ),
    "gate_residual_adaln": Spec(
        lambda c: {"z": btd(c), "y": btd(c), "gate": "v", "shift": "v", "scale": "v"},
        lambda c: {"z_out": btd(c), "out": btd(c)},
        lambda m, v, c: m.gate_residual_adaln(
            v["z"], v["y"], v["gate"], v["shift"], v["scale"], z_out=v["z_out"], out=v["out"]),
        lambda v, c: {
            "z_out": (z := v["z"] + v["gate"].unsqueeze(1) * v["y"]),
            "out": plain_adaln(z, v["shift"], v["scale"])},
        stream=("z", "z_out"), alias=("z_out", "z"), norm="z_out",
    ),
    "gelu": Spec(
        lambda c: {"x": btd(c)}, lambda c: {"out": btd(c)},
        lambda m, v, c: m.gelu(v["x"], out=v["out"]),
        lambda v, c: {"out": F.gelu(v["x"], approximate="tanh")}, alias=("out", "x"),
    ),
    "gelu_backward": Spec(
        lambda c: {"dy": btd(c), "x": btd(c)}, lambda c: {"out": btd(c)},
        lambda m, v, c: m.gelu_backward(v["dy"], v["x"], out=v["out"]),
        lambda v, c: {"out": grads(lambda x: F.gelu(x, approximate="tanh"), v["dy"], v["x"])[0]},
        alias=("out", "dy"),
    ),
    "linear_add_gelu": Spec(
        lambda c: {"x": (c.b, c.t, INNER), "w": (c.d, INNER), "u": btd(c), "bias": (c.d,)},
        lambda c: {"pre": btd(c), "out": btd(c)},
        lambda m, v, c: m.linear_add_gelu(
            v["x"], v["w"], v["bias"] if c.variant else v["u"], pre=v["pre"], out=v["out"]),
        lambda v, c: {
            **({} if c.alias else {"pre": gelu_pre(v, c)}),
            "out": F.gelu(gelu_pre(v, c), approximate="tanh")},
        alias=("out", "pre"), variants=2,
    ),
    "attention": Spec(
        lambda c: {"qkv": btd(c, 3)}, lambda c: {"out": btd(c)},
        lambda m, v, c: m.attention(v["qkv"], c.heads, out=v["out"]),
        lambda v, c: {"out": plain_attention(v["qkv"], c.heads)},
    ),
    "attention_backward": Spec(
        lambda c: {"dy": btd(c), "qkv": btd(c, 3)}, lambda c: {"out": btd(c, 3)},
        lambda m, v, c: m.attention_backward(v["dy"], v["qkv"], v["y"], c.heads, out=v["out"]),
        lambda v, c: {"out": grads(
            lambda x: plain_attention(x, c.heads), v["dy"], v["qkv"])[0]},
    ),
    "linear": Spec(
        lambda c: {"x": (c.b, c.t, INNER), "w": (c.d, INNER), "bias": (c.d,)},
        lambda c: {"out": btd(c)},
        lambda m, v, c: m.linear(v["x"], v["w"], v["bias"], out=v["out"]),
        lambda v, c: {"out": plain_linear(v["x"], v["w"], v["bias"])},
    ),
    "linear_dgrad": Spec(
        lambda c: {"dy": (c.b, c.t, INNER), "w": (INNER, c.d)}, lambda c: {"out": btd(c)},
        lambda m, v, c: m.linear_dgrad(v["dy"], v["w"], out=v["out"]),
        lambda v, c: {"out": v["dy"] @ v["w"]},
    ),
    "linear_wgrad": Spec(
        lambda c: {"dy": (c.b, c.t, INNER), "x": btd(c)}, lambda c: {},
        lambda m, v, c: m.linear_wgrad(v["dy"], v["x"], v["dw"], v["db"]),
        lambda v, c: {
            "dw": v["dw"] + v["dy"].flatten(0, 1).t() @ v["x"].flatten(0, 1),
            "db": v["db"] + v["dy"].sum((0, 1))},
        sums=lambda c: {"dw": (INNER, c.d), "db": (INNER,)},
    ),
    "adaln_linear": Spec(
        lambda c: {"z": btd(c), "shift": "v", "scale": "v", "w": (INNER, c.d), "bias": (INNER,)},
        lambda c: {"y": btd(c), "out": (c.b, c.t, INNER)},
        lambda m, v, c: m.adaln_linear(
            v["z"], v["shift"], v["scale"], v["w"], v["bias"], y=v["y"], out=v["out"]),
        lambda v, c: {
            "y": (y := plain_adaln(v["z"], v["shift"], v["scale"])),
            "out": plain_linear(y, v["w"], v["bias"])},
        stream=("z",), norm="z",
    ),
    "linear_gate_residual": Spec(
        lambda c: {"x": (c.b, c.t, INNER), "w": (c.d, INNER), "bias": (c.d,), "z": btd(c),
                   "gate": "v", "prev": btd(c)},
        lambda c: {"p": btd(c), "out": btd(c), **norms_of(c)},
        lambda m, v, c: m.linear_gate_residual(
            v["x"], v["w"], v["bias"], v["z"], v["gate"], p=v["p"], out=v["out"],
            **({"prev": v["prev"], "norms": v["norms"]} if c.variant else {})),
        lambda v, c: {
            "p": (r := linear_gate(v))[0], **with_norms(r[1], v, c)},
        stream=("z", "out", "prev"), alias=("out", "z"), variants=2,
    ),
    "linear_gate_residual_adaln": Spec(
        lambda c: {"x": (c.b, c.t, INNER), "w": (c.d, INNER), "bias": (c.d,), "z": btd(c),
                   "gate": "v", "shift": "v", "scale": "v"},
        lambda c: {"p": btd(c), "z_out": btd(c), "out": btd(c)},
        lambda m, v, c: m.linear_gate_residual_adaln(
            v["x"], v["w"], v["bias"], v["z"], v["gate"], v["shift"], v["scale"],
            p=v["p"], z_out=v["z_out"], out=v["out"]),
        lambda v, c: {
            "p": (r := linear_gate(v))[0], "z_out": r[1],
            "out": plain_adaln(r[1], v["shift"], v["scale"])},
        stream=("z", "z_out"), alias=("z_out", "z"), norm="z_out",
    ),
}  # fmt: skip


class Arena:
    """Buffers cut out of larger ones; afterwards, what changed outside the views."""

    def __init__(self, case: Case):
        self.case, self.parts = case, []  # type: ignore[var-annotated]

    def take(self, name: str, spec: Any, dtype: torch.dtype, values: Tensor | None) -> Tensor:
        """A view of the wanted shape, filled with ``values`` or NaN, 64 elements from any edge."""
        c, vector = self.case, spec == "v"
        shape = (c.b, c.d) if vector else tuple(spec)
        offset = 64 + (8 if c.layout == "offset" else 0)
        stride = c.d
        if vector and c.layout != "dense":
            # chunks of (B,6D), and one vector for all samples where it is only read
            stride = 0 if c.layout == "expanded" and values is not None else 6 * c.d
            stride = 6 * c.d if name.startswith("d") else stride
        elif name == "w" and c.layout == "strided":
            stride = 2 * shape[1]
        size = 1
        for n in shape:
            size *= n
        strided = vector or (name == "w" and c.layout == "strided")
        if strided:
            size = max(0, shape[0] - 1) * stride + shape[1] if shape[0] else 0
        raw = torch.full((offset + size + 64,), -7.0, dtype=dtype)
        view = raw[offset : offset + size]
        view = view.as_strided(shape, (stride, 1), offset) if strided else view.view(shape)
        if values is None:
            view.fill_(float("nan"))
        elif strided and stride == 0 and shape[0]:
            view[0] = values[0]
        else:
            view.copy_(values)
        self.parts.append([name, raw, raw.clone(), view])
        return view

    def damage(self, written: set[str]) -> list[str]:
        """Lines for every buffer that changed where it may not."""
        lines = []
        for name, raw, before, view in self.parts:
            bits = torch.int16 if raw.itemsize == 2 else torch.int32
            bits = torch.int64 if raw.itemsize == 8 else bits
            changed = raw.view(bits) != before.view(bits)
            if name in written:
                inside = torch.zeros_like(changed)
                inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
                changed &= ~inside
            if changed.any():
                what = "outside its elements" if name in written else "though only read"
                lines.append(f"{name}: changed {what}, first at {int(changed.nonzero()[0])}")
        return lines


def values_of(case: Case) -> Values:
    """Input values in their dtypes, contiguous; the same for the same case."""
    g = torch.Generator().manual_seed(1000 + case.seed)
    spec, found = SPECS[case.op], {}
    for name, shape in {**spec.inputs(case), **spec.sums(case)}.items():
        full = (case.b, case.d) if shape == "v" else shape
        scale = 0.5 if shape == "v" else 1.0
        if name == "w":
            scale = shape[1] ** -0.5 if case.op != "linear_dgrad" else shape[0] ** -0.5
        x = torch.randn(full, generator=g) * scale
        if shape == "v" and case.layout == "expanded" and not name.startswith("d") and case.b:
            x = x[:1].expand(full)
        sums = name in spec.sums(case) and name not in spec.stream
        dtype = torch.float32 if sums else case.stream if name in spec.stream else case.dtype
        found[name] = x.to(dtype).contiguous()
    return found


def poison(case: Case, values: Values) -> None:
    """The extreme, in one row of one sample of the operator's main operand."""
    main = next(iter(SPECS[case.op].inputs(case)))
    main = SPECS[case.op].norm if SPECS[case.op].norm in values else main
    x = values[main]
    if not case.extreme or not x.numel():
        return
    row = x[min(1, case.b - 1), min(2, x.shape[1] - 1)]
    if case.extreme == "constant":
        row.fill_(3.0)
    elif case.extreme == "mean":
        row.add_(1000.0 if x.dtype == torch.float32 else 30.0)
    else:
        row[min(5, len(row) - 1)] = float(case.extreme)


def execute(module: Any, case: Case, values: Values) -> tuple[dict[str, Tensor], list[str]]:
    """Runs the operator in an arena: (outputs and sums, damage)."""
    spec, arena, v = SPECS[case.op], Arena(case), {}
    inputs, outs, sums = spec.inputs(case), spec.outs(case), spec.sums(case)
    for name, shape in {**inputs, **sums}.items():
        v[name] = arena.take(name, shape, values[name].dtype, values[name])
    if "y" in values and "y" not in v:
        v["y"] = arena.take("y", btd(case), case.dtype, values["y"])
    for name, shape in outs.items():
        dtype = case.stream if name in spec.stream else case.dtype
        if case.alias and spec.alias is not None and name == spec.alias[0]:
            continue
        v[name] = arena.take(name, shape, torch.float32 if name == "norms" else dtype, None)
    written = {*outs, *sums}
    if case.alias and spec.alias is not None:
        v[spec.alias[0]] = v[spec.alias[1]]
        written.add(spec.alias[1])
    spec.call(module, v, case)
    damage = arena.damage(written)
    found = {n: v[n].clone() for n in (*outs, *sums)}
    if case.op == "linear_add_gelu" and case.alias:
        found.pop("pre")
    return found, damage


def as_dtype(values: Values, dtype: torch.dtype | None) -> Values:
    return {n: x.to(dtype) if dtype else x.clone() for n, x in values.items()}


def run_case(module: Any, case: Case) -> list[str]:
    """What is wrong with ``module`` in this case; empty when nothing is."""
    spec, values = SPECS[case.op], values_of(case)
    clean = values_of(case)
    poison(case, values)
    for v in (values, clean):
        if case.op == "attention_backward":
            v["y"] = plain_attention(v["qkv"].double(), case.heads).to(case.dtype)
    found, lines = execute(module, case, values)
    low = spec.plain(as_dtype(values, None), case)
    oracle = spec.plain(as_dtype(values, torch.float64), case)
    growth = 0.0
    if spec.norm and case.b:
        z = (oracle if spec.norm in oracle else values)[spec.norm].double()
        z = z[z.isfinite().all(-1)]
        if z.numel():
            rstd = z.var(-1, unbiased=False).add(1e-6).rsqrt()
            growth = float((z.abs().amax(-1) * rstd).max())
    for name, want in oracle.items():
        plain = low[name].to(found[name].dtype)
        line = violation(found[name], plain, want, case.dtype, growth)
        lines += [f"{name}: {line}"] if line else []
    if case.extreme in ("nan", "inf", "-inf", "65504") and case.b > 1:
        quiet, _ = execute(module, case, clean)
        others = [s for s in range(case.b) if s != 1]
        for name in set(found) - {"dw", "db"}:
            # the norms are (2,B)
            x, y = (v[name].t() if name == "norms" else v[name] for v in (found, quiet))
            if not torch.equal(x[others].nan_to_num(1e4), y[others].nan_to_num(1e4)):
                lines.append(f"{name}: a bad sample changed another")
    return [f"{case}: {line}" for line in lines]


def extremes_for(op: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Those whose NaN and Inf positions plain PyTorch defines: it has no answer where its own
    half-precision intermediates overflow."""
    if "attention" in op or op.startswith("linear"):
        return ("nan", "inf", "-inf")
    if dtype == torch.float16 and not op.endswith("backward"):
        return EXTREMES
    return tuple(e for e in EXTREMES if e != "65504")


def shape_for(rng: random.Random, op: str, cap: int, t: int, size: int) -> tuple[int, ...] | None:
    """(B, D, H) for T tokens and width or head size ``size`` under ``cap`` elements, or None."""
    heads = rng.choice((1, 2)) if "attention" in op else 1
    d = size * heads
    per_sample = t * d * (3 if "attention" in op else 1)
    if per_sample > cap:
        return None
    return rng.choice([b for b in (1, 2, 3) if b * per_sample <= cap]), d, heads


def generate(count: int, dtypes: tuple[torch.dtype, ...], cap: int, seed: int = 0) -> list[Case]:
    """``count`` cases, every operator in turn, each value of T and D in turn too."""
    rng, found, turn = random.Random(seed), [], Counter()  # type: ignore[var-annotated]
    ops = list(SPECS)
    while len(found) < count:
        op = ops[len(found) % len(ops)]
        spec, n = SPECS[op], turn[op]
        turn[op] += 1
        sizes = HEAD_SIZES if "attention" in op else WIDTHS
        t = TOKENS[(n + 3 * ops.index(op)) % len(TOKENS)]
        size = sizes[(n // 2 + ops.index(op)) % len(sizes)]
        shape = shape_for(rng, op, cap, t, size)
        while shape is None:
            t = rng.choice(TOKENS)
            shape = shape_for(rng, op, cap, t, size)
        b, d, heads = shape
        dtype = dtypes[n % len(dtypes)]
        wide = bool(spec.stream) and dtype != torch.float32 and rng.random() < 0.3
        case = Case(
            op, dtype, 0 if rng.random() < 0.04 else b, t, d, heads,
            layout=rng.choice(LAYOUTS),
            residual=torch.float32 if wide else None,
            alias=spec.alias is not None and rng.random() < 0.3,
            variant=rng.randrange(spec.variants), seed=len(found),
        )  # fmt: skip
        if n % 2 and case.b:
            kinds = extremes_for(op, dtype)
            case = replace(case, extreme=kinds[(n // 2) % len(kinds)])
        found.append(case)
    return found


def fixed(dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    """T=256, D=1152 for every element-wise operator, both smallest and both largest sizes together,
    and one single-head attention over 1024 tokens."""
    for index, op in enumerate(SPECS):
        dtype = dtypes[index % len(dtypes)]
        if "attention" in op:
            yield Case(op, dtype, 1, 1024, 64, 1)
            yield Case(op, dtype, 1, 1, 12, 1)
        elif not op.startswith(("linear", "adaln_linear")):
            yield Case(op, dtype, 1, 256, 1152, 1, layout="strided")
            yield Case(op, dtype, 1, 1, 48, 1)
    yield Case("adaln", dtypes[-1], 1, 1024, 1152, 1)


def thin(cases: list[Case]) -> dict[str, Counter[Any]]:
    """How many cases hold each value, by field."""
    found: dict[str, Counter[Any]] = {}
    for name in ("op", "dtype", "t", "layout", "extreme", "b", "alias", "residual"):
        found[name] = Counter(getattr(c, name) for c in cases)
    found["d"] = Counter(c.d for c in cases if "attention" not in c.op)
    found["head size"] = Counter(c.d // c.heads for c in cases if "attention" in c.op)
    return found
