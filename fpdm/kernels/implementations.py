"""Which implementation runs the operators, and what was called.

    reference, triton, triton-fused, cuda, cpu     what ``execution.impl`` and FPDM_IMPL can name
    auto                                           the best that runs on a device in a dtype

``resolve`` gives the operator set: a function per name in OPERATORS, as fpdm.kernels.reference
states them, each counted when it is called. An explicit request is never replaced silently.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, cast, get_args

import torch

from fpdm.config import Impl, UserError
from fpdm.settings import one_line

IMPLEMENTATIONS: tuple[str, ...] = get_args(Impl)[1:]  # all but auto
OPERATORS = (
    "linear", "linear_dgrad", "linear_wgrad", "gelu", "gelu_backward", "linear_add_gelu",
    "adaln", "adaln_backward", "gate_residual", "gate_residual_backward", "gate_residual_adaln",
    "attention", "attention_backward",
    "adaln_linear", "linear_gate_residual", "linear_gate_residual_adaln",
)  # fmt: skip
TRITON = ("triton", "triton-fused")
FUSED = ("linear_add_gelu", "adaln_linear", "linear_gate_residual", "linear_gate_residual_adaln")
_REQUESTED = os.environ.get("FPDM_IMPL") or "auto"


class ImplError(UserError):
    """An implementation that was asked for cannot run here; the message lists every reason."""


_counts: dict[str, dict[str, int]] = {}
_counts_lock = threading.Lock()


def counters() -> dict[str, dict[str, int]]:
    """Calls since the last reset: operator -> implementation -> count."""
    with _counts_lock:
        return {op: dict(by_impl) for op, by_impl in _counts.items()}


def reset_counters() -> None:
    """Forget every count."""
    with _counts_lock:
        _counts.clear()


def _counted(name: str, impl: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _counts_lock:
            by_impl = _counts.setdefault(name, {})
            by_impl[impl] = by_impl.get(impl, 0) + 1
        return fn(*args, **kwargs)

    return call


PLAIN = "plain PyTorch"


def plainly(op: str, got: str, expected: str) -> None:
    """A set's kernels for ``op`` know ``expected`` and not ``got``: plain PyTorch runs this call,
    which is counted beside the set's own, and of which a warning tells once."""
    with _counts_lock:
        calls = _counts.setdefault(op, {})
        calls[PLAIN] = calls.get(PLAIN, 0) + 1
    warn_once(f"{op}: got {got}, expected {expected}: {PLAIN} runs it")


@functools.cache
def warn_once(told: str) -> None:
    """One warning for every text."""
    warnings.warn(told, stacklevel=3)


def ran(impl: str) -> str:
    """Which implementation ran how many calls since the last reset, in one line.

    Raises ImplError unless all ran on ``impl`` (its GEMMs may be the library's, and some calls be
    handed on to plain PyTorch: they count twice).
    """
    used: dict[str, list[str]] = {}
    for operator, by_impl in sorted(counters().items()):
        for name, calls in by_impl.items():
            used.setdefault(name, []).append(f"{operator} {calls}")
    told = "; ".join(f"{name}: {', '.join(calls)}" for name, calls in used.items())
    if set(used) - {impl, "library", PLAIN}:
        raise ImplError(f"operators: got {told}; expected all on {impl}, as announced")
    return told


def _module(impl: str) -> ModuleType:
    return importlib.import_module(f"fpdm.kernels.{impl.removesuffix('-fused')}")


@functools.cache
def _library(impl: str, dtype: torch.dtype | None) -> tuple[str, ...]:
    """Operators of a set that are the library's; the reference is no library's but PyTorch's."""
    named = getattr(_module(impl), "library", None)
    return named(dtype) if named else ()


@functools.cache
def _operator_set(impl: str, library: tuple[str, ...]) -> SimpleNamespace:
    module = _module(impl)
    found: dict[str, Callable[..., Any]] = {}
    for name in OPERATORS:
        fn = getattr(module, name)
        if impl.endswith("-fused") and name in FUSED:
            fn = functools.partial(fn, fused=True)
        found[name] = _counted(name, "library" if name in library else impl, fn)
    return SimpleNamespace(name=impl, **found, **_loop(impl))


def _loop(impl: str) -> dict[str, Callable[..., Any]]:
    """What only csrc/cpu has: whole loops as one call (``loops`` says for which dtypes), and
    ``pack``, for weights that no backward reads."""
    if impl != "cpu":
        return {}
    cpu, loop = (importlib.import_module(f"fpdm.kernels.{name}") for name in ("cpu", "cpu_loop"))
    names = ("iterate", "solve", "unroll", "unroll_backward")
    counted = {name: _counted(name, impl, getattr(loop, name)) for name in names}
    return {"loops": loop.loops, "pack": cpu.pack, **counted}


def unavailable(
    impl: str, device: torch.device | str, dtype: torch.dtype | None = None
) -> str | None:
    """None when ``impl`` can run on ``device`` in ``dtype``, else every reason why not."""
    try:
        module = _module(impl)
    except Exception as error:
        # a broken optional package must not break the rest
        return f"cannot be imported: {one_line(error)}"
    return module.unavailable(torch.device(device), dtype)


def availability(device: torch.device | str) -> dict[str, str | None]:
    """Implementation -> None when it can run on ``device``, else the reason why not."""
    return {impl: unavailable(impl, device) for impl in IMPLEMENTATIONS}


def preferred(device: torch.device) -> tuple[str, ...]:
    """What ``auto`` tries on ``device``, in order: Triton from sm_80 on, csrc/cuda before, csrc/cpu
    on the CPU, and the reference where nothing else runs."""
    if device.type == "cpu":
        return ("cpu", "reference")
    if device.type != "cuda":
        return ("reference",)
    newer = torch.cuda.get_device_capability(device) >= (8, 0)
    return ("triton" if newer else "cuda", "reference")


def choose(impl: str, device: torch.device | str, dtype: torch.dtype | None = None) -> Impl:
    """Name of the implementation that will run. ``auto``: what FPDM_IMPL names, else the best that
    is available; a warning says so when that is plain PyTorch on a GPU for which a faster one only
    lacks something that could be installed.

    Raises ImplError for an unknown name, for an explicit one that cannot run on ``device``, or for
    an FPDM_CPU_ISA that cannot be met where csrc/cpu would run.
    """
    asked, source = (_REQUESTED, "FPDM_IMPL") if impl == "auto" else (impl, "impl")
    device = torch.device(device)
    if asked == "auto":
        first, *_ = names = preferred(device)
        if first == "cpu" and (unmet := _module("cpu").unmet()) is not None:
            raise ImplError(unmet)
        found = next(n for n in names if unavailable(n, device, dtype) is None)
        # of a device that has something faster; not where the dtype has nothing else
        if found != first and device.type == "cuda" and (why := unavailable(first, device)):
            warnings.warn(
                f"impl: auto is {found}, plain PyTorch, on {device}; {first} cannot run: {why}",
                stacklevel=1,
            )
        return cast(Impl, found)
    if asked not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ImplError(f"{source}: got {asked!r}, expected auto or one of {known}")
    reason = unavailable(asked, device, dtype)
    if reason is not None:
        raise ImplError(f"{source}: got {asked}, which cannot run on {device}: {reason}")
    return cast(Impl, asked)


_chosen = functools.cache(choose)


def resolve(impl: str, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """The operator set for ``impl`` on ``device``: one counted function per name in OPERATORS."""
    if dtype is not None and not dtype.is_floating_point:
        raise ImplError(f"dtype: got {dtype}, expected a floating-point compute dtype")
    chosen = _chosen(impl, device, dtype)
    return _operator_set(chosen, _library(chosen, dtype))
