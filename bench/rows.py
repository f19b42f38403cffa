"""What a row of the benchmark is: callables by name, ours first, and what one call costs by count.

An arm that is a string says why it cannot run here; a row whose own arm is one says so as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.timing import Arm
from fpdm.config import ExecutionConfig, ModelConfig
from fpdm.kernels.launch import dtype_name
from fpdm.model import build_model
from fpdm.recipes import MODEL_PRESETS, RECIPES

OURS = "fpdm"
# ours kernel by kernel, where OURS replays graphs
LAUNCHED = "fpdm without graphs"
DIGITS = RECIPES["digits"].model
S2 = MODEL_PRESETS["fpdm-s-2"]
XL = MODEL_PRESETS["fpdm-xl-2"]


@dataclass
class Arms:
    """Callables by name, ours first; FLOPs and bytes of one call of ours; images per call."""

    run: dict[str, Arm | str]
    flops: int = 0
    bytes: int = 0
    images: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Row:
    """``build`` makes the arms only when the row is run; ``rounds`` at most, within ``seconds``,
    fewer where they agree (bench.timing.interleave).
    ``pooled``: so short that what a process decides once shows; on a CPU timed in several.
    ``replayed``: single kernels, which take the host longer than the device: on a GPU timed by
    replays of a graph, with a warm and with a cold L2 cache."""

    suite: str
    name: str
    build: Callable[[], Arms]
    rounds: int = 15
    seconds: float = 60.0
    pooled: bool = False
    replayed: bool = False


@dataclass(frozen=True)
class Setting:
    """Model, batch, dtype and device of a suite."""

    label: str
    config: ModelConfig
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def name(self) -> str:
        """Such as ``S/2 B8 bfloat16``."""
        return f"{self.label} B{self.batch} {dtype_name(self.dtype)}"


def attempt(make: Callable[[], Arm]) -> Arm | str:
    """The arm, or why there is none: torch.compile needs a C++ compiler on a CPU."""
    try:
        return make()
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def randomised(config: ModelConfig, device: torch.device, **execution: Any) -> Any:
    """An FPDM or DiT with every parameter random: adaLN-Zero would make the gates zero."""
    torch.manual_seed(0)
    # drawn there: a CPU takes 10 s over a DiT-XL
    with device:
        model = build_model(config, ExecutionConfig(**execution))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    return model


def inputs(config: ModelConfig, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, t, y."""
    side = config.input_size
    x = torch.randn(batch, config.in_channels, side, side, device=device)
    t = torch.randint(0, 1000, (batch,), device=device)
    return x, t, torch.randint(0, config.num_classes, (batch,), device=device)
