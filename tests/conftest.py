"""Shared by all tests: golden numbers, small models, relative errors."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fpdm import figures, run
from fpdm.config import ExecutionConfig, ModelConfig
from fpdm.kernels import implementations
from fpdm.model import FPDM, DiT, _Transformer

DATA = Path(__file__).parent / "data"
TINY = ModelConfig(input_size=8, hidden_size=48, num_heads=4, num_classes=10)
EXTRA = ModelConfig(
    input_size=8, in_channels=1, hidden_size=32, num_heads=2, num_classes=5, pre_depth=2,
    post_depth=3, pre_post_timestep_conditioning=True,
)  # fmt: skip
TINY_DIT = ModelConfig(
    kind="dit", depth=3, pre_depth=0, post_depth=0, input_size=8, hidden_size=48, num_heads=4,
    num_classes=10,
)  # fmt: skip


# a quarter of a minute and more each: begun last, they would leave the other workers idle
LONG = (
    "test_interpreter",
    "test_every_kernel",
    "test_sigkill_at_twenty",
    "test_half_precision_survives",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long tests first, dealt out: xdist begins with a quarter of a worker's share, in order. What
    needs a GPU is skipped where there is none; what belongs to the other process (interpreter.py)
    is not there."""
    elsewhere = "outside" if os.environ.get("TRITON_INTERPRET") == "1" else "inside"
    gone = [item for item in items if item.get_closest_marker(elsewhere)]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in set(gone)]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if item.name.startswith(LONG)]
    rest = iter([item for item in items if not item.name.startswith(LONG)])
    share, order = len(items) // workers // 4, []
    for worker in range(workers):
        mine = long[worker::workers]
        order += [*mine, *itertools.islice(rest, max(share - len(mine), 0))]
    items[:] = [*order, *rest]


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage need walk over it again."""
    gc.collect()
    gc.freeze()


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, L2 over the whole tensor."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


def worst_relative(a: Tensor, b: Tensor) -> float:
    """The larger of the relative L2 error of the tensor and of its worst sample."""
    return max(relative(a, b), *(relative(x, y) for x, y in zip(a, b)))


def published(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below ``prefix``, without it."""
    return {k[len(prefix) :]: v for k, v in golden.items() if k.startswith(prefix)}


def _golden(name: str) -> dict[str, Tensor]:
    # here, so that GPU tests run on a machine without safetensors
    from safetensors.torch import load_file

    return load_file(DATA / name)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> dict[str, Tensor]:
    return _golden("published_tiny.safetensors")


@pytest.fixture(scope="session")
def extra() -> dict[str, Tensor]:
    return _golden("published_extra.safetensors")


def tiny_model(golden: dict[str, Tensor], execution: ExecutionConfig | None = None) -> FPDM:
    model = FPDM(TINY, execution)
    model.load_state_dict(published(golden, "state_dict."), strict=True)
    return model


def extra_model(golden: dict[str, Tensor], execution: ExecutionConfig | None = None) -> FPDM:
    model = FPDM(EXTRA, execution)
    model.load_state_dict(published(golden, "state_dict."), strict=True)
    return model


def tiny_dit(golden: dict[str, Tensor]) -> DiT:
    model = DiT(TINY_DIT)
    model.load_state_dict(published(golden, "dit.state_dict."), strict=True)
    return model


def random_model(config: ModelConfig, seed: int = 0, **execution: str) -> FPDM | DiT:
    """Every parameter random (adaLN-Zero would hide errors)."""
    kind = FPDM if config.kind == "fpdm" else DiT
    model = kind(config, ExecutionConfig(**execution))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            fan = param[0].numel() if param.dim() > 1 else 100
            param.normal_(std=0.7 / fan**0.5, generator=generator)
    return model


def read_png(path: Path) -> np.ndarray:
    """The pixels (H,W,C) of a PNG, C = 1 or 3, read by Pillow and not by the code that wrote it."""
    image = pytest.importorskip("PIL.Image")
    with image.open(path) as opened:
        pixels = np.asarray(opened)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def watch_iterations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every iteration of the sampler's loop from now on, whoever they are for; a solve that
    is one call tells their sum."""
    rows: list[int] = []
    cpu, iterate_forward = implementations.resolve("cpu", "cpu"), run.iterate_forward
    solve = cpu.solve

    def iterated(ops: Any, x: Tensor, *args: Any) -> Tensor:
        rows.extend([len(x)] * args[6])
        return iterate_forward(ops, x, *args)

    def solved(*args: Any) -> int:
        rows.append(solve(*args))
        return rows[-1]

    monkeypatch.setattr(run, "iterate_forward", iterated)
    monkeypatch.setattr(cpu, "solve", solved)
    return rows


@pytest.fixture
def away_from_zero(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs begin with weights at which every parameter has a gradient, and draw no curves."""
    initialize = _Transformer.initialize

    def shifted(self: Any, generator: torch.Generator | None = None) -> None:
        initialize(self, generator)
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(torch.randn(p.shape, generator=noise) * 0.1)

    monkeypatch.setattr(_Transformer, "initialize", shifted)
    monkeypatch.setattr(figures, "plot_history", lambda metrics, path: False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
