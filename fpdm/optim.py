"""AdamW and the moving average of the weights in one step, and the loss scale of half precision.

Per parameter w with gradient g (Loshchilov & Hutter, decoupled weight decay), then the average:

    g <- c g                               c = clip coefficient / loss scale
    a <- b1 a + (1-b1) g                   v <- b2 v + (1-b2) g^2
    w <- w (1 - lr wd) - lr (a / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
    e <- e + (1-d) (w - e)                 d = decay, or min(decay, (1+t)/(10+t)) with warm-up

Everything is float32. Parameters, gradients, moments and averages are views of five flat buffers:
the finite check, the sum over ranks and, with ``impl="onepass"``, all of the update with the copies
of ``PreparedWeights`` are each one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fpdm.config import ConfigError, OptimConfig, UserError
from fpdm.weights import FlatLayout, PreparedWeights

# floats at the end of the gradient buffer
_TAIL = 16
# beyond this a scale can only turn finite gradients into infinities
_SCALE_CEILING = 2.0**40


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """Learning rate of step ``step`` (counted from 0) of ``total``.

    Linear from lr/warmup to lr over ``warmup_steps``; then constant, or, with ``lr_final``, half a
    cosine from lr down to lr_final at the last step.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_final is None:
        return config.lr
    span = max(1, total - 1 - config.warmup_steps)
    part = min(1.0, (step - config.warmup_steps) / span)
    return config.lr_final + 0.5 * (config.lr - config.lr_final) * (1.0 + math.cos(math.pi * part))


class AdamWEMA:
    """AdamW over the trainable float32 parameters of ``model`` with their moving average.

    ``prepared`` (if given) is refreshed by the step, by ``load_state`` and on entry to and exit
    from ``swapped``: prepared weights are never older than the parameters.
    ``tail`` are floats at the end of the flat buffer that travel with the gradients through a sum
    over ranks; they are no part of the norm.
    """

    def __init__(
        self, model: nn.Module, config: OptimConfig, prepared: PreparedWeights | None = None
    ) -> None:
        self.model, self.config, self.prepared = model, config, prepared
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for name, p in self.params.items():
            if p.dtype != torch.float32:
                raise ConfigError(f"parameter {name}: got {p.dtype}, expected torch.float32")
        self.layout = FlatLayout(dict(model.named_parameters()))
        self.updates = 0
        self._allocate()
        self.impl = _choose(config.impl, self.flat["w"].device)
        self.adamw: torch.optim.AdamW | None = None
        if self.impl != "onepass":
            self._create_adamw()
        self._swapped = False

    @torch.no_grad()
    def _allocate(self) -> None:
        """Parameters, gradients, averages and both moments as views of five flat buffers."""
        device, size = next(iter(self.params.values())).device, self.layout.trained
        self.flat = {key: torch.zeros(size, device=device) for key in ("w", "a", "v", "e")}
        self.buffer = torch.zeros(size + _TAIL, device=device)
        self.gradients, self.tail = self.buffer[:size], self.buffer[size:]
        view = self.layout.view
        self._views = {n: view(self.gradients, n) for n in self.params}
        self.ema = {n: view(self.flat["e"], n) for n in self.params}
        for name, p in self.params.items():
            p.data = view(self.flat["w"], name).copy_(p)
        self.flat["e"].copy_(self.flat["w"])
        self.zero_grad()

    def _create_adamw(self) -> None:
        """torch.optim's, on the flat buffers as one parameter: it would take 1.5 us of the host
        for each of many."""
        c, fused, w = self.config, self.impl == "fused", self.flat["w"]
        self.whole = nn.Parameter(w)
        self.whole.grad = self.gradients
        self.adamw = torch.optim.AdamW(
            [self.whole],
            lr=c.lr,
            betas=(c.beta1, c.beta2),
            eps=c.eps,
            weight_decay=c.weight_decay,
            foreach=self.impl == "foreach",
            fused=fused,
        )
        self.adamw.state[self.whole] = {
            "step": torch.zeros((), device=w.device if fused else torch.device("cpu")),
            "exp_avg": self.flat["a"],
            "exp_avg_sq": self.flat["v"],
        }

    @torch.no_grad()
    def _attach(self) -> None:
        """Makes the buffer and every p.grad one again: others may have replaced the gradient
        (it is copied in) or dropped it (zero), as ``model.zero_grad()`` does."""
        for name, p in self.params.items():
            view = self._views[name]
            if p.grad is view:
                continue
            if p.grad is None:
                view.zero_()
            elif p.grad.data_ptr() != view.data_ptr():
                view.copy_(p.grad)
            else:
                continue
            p.grad = view

    def zero_grad(self) -> None:
        """Clears gradients and tail in place; every p.grad is its view of the buffer."""
        self.buffer.zero_()
        for name, p in self.params.items():
            if p.grad is not self._views[name]:
                p.grad = self._views[name]

    def grad_norm(self) -> float:
        """Euclidean norm of all gradients as they lie in the buffer; not finite if one is not."""
        self._attach()
        return float(torch.linalg.vector_norm(self.gradients))

    @torch.no_grad()
    def step(self, lr: float, multiplier: float = 1.0) -> None:
        """One update with the gradients times ``multiplier`` (clip coefficient / loss scale)."""
        self._attach()
        self.updates += 1
        c, decay = self.config, self.config.ema_decay
        if c.ema_warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        if self.adamw is None:
            self._one_pass(lr, multiplier, decay)
            return
        if multiplier != 1.0:
            self.gradients.mul_(multiplier)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.flat["e"].lerp_(self.flat["w"], 1.0 - decay)
        self._refresh()

    def _one_pass(self, lr: float, multiplier: float, decay: float) -> None:
        """Everything above and the prepared copies, with every number read and written once; the
        gradients stay as they were, times the loss scale."""
        c, t, flat = self.config, self.updates, self.flat
        scalars = [
            multiplier, c.beta1, 1 - c.beta1, c.beta2, 1 - c.beta2, c.eps, 1 - lr * c.weight_decay,
            lr / (1 - c.beta1**t), math.sqrt(1 - c.beta2**t), 1 - decay,
        ]  # fmt: skip
        adamw_, p, copy = _one_pass_on(flat["w"].device), self.prepared, None
        if (
            p is not None
            and p.flat is not None
            and p.belongs_to(self.model)
            # one that was made before a parameter was frozen is another layout
            and vars(p.layout) == vars(self.layout)
        ):
            copy = p.flat[: self.layout.trained]
        adamw_(flat["w"], self.gradients, flat["a"], flat["v"], flat["e"], copy, scalars)
        if p is not None and copy is not None:
            p.fold()
        else:
            self._refresh()

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model holds the average and ``ema`` the parameters; both come back bit for
        bit. In-place copies: prepared weights and captured graphs stay valid."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self._swapped = not self._swapped
        for name, p in self.params.items():
            kept = p.detach().clone()
            p.copy_(self.ema[name])
            self.ema[name].copy_(kept)
        self._refresh()

    def _refresh(self) -> None:
        if self.prepared is not None:
            self.prepared.refresh()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Live tensors, no copies: model (state dict), ema (trainable parameters by name), optim
        (step (), exp_avg.*, exp_avg_sq.*), all float32. Raises RuntimeError inside ``swapped``."""
        if self._swapped:
            raise RuntimeError("state() inside swapped(): the model holds the average")
        optim: dict[str, Tensor] = {"step": torch.tensor(float(self.updates))}
        for name in self.params:
            optim[f"exp_avg.{name}"] = self.layout.view(self.flat["a"], name)
            optim[f"exp_avg_sq.{name}"] = self.layout.view(self.flat["v"], name)
        model = {name: t.detach() for name, t in self.model.state_dict().items()}
        return {"model": model, "ema": dict(self.ema), "optim": optim}

    @torch.no_grad()
    def load_state(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores ``state()`` bit for bit. Nothing is written unless every tensor fits: raises
        UserError that names the first differences, and RuntimeError inside ``swapped``."""
        targets = self.state()
        wrong = _differences(targets, groups)
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError("checkpoint does not fit the model: " + "; ".join(wrong[:3]) + more)
        for group, tensors in targets.items():
            for name, target in tensors.items():
                target.copy_(groups[group][name])
        self.updates = int(groups["optim"]["step"])
        if self.adamw is not None:
            self.adamw.state[self.whole]["step"].fill_(float(self.updates))
        self._refresh()

    def ema_state_dict(self) -> dict[str, Tensor]:
        """The model's state dict with the average in place of the trainable parameters."""
        return {**self.state()["model"], **self.ema}


def _one_pass_missing(device: torch.device) -> str | None:
    """Why the one-pass kernel cannot run on ``device``; None when it can."""
    try:
        from fpdm.kernels import adamw
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return adamw.unavailable(device)


def _one_pass_on(device: torch.device) -> Callable[..., None]:
    """The one-pass kernel for ``device``; ConfigError when there is none."""
    if reason := _one_pass_missing(device):
        raise ConfigError(f"optim.impl: got onepass, which cannot run on {device}: {reason}")
    from fpdm.kernels import adamw

    return adamw.adamw_


def _choose(impl: str, device: torch.device) -> str:
    """auto is one pass on sm_80 and newer: 38 bytes a number, where torch's fused AdamW with the
    average, the casts and a loss scale's pass beside it moves 54; on an H200 0.94 ms and 1.74, and
    as long as each other where a call is waited for alone (bench/NOTES.md). Elsewhere fused: on two
    CPU cores 5 to 7 times faster than foreach."""
    if impl == "onepass":
        _one_pass_on(device)
    if impl != "auto":
        return impl
    # older ones have no compile gate for it
    newer = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "onepass" if newer and _one_pass_missing(device) is None else "fused"


def _differences(
    expected: Mapping[str, Mapping[str, Tensor]], got: Mapping[str, Mapping[str, Tensor]]
) -> list[str]:
    wrong = []
    for group, tensors in expected.items():
        found = got.get(group, {})
        for name, t in tensors.items():
            if name not in found:
                wrong.append(f"{group}/{name} is missing")
            elif found[name].shape != t.shape or found[name].dtype != t.dtype:
                wrong.append(
                    f"{group}/{name}: got {tuple(found[name].shape)} {found[name].dtype}, "
                    f"expected {tuple(t.shape)} {t.dtype}"
                )
        wrong += [f"{group}/{name} is not in the model" for name in found if name not in tensors]
    return wrong


@dataclass
class LossScaler:
    """Loss scale of fp16: doubled after ``interval`` good steps in a row, halved by a bad one.

    The scale never falls below ``floor`` (a scale that decays to zero looks like training and
    changes nothing); ``floor_hits`` counts the bad steps that found it there.
    """

    scale: float
    interval: int
    floor: float
    good: int = 0
    floor_hits: int = 0

    def update(self, found_inf: bool) -> None:
        """Notes one step."""
        if found_inf:
            self.good = 0
            self.floor_hits += self.scale <= self.floor
            self.scale = max(self.floor, self.scale * 0.5)
            return
        self.good += 1
        if self.good >= self.interval:
            self.good, self.floor_hits = 0, 0
            self.scale = min(_SCALE_CEILING, self.scale * 2.0)
