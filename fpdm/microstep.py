"""Forward, loss and backward of one micro-batch: launched kernel by kernel, or replayed.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps;   o = model(x_t, t, y; n, m)
    p.grad += s d(sum_b loss_b)/dp                   s = loss scale / batch of the step

On a GPU with ``train.graphs`` everything between the micro-batch and the gradients runs on buffers
that stay and is one graph per (n, m), see fpdm.graphs. The host needs longer to launch a step than
the device to compute it, up to the batches of the paper; a replay needs the host once. The graphs
share one memory pool. As its largest buffer grows with m and cannot be given back, the first graph
is one of the largest m; until then, and while a pair is new, steps are launched, beside the pool:
``auto`` leaves graphs alone, with one warning, where there is no room for two.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fpdm import graphs
from fpdm.batches import Draws
from fpdm.config import Config
from fpdm.diffusion import Diffusion
from fpdm.gradients import Gradient
from fpdm.graphs import GraphKey
from fpdm.model import FPDM, DiT
from fpdm.weights import PreparedWeights

# an allocator reserved up to 1.14 times what was allocated (bench/results/nvidia-h200/memory.json)
MARGIN = 1.15


def room(device: torch.device) -> tuple[int, int]:
    """Bytes: what ``device`` has left between two steps, and what the largest step took so far;
    nothing is known of a CPU."""
    if device.type != "cuda":
        return 0, 0
    free, _ = torch.cuda.mem_get_info(device)
    here = torch.cuda.memory_allocated(device)
    cached = torch.cuda.memory_reserved(device) - here
    return free + cached, torch.cuda.max_memory_allocated(device) - here


class _Held:
    """Static copies of what a micro-batch brings: x_0, eps (B,C,h,w), t, y (B,), s (), and its
    ``rows`` (4,B), see ``MicroStep``."""

    def __init__(self, x0: Tensor, draws: Draws):
        self.x0 = torch.empty_like(x0)
        self.draws = Draws(*map(torch.empty_like, (draws.t, draws.noise, draws.y)))
        self.scale = x0.new_zeros(())
        self.rows = x0.new_zeros(4, len(x0))

    def take(self, x0: Tensor, draws: Draws, scale: float) -> None:
        self.x0.copy_(x0)
        self.draws.t.copy_(draws.t)
        self.draws.noise.copy_(draws.noise)
        self.draws.y.copy_(draws.y)
        self.scale.fill_(scale)

    def tensors(self) -> list[Tensor]:
        return [self.x0, *vars(self.draws).values(), self.scale, self.rows]


class MicroStep:
    """What the trainer does with a micro-batch. ``weights`` are the trainer's; gradients arrive in
    the ``.grad`` that the parameters have, whose addresses stay (fpdm.optim).

    Raises ConfigError when ``config.train.graphs`` is ``on`` where nothing can be captured.
    """

    def __init__(
        self,
        model: FPDM | DiT,
        diffusion: Diffusion,
        weights: PreparedWeights,
        config: Config,
        device: torch.device,
    ):
        self.model, self.diffusion, self.weights, self.config = model, diffusion, weights, config
        fixed = config.fixed_point
        self.gradient = Gradient(fixed.gradient, fixed.implicit_iters, fixed.phantom_damping)
        pairs = (fixed.n_max - fixed.n_min + 1) * (fixed.m_max - fixed.m_min + 1)
        # fewer than there are would be captured again and again
        self.graphs = graphs.cache_for("train.graphs", config.train.graphs, device, pairs)
        self.held: _Held | None = None
        # captures made before the buffers were last replaced: the next has the largest m again
        self.before = 0
        self.params = list(model.parameters())
        self.launched = False  # a micro-batch of the largest m, so that its memory is known

    def _key_of(self, x0: Tensor, n: int, m: int) -> GraphKey | None:
        """Of a micro-batch; None where it cannot be a graph: no gradient to add to, or none of the
        largest m before it."""
        assert self.graphs is not None
        largest = isinstance(self.model, DiT) or m == self.config.fixed_point.m_max
        if not (largest or self.graphs.captures > self.before):
            return None
        grads = [p.grad for p in self.params if p.requires_grad]
        found = tuple(g.data_ptr() for g in grads if g is not None)
        if len(found) < len(grads):
            return None
        pair = (n, m) if isinstance(self.model, FPDM) else ()
        return GraphKey(
            "micro-batch", len(x0), (*pair, *graphs.global_settings()), tuple(x0.shape[1:]),
            (self.weights.dtype,), str(x0.device), self.model.execution.impl, 0,
            (*graphs.addresses(self.weights), *found),
        )  # fmt: skip

    def __call__(
        self, x0: Tensor, draws: Draws, n: int, m: int, scale: float, stats: bool = False
    ) -> Tensor:
        """Adds the gradients of ``scale`` times the summed loss; rows (4,B) float32, not attached:
        loss, mse, vb and, with ``stats`` (which runs eagerly), the last relative residual."""
        key = None if self.graphs is None or stats else self._key_of(x0, n, m)
        if self.graphs is None or key is None:
            return self._run(x0, draws, n, m, x0.new_full((), scale), stats)
        if self.held is None or self.held.x0.shape != x0.shape:
            # the old buffers' graphs would write into freed memory
            self.release()
            self.held = _Held(x0, draws)
        if not self._room(x0.device):
            return self._run(x0, draws, n, m, x0.new_full((), scale), stats)
        held = self.held
        held.take(x0, draws, scale)

        def work() -> None:
            held.rows.copy_(self._run(held.x0, held.draws, n, m, held.scale, False))

        self.graphs.run(key, work)
        return held.rows.clone()

    def _room(self, device: torch.device) -> bool:
        """Whether graphs may be used. Under ``auto`` not where a launched step would no longer fit
        beside their pool: running out of memory there could only end the run."""
        assert self.graphs is not None
        if self.graphs.always or self.graphs.broken or self.graphs.captures > self.before:
            return True
        if not self.launched:
            self.launched = True
            return True
        free, need = room(device)
        # of either, and what the allocator cannot fill
        both = int(2 * MARGIN * need)
        if free >= both:
            return True
        self.leave_graphs(f"got {free / 1e9:.1f} GB free, expected {both / 1e9:.1f} for both")
        return False

    def leave_graphs(self, reason: str) -> bool:
        """Under ``auto``: gives graphs up for good, with a warning; False where there are none, or
        they were asked for."""
        if self.graphs is None or self.graphs.always:
            return False
        self.release()
        self.graphs = None
        warnings.warn(
            f"train.graphs: {reason}: kernel by kernel from here on, not as graphs", stacklevel=4
        )
        return True

    def _run(self, x0: Tensor, d: Draws, n: int, m: int, scale: Tensor, stats: bool) -> Tensor:
        xt = self.diffusion.q_sample(x0, d.t, d.noise)
        residual = x0.new_zeros(len(x0))
        if isinstance(self.model, FPDM):
            solution = self.model.solve(
                xt, d.t, d.y, m, n, weights=self.weights, stats=stats, gradient=self.gradient,
                detach_init=self.config.fixed_point.detach_init,
            )  # fmt: skip
            output = solution.output
            if solution.stats is not None:
                residual = solution.stats.residual[-1]
        else:
            output = self.model(xt, d.t, d.y, weights=self.weights)
        losses = self.diffusion.losses(output.float(), x0, xt, d.t, d.noise)
        (losses["loss"].sum() * scale).backward()
        return torch.stack([losses["loss"], losses["mse"], losses["vb"], residual]).detach()

    def release(self) -> None:
        """Give back graphs and buffers; they are made again when needed."""
        self.held = None
        if self.graphs is not None:
            self.graphs.clear()
            self.before = self.graphs.captures
            self.launched = False
