"""Memory of a training step, by kind, for any model size, without allocating it.

The step runs on fake tensors: shapes and storages are real, contents are not. ``LiveBytes`` counts
the storages that are alive, inside the opaque operators too; the operators are stand-ins that
allocate what the fused kernels allocate (their outputs). So the numbers are those of an accelerator
with fused kernels, before its allocator rounds.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench import published
from bench.cost import RECOMPUTE
from fpdm import fixed_point
from fpdm.block import WIDTHS, saved_names
from fpdm.config import ExecutionConfig, ModelConfig
from fpdm.kernels import ops
from fpdm.model import FPDM, build_model
from fpdm.recipes import MODEL_PRESETS
from fpdm.weights import PreparedWeights

GB = 1e9


class LiveBytes(TorchDispatchMode):
    """Bytes of storages created inside and still alive: weak references, not saved-tensor hooks.

    It also looks inside the opaque operators, whose workspaces would otherwise go uncounted.
    """

    INSIDE: ClassVar[dict[Any, Any]] = {
        op._opoverload: op._init_fn
        for op in (
            fixed_point.iterate,
            fixed_point.unroll,
            fixed_point.unroll_backward,
            fixed_point.unroll_backward_,
        )
    }

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs ``func`` and counts the storages that are new in its results."""
        if func in self.INSIDE:
            with self:
                result = self.INSIDE[func](*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        inputs = torch.utils._pytree.tree_leaves((args, kwargs))
        older = {x.untyped_storage()._cdata for x in inputs if isinstance(x, Tensor)}
        for out in torch.utils._pytree.tree_leaves(result):
            if isinstance(out, Tensor) and out.untyped_storage()._cdata not in older:
                self._add(out.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(dead: Any) -> None:
            # the address may be another storage's by now
            if self.storages.get(key) is dead:
                del self.storages[key]
            self.now -= size

        known = self.storages.get(key)
        if known is None or known() is None:
            self.storages[key] = weakref.ref(storage, gone)
            self.now += size

    def live(self) -> int:
        """Bytes alive now."""
        return self.now


def _shape_only() -> SimpleNamespace:
    """An operator set that allocates what a fused kernel allocates, and computes nothing."""

    def empty(like: Tensor, width: int, out: Tensor | None) -> Tensor:
        return like.new_empty(*like.shape[:-1], width) if out is None else out

    def linear_add_gelu(x, weight, addend, pre=None, out=None):  # type: ignore[no-untyped-def]
        pre = empty(x, len(weight), pre)
        return empty(x, len(weight), out)

    def adaln_linear(  # type: ignore[no-untyped-def]
        z, shift, scale, weight, bias, y=None, out=None, keep=True
    ):
        y = empty(scale, z.shape[-1], y) if y is not None else scale.new_empty(z.shape)
        return empty(y, len(weight), out)

    def linear_gate_residual(  # type: ignore[no-untyped-def]
        x, weight, bias, z, gate, p=None, out=None, prev=None, norms=None, keep=True
    ):
        p = empty(x, len(weight), p)
        return empty(z, z.shape[-1], out)

    def linear_gate_residual_adaln(  # type: ignore[no-untyped-def]
        x, weight, bias, z, gate, shift, scale, p=None, z_out=None, out=None, keep=True
    ):
        p = empty(x, len(weight), p)
        return empty(z, z.shape[-1], z_out), gate.new_empty(z.shape) if out is None else out

    nothing: Callable[..., None] = lambda *args, **kwargs: None  # noqa: E731
    return SimpleNamespace(
        name="shapes",
        linear=lambda x, weight, bias, out=None: empty(x, len(weight), out),
        linear_dgrad=lambda dy, weight, out=None: empty(dy, weight.shape[1], out),
        linear_wgrad=nothing,
        gelu=lambda x, out=None: empty(x, x.shape[-1], out),
        gelu_backward=lambda dy, x, out=None, total=None: empty(dy, x.shape[-1], out),
        adaln=lambda z, shift, scale, out=None: scale.new_empty(z.shape) if out is None else out,
        adaln_backward=nothing,
        gate_residual=lambda z, y, gate, out=None, **_: empty(z, z.shape[-1], out),
        gate_residual_adaln=lambda z, y, gate, shift, scale, z_out=None, out=None: (
            empty(z, z.shape[-1], z_out), gate.new_empty(z.shape) if out is None else out
        ),
        gate_residual_backward=lambda dout, y, gate, dgate, out=None: empty(y, y.shape[-1], out),
        attention=lambda qkv, heads, out=None: empty(qkv, qkv.shape[-1] // 3, out),
        attention_backward=lambda dy, qkv, y, heads, out=None: empty(qkv, qkv.shape[-1], out),
        linear_add_gelu=linear_add_gelu, adaln_linear=adaln_linear,
        linear_gate_residual=linear_gate_residual,
        linear_gate_residual_adaln=linear_gate_residual_adaln,
    )  # fmt: skip


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, every operator is a stand-in that allocates and does not compute."""
    resolve, stand_in = ops.resolve, _shape_only()
    ops.resolve = lambda *args, **kwargs: stand_in  # type: ignore[assignment]
    try:
        yield
    finally:
        ops.resolve = resolve


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step. ``saved``: alive between forward and backward; ``forward`` and
    ``backward``: what each needs beyond that at its peak. State: float32 parameters, gradients, two
    moments and the average, and the half-precision copies."""

    parameters: int
    gradients: int
    optimizer: int
    average: int
    copies: int
    saved: int
    forward: int
    backward: int

    @property
    def total(self) -> int:
        """At the worst moment of the step."""
        state = self.parameters + self.gradients + self.optimizer + self.average + self.copies
        return state + self.saved + max(self.forward, self.backward)

    def row(self) -> dict[str, float]:
        """In 10^9 bytes."""
        return {k: v / GB for k, v in {**asdict(self), "total": self.total}.items()}


def training(
    config: ModelConfig, batch: int, execution: ExecutionConfig | None = None, n: int = 12,
    m: int = 12, dtype: torch.dtype = torch.bfloat16,
) -> Memory:  # fmt: skip
    """Our training step; ``m`` and ``n`` are ignored by a DiT, where every block is unrolled."""
    with FakeTensorMode(allow_non_fake_inputs=True), shapes_only():
        model = build_model(config, execution)
        weights = PreparedWeights(model, dtype, accumulate=True)
        side = config.input_size
        x = torch.empty(batch, config.in_channels, side, side)
        t, y = (torch.empty(batch, dtype=torch.int64) for _ in range(2))
        how = (m, n) if isinstance(model, FPDM) else ()

        def forward() -> Tensor:
            return model(x, t, y, *how, weights=weights).float().square().mean()

        found = _measure(forward, list(model.parameters()))
        state = sum(p.numel() for p in model.parameters()) * 4
    copies = state * dtype.itemsize // 4 if dtype != torch.float32 else 0
    return Memory(state, state, 2 * state, state, copies, *found)


def kept(
    config: ModelConfig, batch: int, execution: ExecutionConfig, m: int = 12,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[dict[str, int], dict[str, int]]:  # fmt: skip
    """Of the bytes saved by ``training``, those of fpdm.block's ledger by its names: of the m
    iterations, and of the blocks before and after them, which are all of a DiT. Beside them stay u,
    each block's input and the first iterate, embeddings, patches and the output."""
    unit = batch * config.tokens * config.hidden_size
    residual = 4 if execution.residual_dtype == "float32" else dtype.itemsize

    def sizes(count: int, injected: bool) -> dict[str, int]:
        wide, half = saved_names(execution.recompute, injected)
        found = {n: count * WIDTHS[n] * unit * residual for n in wide}
        return found | {n: count * WIDTHS[n] * unit * dtype.itemsize for n in half}

    blocks = sizes(config.pre_depth + config.post_depth + config.depth, injected=False)
    if config.kind == "dit":
        return {}, blocks
    # where z' and r are kept in its place, no iterate is
    iterates = {} if execution.recompute == "elementwise" else {"x": (m - 1) * unit * residual}
    return iterates | sizes(m, injected=True), blocks


def plain(
    config: ModelConfig, batch: int, n: int = 12, m: int = 12, dtype: torch.dtype = torch.bfloat16
) -> Memory:
    """The published architecture in eager PyTorch under autocast: no checkpointing, and a graph
    over the iterations that it then drops."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(config)
        state = {k: v.detach().requires_grad_() for k, v in model.state_dict().items()}
        side = config.input_size
        x = torch.empty(batch, config.in_channels, side, side)
        t, y = (torch.empty(batch, dtype=torch.int64) for _ in range(2))

        def forward() -> Tensor:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                out, _ = published.forward(state, config, x, t, y, m, n)
            return out.float().square().mean()

        found = _measure(forward, list(state.values()))
        size = sum(v.numel() for v in state.values()) * 4
    return Memory(size, size, 2 * size, size, 0, *found)


def _measure(forward: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[int, int, int]:
    """(saved, forward above saved, backward above saved); the gradients' buffer is there before,
    as in the trainer."""
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    gc.collect()
    with LiveBytes() as mode:
        loss = forward()
        gc.collect()
        saved, peak = mode.live(), mode.peak
        mode.peak = saved
        loss.backward()
    return saved, peak - saved, mode.peak - saved


def table(batch: int = 64, m: int = 12) -> list[dict[str, Any]]:
    """FPDM and DiT XL/2 in every recompute mode, beside the published architecture."""
    rows: list[dict[str, Any]] = []
    for name in ("fpdm-xl-2", "dit-xl-2"):
        config = MODEL_PRESETS[name]
        for mode in RECOMPUTE:
            chunks = 1 if mode == "none" else 4
            execution = ExecutionConfig(recompute=mode, chunks=chunks)
            found = training(config, batch, execution, m, m)
            rows.append({"model": name, "arm": f"fpdm {mode}", "chunks": chunks, **found.row()})
        found = plain(config, batch, m, m)
        rows.append({"model": name, "arm": "published bf16 eager", "chunks": 1, **found.row()})
    return rows
