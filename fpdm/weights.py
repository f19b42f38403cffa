"""Weights as the operators want them: cast once, folded once, refreshed in place.

A model's parameters stay in their own dtype (float32). ``PreparedWeights`` holds copies in the
compute dtype, made once per optimiser step instead of once per use, and for sampling the folded
injection E W_p. The trainer or sampler owns it and passes it as ``weights=``; whoever changes
parameters calls ``refresh()``, which writes in place, so captured addresses stay valid. Staleness
is never inferred.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fpdm.block import BlockWeights
from fpdm.kernels import implementations

BLOCK_KEYS = (
    "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
    "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
)  # fmt: skip
FC1, FC2 = "block_fixed_point_projection_fc1", "block_fixed_point_projection_fc2"
PROJECTION = "block_pre_projection"
# parameters of the fixed-point map after the pre-projection, as fixed_point.s_jfb takes them
FIXED_POINT = tuple(f"block_fixed_point.{key}" for key in BLOCK_KEYS)
FIXED_POINT += (f"{FC1}.weight", f"{FC1}.bias", f"{FC2}.weight", f"{FC2}.bias")
FIRST_HALF = f"{FC1}.weight A"


# every tensor of a flat buffer starts on a 64-byte boundary in float32, 32 in half precision
_ALIGN = 16


_MADE = "that it was made with: submodules hold parameters only, none is called"


class Parts(NamedTuple):
    """What a model was made of: the names of its parameters, and the class of every submodule.

    The engine reads parameters by these names and calls no submodule, so what replaces one would be
    ignored: a LoRA layer, a parametrization, a quantised Linear. A subclass of the model may hold
    more, in submodules of its own.
    """

    names: frozenset[str]
    classes: dict[str, type]

    @classmethod
    def of(cls, model: nn.Module) -> Parts:
        """Those of ``model`` as it is now."""
        names = frozenset(name for name, _ in model.named_parameters())
        return cls(names, {name: type(part) for name, part in model.named_modules() if name})

    def check_names(self, params: Mapping[str, Tensor]) -> None:
        """Raises ValueError where ``params`` lack a name, or have another one in a part."""
        if torch.compiler.is_compiling() or params.keys() == self.names:
            return
        extra = [name for name in params if name not in self.names]
        found = {
            "extra": [name for name in extra if name.partition(".")[0] in self.classes],
            "missing": sorted(self.names - params.keys()),
        }
        if any(found.values()):
            got = "; ".join(f"{k}: {', '.join(v[:3])}{' ...' * (len(v) > 3)}"
                            for k, v in found.items() if v)  # fmt: skip
            raise ValueError(f"model: got other parameters ({got}), expected those {_MADE}")

    def check_classes(self, model: nn.Module) -> None:
        """Raises ValueError where a submodule of ``model`` is of another class than it was."""
        for name, part in model.named_modules():
            made = self.classes.get(name, type(part))
            if type(part) is not made:
                got = f"{name}: got {type(part).__name__}, expected the {made.__name__}"
                raise ValueError(f"{got} {_MADE}")


class FlatLayout:
    """Where each parameter lies in a flat buffer: those that are trained first, up to ``trained``,
    then the frozen ones, up to ``size``."""

    def __init__(self, params: Mapping[str, Tensor]):
        self.offsets: dict[str, int] = {}
        self.shapes = {name: p.shape for name, p in params.items()}
        end = self.trained = 0
        for wanted in (True, False):
            for name, p in params.items():
                if p.requires_grad is wanted:
                    self.offsets[name] = end
                    end += -(-p.numel() // _ALIGN) * _ALIGN
            self.trained = end if wanted else self.trained
        self.size = end

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The part of ``flat`` that belongs to the parameter, in its shape."""
        shape, start = self.shapes[name], self.offsets[name]
        return flat[start : start + shape.numel()].view(shape)


class WeightView:
    """A model's parameters in ``dtype``: prepared copies where there are any, casts otherwise.

    ``accumulate``: the backward adds gradients of the blocks' weights to the ``.grad`` that the
    parameters have, in place, instead of returning them for autograd to add. Same sums, one buffer
    and two passes over it less. Any backward through the model then writes them, also one that asks
    for other inputs, and ``torch.autograd.grad`` and gradient hooks do not see them. A block with a
    parameter that is frozen or has no dense gradient yet goes through autograd as always. A
    backward that is interrupted (Ctrl-C, out of memory) leaves a half-finished sum in ``.grad``:
    what catches the error must zero the gradients, and repeat the whole step.
    """

    accumulate = False

    def __init__(self, params: dict[str, Tensor], dtype: torch.dtype, copies: dict[str, Tensor]):
        self.params, self.dtype, self.copies = params, dtype, copies
        self.packed: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        """The parameter ``name`` in the compute dtype, in its own shape, without gradient: the
        copy, or a cast made now."""
        copy = self.copies.get(name)
        return self.params[name].detach().to(self.dtype) if copy is None else copy

    def linear(self, name: str) -> tuple[Tensor, Tensor]:
        """(weight (out,in), bias (out,)) of the Linear ``name`` in the compute dtype."""
        return self.get(f"{name}.weight"), self.get(f"{name}.bias")

    def injection(self) -> tuple[Tensor, Tensor]:
        """(E (2D,D), b1 (2D,)), for u = E i + b1; folded: (E W_p, E b_p + b1) of the same shapes,
        for u = E W_p h + (E b_p + b1)."""
        if self.folded:
            return self.copies["fold.weight"], self.copies["fold.bias"]
        return self.halves()[1], self.get(f"{FC1}.bias")

    def halves(self) -> tuple[Tensor, Tensor]:
        """W1 = [A | E], each a (2D,D) view of it."""
        a, e = self.get(f"{FC1}.weight").chunk(2, dim=1)
        return a, e

    @property
    def folded(self) -> bool:
        """Whether the pre-projection is folded into the injection."""
        return "fold.weight" in self.copies

    def block(self, name: str, injected: bool = False) -> BlockWeights:
        """Weights of the block ``name`` in the compute dtype; with the injection's when
        ``injected``. Without gradients they may be packed for csrc/cpu."""
        packed = self._usable()

        def operand(key: str) -> Tensor:
            return packed[key] if key in packed else self.get(key)

        own = [operand(f"{name}.{key}") for key in BLOCK_KEYS]
        if not injected:
            return BlockWeights(*own)
        a, e = self.halves()
        w2, b2 = (operand(f"{FC2}.{key}") for key in ("weight", "bias"))
        return BlockWeights(*own, packed.get(FIRST_HALF, a), e, w2, b2)  # type: ignore[call-arg]

    def _usable(self) -> dict[str, Tensor]:
        """The packed weights that may be read now: none with gradients on, as a backward reads
        weights unpacked."""
        return {} if torch.is_grad_enabled() else self.packed


class _RefreshOnLoad:
    """Hook of ``load_state_dict``; copies and pickles of the model get one that does nothing."""

    def __init__(self, prepared: PreparedWeights | None = None):
        self.prepared = None if prepared is None else weakref.ref(prepared)

    def __call__(self, module: nn.Module, keys: Any) -> None:
        prepared = None if self.prepared is None else self.prepared()
        if prepared is not None:
            prepared.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return _RefreshOnLoad, ()


class PreparedWeights(WeightView):
    """Copies of ``model``'s parameters in ``dtype``; aliases where the dtype is the parameters'
    own.

    ``fold=True`` (sampling only: it carries no gradient) also holds E W_p and E b_p + b1, computed
    in the parameters' dtype and then rounded: 2 D^2 instead of 3 D^2 MACs per token and timestep;
    and on a processor the blocks' weights once more as csrc/cpu reads them (``cpu.pack``), for
    calls without gradient.
    ``model.load_state_dict`` refreshes by itself while this object lives; every other change of
    parameters (an optimiser step, an EMA swap, a submodule's load) must call ``refresh()``.

    Raises ValueError for a model with other parameters, or submodules of other classes, than it was
    made with (``Parts``).
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, fold: bool = False, accumulate: bool = False
    ):
        params: dict[str, Tensor] = dict(model.named_parameters())
        parts: Parts = model.parts  # type: ignore[assignment]
        parts.check_names(params)
        parts.check_classes(model)
        super().__init__(params, dtype, {})
        self.accumulate = accumulate
        self._model = weakref.ref(model)
        self.layout = FlatLayout(params)
        self.flat: Tensor | None = None
        with torch.inference_mode(False):
            device = next(iter(params.values())).device
            if any(p.dtype != dtype for p in params.values()):
                self.flat = torch.zeros(self.layout.size, dtype=dtype, device=device)
                for name in params:
                    self.copies[name] = self.layout.view(self.flat, name)
            if fold and f"{FC1}.weight" in params:
                d = params[f"{PROJECTION}.bias"].shape[0]
                self.copies["fold.weight"] = torch.empty(2 * d, d, dtype=dtype, device=device)
                self.copies["fold.bias"] = torch.empty(2 * d, dtype=dtype, device=device)
        self._pack: Callable[..., Tensor | None] | None = None
        self._packed_for: tuple[str, ...] = ()
        if self.folded:
            impl: str = model.execution.impl  # type: ignore[union-attr,assignment]
            operators = implementations.resolve(impl, device, dtype)
            self._pack = getattr(operators, "pack", None)
            self._packed_for = impl, operators.name
        self.refresh()
        handle = model.register_load_state_dict_post_hook(_RefreshOnLoad(self))
        weakref.finalize(self, handle.remove)

    def _multiplied(self) -> dict[str, Tensor]:
        """The weights of all blocks, of W1 the half A."""
        names = [name for name in self.params if name.endswith(BLOCK_KEYS[::2])]
        return {
            **{name: self.get(name) for name in (*names, f"{FC2}.weight")},
            FIRST_HALF: self.halves()[0],
        }

    def _usable(self) -> dict[str, Tensor]:
        # packed for one implementation, and the model may have been given another since
        model = self._model()
        impl = None if model is None else model.execution.impl  # type: ignore[union-attr]
        return super()._usable() if impl in self._packed_for else {}

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether these are copies of ``model``'s parameters."""
        return self._model() is model

    def _current(self, name: str) -> Tensor:
        source, copy = self.params[name].detach(), self.copies[name]
        if source.shape != copy.shape or source.device != copy.device:
            raise ValueError(
                f"{name}: got {tuple(source.shape)} on {source.device}, expected "
                f"{tuple(copy.shape)} on {copy.device} as when these weights were prepared"
            )
        return source

    @torch.no_grad()
    def refresh(self) -> None:
        """Write every copy again, in place, from the model's parameters as they are now.

        Raises ValueError when a parameter has changed its name, shape or device since.
        """
        model = self._model()
        if model is not None:
            params = dict(model.named_parameters())
            model.parts.check_names(params)  # type: ignore[union-attr,operator]
            self.params.update(params)
        if self.flat is not None:
            names = list(self.layout.offsets)
            sources = [self._current(name) for name in names]
            torch._foreach_copy_([self.copies[name] for name in names], sources)
        self.fold()

    @torch.no_grad()
    def fold(self) -> None:
        """Write again what is held for sampling: E W_p, E b_p + b1, packed weights."""
        if self._pack is not None:
            for name, weight in self._multiplied().items():
                packed = self._pack(weight, self.packed.get(name))
                if packed is not None:
                    self.packed[name] = packed
        if self.folded:
            e = self.params[f"{FC1}.weight"].chunk(2, dim=1)[1]
            bias = torch.addmv(self.params[f"{FC1}.bias"], e, self.params[f"{PROJECTION}.bias"])
            self.copies["fold.weight"].copy_(e @ self.params[f"{PROJECTION}.weight"])
            self.copies["fold.bias"].copy_(bias)
