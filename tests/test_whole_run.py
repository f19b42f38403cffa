"""A whole training run against float64 by hand: what S-JFB, accumulation, clipping, the schedule,
AdamW and the average make of the same draws, together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import small
from torch import Tensor

from bench import published
from fpdm import checkpoint, model, train
from fpdm.batches import draw_iterations, draw_samples, local_slots
from fpdm.config import Config, from_dict
from fpdm.data import open_dataset, stream_indices
from fpdm.optim import learning_rate
from fpdm.train import Trainer

STEPS = 5
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "every part": {
        "optim": {"lr_final": 1e-4, "warmup_steps": 2, "weight_decay": 0.5, "clip_norm": 0.5},
        "train": {"accumulate": 2, "label_dropout": 0.4},
    },
    "reordered": {
        "model": {"pre_depth": 2, "post_depth": 0, "pre_post_timestep_conditioning": True},
        "fixed_point": {"n_min": 1, "n_max": 3, "m_min": 2, "m_max": 3},
        "optim": {"beta1": 0.5, "beta2": 0.9, "ema_warmup": True, "ema_decay": 0.5},
        "execution": {"recompute": "elementwise", "chunks": 2},
    },
    "unrolled": {
        "fixed_point": {"n_max": 0, "m_min": 3, "m_max": 3, "detach_init": False},
        "optim": {"lr_final": 0.0, "warmup_steps": 0, "weight_decay": 0.1},
        "train": {"accumulate": 4},
    },
}


pytestmark = pytest.mark.usefixtures("away_from_zero")


def rate(config: Config, step: int) -> float:
    o = config.optim
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    if o.lr_final is None:
        return o.lr
    share = (step - o.warmup_steps) / (STEPS - 1 - o.warmup_steps)
    return o.lr_final + (o.lr - o.lr_final) * (1 + math.cos(math.pi * share)) / 2


def by_hand(config: Config) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """(parameters, average, loss of every step), float64."""
    network = model.build_model(config.model)
    network.initialize(torch.Generator().manual_seed(config.train.seed))
    w = {name: value.detach().double() for name, value in network.state_dict().items()}
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    for name in names:
        w[name].requires_grad_()
    ema, first, second = (
        {name: f(w[name].detach()) for name in names}
        for f in (torch.clone, torch.zeros_like, torch.zeros_like)
    )
    a = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    a = (a - a[-1]) * a[0] / (a[0] - a[-1])
    o, t, data, losses = config.optim, config.train, open_dataset(config.data), list[float]()
    for step in range(STEPS):
        loss = torch.zeros((), dtype=torch.float64)
        for micro in range(t.accumulate):
            slots = local_slots(t.batch, t.accumulate, micro, 0, 1)
            ids = stream_indices(len(data), t.seed, step * t.batch + slots.start, len(slots))
            x, y = data.batch(ids)
            n, m = draw_iterations(t.seed, step, micro, config.fixed_point)
            d = draw_samples(t.seed, step, slots, x, y, 1000, t.label_dropout, 10)
            alpha = torch.from_numpy(a[d.t.numpy()]).view(-1, 1, 1, 1)
            sigma, x, noise = torch.sqrt(1 - alpha**2), x.double(), d.noise.double()
            out, _ = published.forward(
                w, config.model, alpha * x + sigma * noise, d.t, d.y, m, n,
                detach_init=config.fixed_point.detach_init,
            )  # fmt: skip
            error = out[:, :1] - (alpha * noise - sigma * x)
            loss = loss + error.square().flatten(1).mean(1).sum() / t.batch
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, [w[name] for name in names])
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        clip = 1.0 if o.clip_norm is None else min(1.0, o.clip_norm / norm)
        lr, k = rate(config, step), step + 1
        decay = min(o.ema_decay, (1 + k) / (10 + k)) if o.ema_warmup else o.ema_decay
        with torch.no_grad():
            for name, g in zip(names, grads):
                first[name] = o.beta1 * first[name] + (1 - o.beta1) * clip * g
                second[name] = o.beta2 * second[name] + (1 - o.beta2) * (clip * g) ** 2
                spread = torch.sqrt(second[name] / (1 - o.beta2**k)) + o.eps
                w[name] *= 1 - lr * o.weight_decay
                w[name] -= lr * first[name] / (1 - o.beta1**k) / spread
                ema[name] = decay * ema[name] + (1 - decay) * w[name]
    return {name: w[name].detach() for name in names}, ema, losses


def early(config: Any, step: int, total: int) -> float:
    return learning_rate(config, step + 1, total)


PLANTED = {"learning_rate": early, "draw_iterations": lambda *args: (0, 1)}


@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_would_be_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, name, PLANTED[name])
    with pytest.raises(AssertionError):
        test_float64_by_hand("every part", tmp_path)


@pytest.mark.parametrize("name", RUNS)
def test_float64_by_hand(name: str, tmp_path: Path) -> None:
    config = from_dict(
        {"model": {"hidden_size": 16}, "diffusion": {"vb_weight": 0.0}, "optim": {"eps": 1e-3}},
        small(tmp_path, steps=STEPS, batch=8, log_every=1, save_every=0, lr=1e-2),
    )
    config = from_dict(RUNS[name], config)
    Trainer(config).run()
    parameters, average, losses = by_hand(config)
    found = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    for group, wanted in (("model", parameters), ("ema", average)):
        for key, value in wanted.items():
            error = (found.tensors[group][key].double() - value).norm() / value.norm()
            assert error < 1e-5, (group, key)
