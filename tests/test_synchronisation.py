"""The host never waits for the device within a step, whatever the sampler does, but for the one
flag that a tolerance reads late."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import random_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fpdm import run, solvers, stopping
from fpdm.config import DiffusionConfig, ModelConfig, SamplerConfig
from fpdm.diffusion import Diffusion
from fpdm.engine import Sampler
from fpdm.run import Run

SMALL = ModelConfig(input_size=4, in_channels=2, hidden_size=16, num_heads=2, num_classes=5)
DIT = replace(SMALL, kind="dit", pre_depth=0, post_depth=0, depth=2)
BUSY = SamplerConfig(
    method="ddpm", steps=5, iters=3, reuse="extrapolate", guidance=2.5, guidance_low=0.3, batch=3
)
LABELS, SEEDS = [0, 4, 1, 1, 3], [5, 0, 2, 7, 8]
TOL: dict[str, Any] = {"tol": 0.15, "iters": 9}
MODES: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "ddim": {"method": "ddim", "reuse": "full", "guidance": 1.0},
    "ddim eta": {"method": "ddim", "eta": 1.0, "reuse": "none"},
    "dpmpp": {"method": "dpmpp_2m", "guidance_rescale": 0.5},
    "blend": {"reuse": "blend", "reuse_gamma_end": 0.9},
    "half": {"dtype": "bfloat16"},
    "schedule": {"iters": None, "allocation": "explicit", "schedule": (9, 1, 2, 5, 4)},
    "tolerance": TOL,
    "adaptive": {**TOL, "iters": 4, "allocation": "adaptive"},
    "anderson": {**TOL, "solver": "anderson"},
    "broyden": {**TOL, "solver": "broyden"},
    "dit": {"iters": None, "reuse": "none"},
}

# results whose shape, or whose Python value, is data of the device
WAITING = {
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "unique_dim_consecutive", "equal", "is_nonzero",
    "bincount", "argwhere", "combinations",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Operators that would make the host wait on a GPU. ``late``: storages that a flag was copied
    to, which may be read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.late: set[int] = set()
        self.flags = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in WAITING and not self._is_flag(name, args):
            self.found.append(name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            # a mask is turned into as many indices as it has true entries
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                self.found.append(f"{name} by a mask")
        elif name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            self.found.append(name)
        elif name == "lift_fresh" and args[0].dim():
            self.found.append("a copy of a host's list")
        return func(*args, **(kwargs or {}))

    def _is_flag(self, name: str, args: Any) -> bool:
        (tensor, *_) = (t for t in tree_flatten(args)[0] if isinstance(t, Tensor))
        flag = name == "_local_scalar_dense" and tensor.untyped_storage().data_ptr() in self.late
        self.flags += flag
        return flag


def watched(
    monkeypatch: pytest.MonkeyPatch, model: Any = SMALL, **changes: Any
) -> tuple[Waits, Any]:
    """What waited in the steps of all batches, as on a GPU, and the samples."""
    waits, execute, init = Waits(), Run.execute, solvers.Flag.__init__

    def watching(self: Run, progress: Any = None) -> Tensor:
        with waits:
            return execute(self, progress)

    def noted(self: Any, left: Tensor) -> None:
        init(self, left)
        waits.late |= {t.untyped_storage().data_ptr() for t in self.host}

    monkeypatch.setattr(Run, "execute", watching)
    monkeypatch.setattr(solvers.Flag, "__init__", noted)
    monkeypatch.setitem(solvers.LAG, "cpu", 1)
    # by the reference: the mode sees torch's operators only
    net = random_model(model, impl="reference")
    s = Sampler(net, Diffusion(DiffusionConfig()), replace(BUSY, **changes))
    return waits, s.sample(LABELS, SEEDS)


@pytest.mark.parametrize("mode", MODES)
def test_no_step_waits(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, found = watched(monkeypatch, DIT if mode == "dit" else SMALL, **MODES[mode])
    assert waits.found == []
    assert found.x.isfinite().all()
    if "tol" not in MODES[mode]:
        assert waits.flags == 0
        return
    # one flag per iteration, read when the next one is launched; a timestep's last may go unread
    parts = [found.stats.iterations[:, :, i : i + BUSY.batch] for i in (0, BUSY.batch)]
    longest = sum(int(part.amax(dim=(1, 2)).sum()) for part in parts)
    assert longest - 2 * BUSY.steps <= waits.flags <= longest


def test_given_noise_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.randn(5, 5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sample = Sampler.sample

    def given(self: Sampler, *args: Any) -> Any:
        return sample(self, *args, noise=noise[0], step_noise=noise, progress=lambda _: None)

    monkeypatch.setattr(Sampler, "sample", given)
    assert watched(monkeypatch)[0].found == []


def reads_a_number(self: Run, *args: Any) -> None:
    UPDATE(self, *args)
    if self.w.x[: self.count].abs().max() > 1e6:
        raise ValueError


def takes_a_mask(w: Any, n: int, m: int, z: Tensor, others: Any) -> Tensor:
    stay = COMPACT(w, n, m, z, others)
    z[:n][w.done[:n]] = 0.0
    return stay


def counts_gaps(w: Any, n: int, m: int, z: Tensor, others: Any) -> Tensor:
    w.done[:n].nonzero()
    return COMPACT(w, n, m, z, others)


def brings_a_list(self: Run, *args: Any) -> None:
    self.w.x[:1].mul_(torch.tensor([1.0]))
    UPDATE(self, *args)


def reads_at_once(self: Any, j: int) -> int:
    return int(self.left)


def repeats_by_data(self: Run, *args: Any) -> None:
    torch.repeat_interleave(self.w.y[:2], torch.tensor(2).expand(2))
    UPDATE(self, *args)


UPDATE, COMPACT = run.Run._update, stopping.compact


@pytest.mark.parametrize(
    ("where", "name", "fault", "told"),
    [
        (Run, "_update", reads_a_number, "_local_scalar_dense"),
        (Run, "_update", brings_a_list, "a copy of a host's list"),
        (Run, "_update", repeats_by_data, "repeat_interleave"),
        (stopping, "compact", takes_a_mask, "by a mask"),
        (stopping, "compact", counts_gaps, "nonzero"),
        (solvers.Flag, "read", reads_at_once, "_local_scalar_dense"),
    ],
)
def test_waiting_is_seen(
    where: Any, name: str, fault: Callable[..., Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, fault)
    found = watched(monkeypatch, **TOL)[0].found
    assert any(told in word for word in found), found


def test_nothing_is_copied_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first launch and the last no method that copies to the host is called."""
    touched: list[str] = []

    def guard(name: str) -> Any:
        original = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **kw: Any) -> Any:
            touched.append(name)
            return original(self, *args, **kw)

        return call

    s = Sampler(random_model(SMALL), Diffusion(DiffusionConfig()), BUSY)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(Tensor, name, guard(name))
    s.sample(LABELS, SEEDS)
    assert touched == []
    s.sample(LABELS, SEEDS, progress=lambda _: bool(torch.ones(1) > 0))
    assert "__bool__" in touched
