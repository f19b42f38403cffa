"""Generated cases for every operator of an implementation, with red zones around every buffer.

``run_case(ops, case)`` calls one operator of ``ops`` (fpdm.kernels.reference, triton, cpu, a shim:
anything with the same functions, which take CPU tensors) and returns what is wrong as lines of
text, nothing when all is well:

    values      tolerance contract of contract.py, against plain PyTorch and float64
    stores      outputs start as NaN, sums with known values: a missing store stays visible
    bounds      nothing but the outputs changes: inputs, red zones, gaps between strided rows;
                red zones are NaN, so that whoever reads them shows it
    isolation   an extreme in one sample leaves the others bitwise as they were
    results     what is returned is the buffer that was given

A test of an implementation is

    CASES = [c for c in (*generate(320, DTYPES), *fixed(DTYPES)) if supported("cuda", c)]

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_cases(case): assert run_case(operators, case) == []
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from contract import violation
from operator_specs import SCRATCH, SPECS, STREAM, VECTORS, Spec, Values, attended, shapes
from torch import Tensor

from fpdm.kernels.launch import dtype_name
from fpdm.settings import UserError

TOKENS = (1, 7, 17, 64, 255, 256, 1024)
WIDTHS = (48, 96, 384, 1000, 1152)
HEAD_SIZES = (12, 24, 64, 72, 80)
# dense; vectors as chunks of (B,6D), which all the others have too; buffers 16 bytes or more into
# their storage; by an odd number of elements; one vector for all samples; weights as columns
LAYOUTS = ("dense", "chunks", "offset", "odd", "expanded", "columns")
EXTREMES = ("nan", "inf", "-inf", "65504", "constant", "mean")
CAP = 2**16
DTYPES = {
    "reference": (torch.float32, torch.float16, torch.bfloat16),
    "triton": (torch.float32, torch.float16),  # the interpreter's bfloat16 dot is wrong
    "cuda": (torch.float32, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}
BITS = {2: torch.int16, 4: torch.int32}
# NaNs that no arithmetic makes, one for every zone: the last 16 below
CANARY = {torch.int16: 0x7FD5, torch.int32: 0x7FD57FD5}
ZONE = 2048
# inputs that follow from others
DERIVED = {("attention_backward", "y")}
# where plain PyTorch's own intermediates overflow in float16, so that it is no measure
OVERFLOWS = {("adaln_backward", "dy")}


@dataclass(frozen=True)
class Case:
    """One call. ``residual``: dtype of the residual stream, where it is another; ``variant``: which
    of the operator's forms; ``f``: the other width of a GEMM; ``alias``: (output, operand in the
    same buffer); ``fresh``: outputs for which no buffer is given; ``extreme`` is put into one
    sample of the operand ``where``."""

    op: str
    dtype: torch.dtype
    b: int
    t: int
    d: int
    heads: int = 1
    f: int = 24
    layout: str = "dense"
    residual: torch.dtype | None = None
    variant: int = 0
    alias: tuple[str, str] | None = None
    fresh: tuple[str, ...] = ()
    extreme: str = ""
    where: str = ""
    seed: int = 0

    def __str__(self) -> str:
        shape = f"{dtype_name(self.dtype)} B{self.b} T{self.t} D{self.d}"
        words = [shape, f"H{self.heads}" if "attention" in self.op else "", self.form]
        words += [f"F{self.f}"] if "F" in " ".join(self.operands().values()) else []
        words += [f"stream {dtype_name(self.stream)}"] if self.stream != self.dtype else []
        words += [self.layout] if self.layout != "dense" else []
        words += [f"{self.alias[0]} is {self.alias[1]}"] if self.alias else []
        words += [f"fresh {' '.join(self.fresh)}"] if self.fresh else []
        words += [f"{self.extreme} in {self.where}"] if self.extreme else []
        return f"{self.op}[{' '.join(w for w in words if w)}]"

    @property
    def spec(self) -> Spec:
        return SPECS[self.op]

    @property
    def form(self) -> str:
        return self.spec.forms[self.variant]

    @property
    def stream(self) -> torch.dtype:
        """dtype of z, z' and the iterate."""
        return self.residual or self.dtype

    def operands(self, *kinds: str) -> dict[str, str]:
        """Name -> letters, of what this form has: inputs, outs, sums (default: all)."""
        listed = " ".join(getattr(self.spec, k) for k in kinds or ("inputs", "outs", "sums"))
        found = shapes(listed)
        if "norms" not in self.form:
            found = {n: s for n, s in found.items() if n not in ("prev", "norms")}
        if "total" not in self.form:
            found.pop("total", None)
        if "no bias" in self.form:
            found = {n: s for n, s in found.items() if n not in ("bias", "dbias")}
        if "addend" in found and "bias" in self.form:
            found["addend"] = "D"
        return found

    def size(self, letters: str) -> tuple[int, ...]:
        known = {"B": self.b, "T": self.t, "D": self.d, "E": 3 * self.d, "F": self.f, "2": 2}
        return tuple(known[x] for x in letters)

    def dtype_of(self, operand: str) -> torch.dtype:
        if operand in STREAM or operand in self.spec.stream:
            return self.stream
        wide = operand == "norms" or (operand == "out" and "to float32" in self.form)
        return torch.float32 if wide or operand in self.operands("sums") else self.dtype


def supported(impl: str, case: Case) -> bool:
    """Whether ``impl`` (an implementation's name) runs in the dtype of ``case``."""
    return case.dtype in DTYPES[impl.removesuffix("-fused")]


@dataclass
class Zone:
    """A storage full of one particular NaN, and the views that operands have of it."""

    flat: Tensor
    inside: Tensor
    writable: Tensor
    before: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def of(cls, dtype: torch.dtype, elements: int, index: int = 0) -> Zone:
        kind = BITS[dtype.itemsize]
        bits = torch.full((elements + 2 * ZONE,), CANARY[kind] - index, dtype=kind)
        inside, writable = (torch.zeros(len(bits), dtype=torch.bool) for _ in range(2))
        return cls(bits.view(dtype), inside, writable)

    def view(self, size: Sequence[int], stride: Sequence[int], start: int, output: bool) -> Tensor:
        for mask in (self.inside, self.writable) if output else (self.inside,):
            mask.as_strided(size, stride, ZONE + start).fill_(True)
        return self.flat.as_strided(size, stride, ZONE + start)

    def seal(self) -> None:
        """From here on, damage is counted."""
        self.before = self.flat.view(BITS[self.flat.itemsize]).clone()

    def damage(self) -> str:
        """What changed where it may not: the first element and how many."""
        changed = self.flat.view(self.before.dtype) != self.before
        for what, where in (("wrote outside", ~self.inside), ("changed", ~self.writable)):
            if (hit := (changed & where).nonzero()).numel():
                return f"{what} its elements at {hit[0].item() - ZONE} ({len(hit)} in all)"
        return ""


class Arena:
    """The buffers of one call."""

    def __init__(self, case: Case):
        self.case = case
        self.zones: dict[str, Zone] = {}
        self.off = {"offset": 8, "odd": 3}.get(case.layout, 0)

    def take(self, operand: str, output: bool) -> Tensor:
        """A view in the layout that the case asks for, all NaN."""
        case = self.case
        size, dtype = case.size(case.operands()[operand]), case.dtype_of(operand)
        vector = operand.removeprefix("d")
        if vector not in VECTORS or case.layout == "dense":
            wide = size[-1] + (24 if case.layout == "columns" and "weight" in operand else 0)
            stride = [math.prod((*size[i + 1 : -1], wide)) for i in range(len(size) - 1)]
            zone = self._zone(operand, dtype, math.prod((*size[:-1], wide)) + self.off)
            return zone.view(size, (*stride, 1), self.off, output)
        if case.layout == "expanded" and not output:
            return self._zone(operand, dtype, case.d).view(size, (0, 1), 0, output)
        # those that are read share one (B,6D), those that are accumulated another
        pitch = 6 * case.d + self.off
        zone = self._zone("dmod" if output else "mod", dtype, case.b * pitch + self.off)
        start = self.off + VECTORS.index(vector) * case.d
        return zone.view(size, (pitch, 1), start, output)

    def _zone(self, key: str, dtype: torch.dtype, elements: int) -> Zone:
        if key not in self.zones:
            self.zones[key] = Zone.of(dtype, elements, len(self.zones))
        return self.zones[key]

    def seal(self) -> None:
        for zone in self.zones.values():
            zone.seal()

    def damage(self) -> list[str]:
        return [f"{key}: {line}" for key, zone in self.zones.items() if (line := zone.damage())]


class Deck:
    """Values in random order, each once before any comes again."""

    def __init__(self, rng: random.Random, values: Sequence[Any]):
        self.rng, self.values, self.left = rng, list(values), []  # type: ignore[var-annotated]

    def draw(self) -> Any:
        if not self.left:
            self.left = self.rng.sample(self.values, len(self.values))
        return self.left.pop()


def _decks(op: str, dtypes: Sequence[torch.dtype], cap: int, rng: random.Random) -> dict[str, Deck]:
    spec = SPECS[op]
    sizes, parts = (HEAD_SIZES, 3) if "attention" in op else (WIDTHS, 1)
    # attention may ask for 16-byte alignment: see odd_attention
    layouts = [x for x in LAYOUTS if x != "odd" or "attention" not in op]
    layouts = [x for x in layouts if x != "columns" or "weight" in spec.inputs + spec.sums]
    if not any(v in spec.inputs for v in VECTORS):
        layouts = [x for x in layouts if x not in ("chunks", "expanded")]
    values: dict[str, Sequence[Any]] = {
        "shape": [(t, n) for t in TOKENS for n in sizes if parts * t * n <= cap],
        "kind": [(x, e) for x in dtypes for e in ("", "", "", "nan", *EXTREMES)],
        "layout": layouts, "variant": range(len(spec.forms)),
        "b": (0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3), "heads": (1, 1, 2, 3, 4),
        "f": (8, 17, 24, 40, 56), "residual": (None, None, torch.float32),
        "alias": (None, "fresh", *spec.aliases),
    }  # fmt: skip
    return {n: Deck(rng, v) for n, v in values.items()}


def _case(op: str, decks: dict[str, Deck], cap: int, rng: random.Random, seed: int) -> Case:
    drawn = {n: deck.draw() for n, deck in decks.items()}
    (dtype, extreme), (t, d), b = drawn["kind"], drawn["shape"], drawn["b"]
    heads, most = 1, cap // (t * d)
    if "attention" in op:
        heads = min(drawn["heads"], most // 3)
        d, most = d * heads, most // (3 * heads)
    # an extreme needs a neighbour that it must not touch
    b = min(max(b, 2) if extreme and b else b, most)
    alias, form = drawn["alias"], SPECS[op].forms[drawn["variant"]]
    fresh = alias == "fresh" and form in ("", "norms", "bias", "no bias")
    outs = tuple(n for n in shapes(SPECS[op].outs) if n != "norms") if fresh else ()
    alias = None if alias == "fresh" or (alias and f"without {alias[0]}" in form) else alias
    streams = dtype != torch.float32 and set(STREAM) & set(shapes(SPECS[op].inputs))
    case = Case(
        op, dtype, b, t, d, heads, drawn["f"], drawn["layout"],
        drawn["residual"] if streams else None, drawn["variant"], alias, outs, seed=seed,
    )  # fmt: skip
    return _with_extreme(case, extreme, rng) if b else case


def _with_extreme(case: Case, extreme: str, rng: random.Random) -> Case:
    inputs = case.operands("inputs")
    where = [n for n, s in inputs.items() if s.startswith("BT") and (case.op, n) not in DERIVED]
    if extreme in ("constant", "mean"):
        # LayerNorm's business: elsewhere long sums only cancel and scores only grow
        where = [n for n in where if n == "z"]
    elif extreme == "65504":
        where = [n for n in where if (case.op, n) not in OVERFLOWS]
    elif extreme in ("nan", "inf", "-inf") and case.layout != "expanded":
        where += [n for n in inputs if n in VECTORS]
    if not extreme or not where:
        return case
    return replace(case, extreme=extreme, where=rng.choice(where))


def generate(
    count: int, dtypes: Sequence[torch.dtype], cap: int = CAP, seed: int = 0
) -> list[Case]:
    """``count`` cases, every operator in turn; no operand has more than ``cap`` elements."""
    rng = random.Random(seed)
    ops = list(SPECS)
    decks = {op: _decks(op, dtypes, cap, rng) for op in ops}
    turns = [ops[i % len(ops)] for i in range(count)]
    return [_case(op, decks[op], cap, rng, i) for i, op in enumerate(turns)]


def fixed(dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """T=256, D=1152 for every element-wise operator, rows narrower than any tile, one head of
    attention over 1024 tokens, also with dy v^T far below |dy|, equal values in a row whose sum,
    rounded, is not D times one, and some outputs given where others are not."""
    for i, op in enumerate(SPECS):
        dtype = dtypes[i % len(dtypes)]
        if "attention" in op:
            yield Case(op, dtypes[1], 1, max(TOKENS), 72)
            if "backward" in op:
                yield Case(op, dtypes[1], 1, max(TOKENS), 72, extreme="small v", where="qkv")
        elif "linear" not in op:
            yield Case(op, dtype, 1, 256, 1152, layout="chunks")
            yield from (Case(op, dtype, 2, 37, d) for d in (8, 16))
    constant: dict[str, Any] = {"extreme": "constant", "where": "z"}
    yield Case("adaln", torch.float32, 3, 64, 1000, seed=662, **constant)
    yield Case("adaln_backward", torch.float32, 3, 64, 1000, seed=662, **constant)
    for op, spec in SPECS.items():
        outs = [n for n in shapes(spec.outs) if n != "norms"]
        some = [x for i in range(1, len(outs)) for x in itertools.combinations(outs, i)]
        for i, (form, fresh) in enumerate(itertools.product(range(len(spec.forms)), some)):
            yield Case(op, dtypes[i % len(dtypes)], 2, 5, 48, f=40, variant=form, fresh=fresh)


def odd_attention(dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """For implementations whose attention takes any alignment."""
    for op in ("attention", "attention_backward"):
        for i, k in enumerate(HEAD_SIZES):
            yield Case(op, dtypes[i % len(dtypes)], 2, 17, 2 * k, 2, layout="odd", seed=i)


def fused_rows(dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Rows of Inf whose norms a fused GEMM sums, in a width that none of its blocks divides; and
    rows of equal values as in ``fixed``."""
    yield Case("adaln_linear", torch.float32, 2, 64, 384, f=24, layout="expanded", seed=1277,
               extreme="constant", where="z")  # fmt: skip
    for dtype in dtypes:
        yield Case("linear_gate_residual", dtype, 2, 7, 48, variant=1, extreme="inf", where="x")


def values_of(case: Case, clean: bool = False) -> Values:
    """Values of what is read or accumulated into, in their dtypes; the same for the same case."""
    g = torch.Generator().manual_seed(case.seed)
    found = {}
    for n, letters in case.operands("inputs", "sums").items():
        size = case.size(letters)
        x = torch.randn(size, generator=g) * (0.5 if n in VECTORS else 1.0)
        if n in VECTORS and case.layout == "expanded" and case.b:
            x = x[:1].expand(size).clone()
        if n == "weight":
            x *= size[-1] ** -0.5
        if n in ("weight", "gate"):
            # no product with 65504 overflows
            x.clamp_(-0.9, 0.9)
        found[n] = x.to(case.dtype_of(n))
    if case.extreme and not clean:
        _poison(found[case.where], case)
    if case.op == "attention_backward":
        found["y"] = attended(found["qkv"].float(), case.heads).to(case.dtype)
    return found


def _poison(x: Tensor, case: Case) -> None:
    sample = x[case.b // 2]
    if case.extreme == "constant":
        sample.copy_(sample[:, :1].clone().expand_as(sample))
    elif case.extreme == "mean":
        sample.add_(1000.0 if x.dtype == torch.float32 and case.where == "z" else 30.0)
    elif case.extreme == "small v":
        sample[:, -case.d :] *= 0.01
    else:
        flat = sample.view(-1)
        flat[case.seed * 7919 % len(flat)] = float(case.extreme)


def execute(ops: Any, case: Case, values: Values) -> tuple[Values, list[str]]:
    """Calls the operator in an arena: (what it wrote, what it did wrong with memory)."""
    arena, sums = Arena(case), case.operands("sums")
    given = [n for n in case.operands("outs") if n not in case.fresh]
    given = [n for n in given if f"without {n}" not in case.form]
    alias, other = case.alias or ("", "")
    v: dict[str, Any] = {}
    for n in dict.fromkeys((*case.operands("inputs"), *sums, *given)):
        if n != alias:
            v[n] = arena.take(n, output=n in given or n in sums or n == other)
        if n in values:
            _fill(v[n], values[n])
    if alias:
        v[alias] = v[other]
    arena.seal()
    result = getattr(ops, case.op)(**v, **arguments(case))
    lines = arena.damage()
    results = result if isinstance(result, tuple) else (result,)
    found = dict(zip(case.spec.returns, results))
    for n in set(found) & set(given):
        if (found[n].data_ptr(), found[n].shape) != (v[n].data_ptr(), v[n].shape):
            lines.append(f"{n}: returned another tensor than the one given")
    found |= {n: v[n] for n in (*given, *sums)}
    for n in [n for n in SCRATCH if n == alias or "not kept" in case.form]:
        found.pop(n, None)
    for n in set(found) & set(given) - {alias}:
        below = CANARY[kind := BITS[v[n].itemsize]] - v[n].view(kind)
        if left := int(((below >= 0) & (below < 16)).sum()):
            lines.append(f"{n}: {left} elements not written, or from a red zone")
    return {n: x.clone() for n, x in found.items()}, lines


def _fill(x: Tensor, values: Tensor) -> None:
    if x.numel() and x.stride(0) == 0:
        x, values = x[:1], values[:1]
    x.copy_(values)


def arguments(case: Case) -> dict[str, Any]:
    """What is no buffer, and None for the biases that this form has not."""
    names = shapes(f"{case.spec.inputs} {case.spec.sums}")
    missing = [n for n in ("bias", "dbias") if n in names and "no bias" in case.form]
    found: dict[str, Any] = dict.fromkeys(missing)
    found |= {"heads": case.heads} if "attention" in case.op else {}
    return found | ({"keep": False} if "not kept" in case.form else {})


def run_case(ops: Any, case: Case) -> list[str]:
    """What is wrong with the operator of ``ops`` in this case; empty when nothing is."""
    try:
        with torch.no_grad():
            lines = _run(ops, case)
    except UserError as error:
        lines = [f"refused: {error}"]
    return [f"{case}: {line}" for line in lines]


def _run(ops: Any, case: Case) -> list[str]:
    values = values_of(case)
    found, lines = execute(ops, case, values)
    with torch.enable_grad():
        low, wide, oracle = (
            case.spec.plain({n: x if d is None else x.to(d) for n, x in values.items()}, case.heads)
            for d in (None, torch.float32, torch.float64)
        )
    for n, x in found.items():
        if x.dtype != case.dtype_of(n):
            lines.append(f"{n}: got {dtype_name(x.dtype)}, expected {dtype_name(case.dtype_of(n))}")
        growth = _growth(case, values | oracle, n)
        for part, *same in _parts(case, n, x, low[n], wide[n], oracle[n]):
            line = _compare(case, n, *same, growth)
            lines += [f"{part}: {line}"] if line else []
    if case.b > 1 and case.extreme in ("nan", "inf", "-inf", "65504"):
        quiet, _ = execute(ops, case, values_of(case, clean=True))
        bad = case.b // 2
        for n in set(found) - {"dweight", "dbias"}:
            x, y = (v[n].t() if n == "norms" else v[n] for v in (found, quiet))
            moved = [i for i in range(case.b) if i != bad and not _same(x[i], y[i])]
            lines += [f"{n}: sample {i} changed with sample {bad}" for i in moved]
    return lines


def _parts(case: Case, n: str, *same: Tensor) -> Iterator[tuple[Any, ...]]:
    """(name, its part of each of ``same``): what of output ``n`` must not hide behind the rest."""
    if case.op == "attention_backward":
        return zip(("dq", "dk", "dv"), *(x.chunk(3, -1) for x in same))
    return zip((n, n), *same) if n == "norms" else iter([(n, *same)])


def _growth(case: Case, v: Values, n: str) -> float:
    """What a cancellation before output ``n`` does to the rounding before it: the contract's
    max|x| rstd behind a LayerNorm, and the same for the two gradients that sum or subtract."""
    if case.op == "attention_backward" and case.b:
        return _attention_growth(case, v)
    if not case.spec.norm or not case.b:
        return 0.0
    x = v[case.spec.norm].double()
    rows = x.abs().amax(-1) * x.var(-1, unbiased=False).add(1e-6).rsqrt()
    if n == "dscale":
        # sum_t dy xhat: the rows' errors are independent
        rows = (v["dy"].double() * rows.unsqueeze(-1)).square().sum(1).sqrt()
    return rows.nan_to_num(0.0, 0.0, 0.0).max().item()


def _attention_growth(case: Case, v: Values) -> float:
    """ds = p (dy v^T - dy y^T), where y was rounded to its dtype; then times k or q over sqrt K."""
    split = (case.b, case.t, -1, case.heads, case.d // case.heads)
    q, k, value = v["qkv"].double().view(split).transpose(1, 3).unbind(2)
    dy, y = (v[n].double().view(split).transpose(1, 3)[:, :, 0] for n in ("dy", "y"))
    p = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
    rounding = torch.finfo(case.dtype).eps / (8 * torch.finfo(torch.float32).eps)
    lost = p * (dy.abs() @ value.abs().mT + rounding * (dy * y).abs().sum(-1, keepdim=True))
    most = torch.maximum(q.abs(), k.abs()) * q.shape[-1] ** -0.5
    lost, most = (x.nan_to_num(0.0, 0.0, 0.0).flatten(1).amax(1) for x in (lost, most))
    return (lost * most).max().item()


def _compare(
    case: Case, n: str, found: Tensor, low: Tensor, wide: Tensor, oracle: Tensor, growth: float
) -> str | None:
    exact = n in case.spec.exact and found.dtype == torch.float32
    # norms are of what is stored
    exact = exact and (n != "norms" or case.stream == torch.float32)
    low, wide = (wide if exact else low).to(found.dtype), wide.to(found.dtype)
    # plain PyTorch's own half-precision intermediates may overflow where nothing else does
    for plain in (low, wide):
        line = violation(found, plain, oracle, found.dtype if exact else case.dtype, growth)
        if line and line.startswith("rms") and case.extreme == "65504":
            # one rounding decides the RMS of what one value dominates: the maximum stands for it
            line = None
        # a backward's formula may come to inf - inf where another has inf
        forward = not case.op.endswith("backward")
        if line is None and forward and not torch.equal(found.isnan(), plain.isnan()):
            line = "NaN where plain PyTorch has Inf, or Inf where it has NaN"
        if line is None or torch.equal(low.isfinite(), wide.isfinite()):
            break
    return line


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
