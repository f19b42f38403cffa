"""One batch on its way: the launch plan executed on a workspace.

    encode    h = Pre(x), u = E i + b1, x*_0 from h and the reused solution
    iterate   x_{j+1} = f(x_j), k times or until every slot is done (fpdm.stopping)
    update    o = Final(Post(x*)), guidance, x = step(x, o, z)

Reuse (paper section 3.4) starts from earlier solutions x*_1 (latest) and x*_2 of the same branch:

    none          h
    full          x*_1
    blend         h + gamma (x*_1 - h)
    extrapolate   x*_1 + rho (x*_1 - x*_2)        h in the first timestep, x*_1 in the second

A branch that skipped a timestep (guidance interval) starts from h again. Every launch is a function
of the workspace, weights and the sampler's tables, and of what its graph key says: nothing else.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpdm import budget, graphs, steps, stopping
from fpdm.block import BlockWeights, has_loop, iterate_forward
from fpdm.config import SamplerConfig
from fpdm.fixed_point import SolveStats
from fpdm.kernels import implementations, ops
from fpdm.model import FPDM
from fpdm.noise import SAMPLE_INIT, SAMPLE_STEP, as_keys, normals
from fpdm.plan import Launch, bucket, groups
from fpdm.solvers import LAG, Best, Flag, Solver
from fpdm.weights import PROJECTION
from fpdm.workspace import Workspace

if TYPE_CHECKING:
    from fpdm.engine import Sampler


@dataclass(frozen=True)
class SampleStats:
    """``residual`` (S,K,B) fp32 = |f(x_j) - x_j| / |f(x_j)| of the conditional branch, per
    timestep, iteration and sample; NaN where an iteration was not run; K = 0 for a DiT and without
    statistics. ``iterations`` (S,G,B) int64 that every branch ran."""

    plan: budget.Plan
    residual: Tensor
    iterations: Tensor

    def __getitem__(self, part: slice) -> SampleStats:
        """Of the samples ``part``."""
        return SampleStats(self.plan, self.residual[..., part], self.iterations[..., part])


def initial_iterate(
    config: SamplerConfig,
    h: Tensor,
    solutions: Sequence[Tensor],
    gamma: float | Tensor | None = None,
) -> Tensor:
    """x*_0 (B,T,D) from h and the latest solutions, newest first, as the module's table says;
    ``gamma`` instead of ``config.reuse_gamma``."""
    if config.reuse == "none" or not solutions:
        return h
    if config.reuse == "blend":
        return torch.lerp(h, solutions[0], config.reuse_gamma if gamma is None else gamma)
    if config.reuse == "extrapolate" and len(solutions) > 1:
        return torch.lerp(solutions[0], solutions[1], -config.reuse_rho)
    return solutions[0]


class Run:
    """One batch on its way: walks the launch plan of ``sampler`` on ``workspace``, through the
    graphs of ``cache`` (None: eagerly).

    ``labels`` and ``seeds`` are of the B samples, at most the workspace's. ``stats``, of these
    samples, is filled. ``start`` (B,C,h,w) replaces the start noise of the seeds, ``step_noise``
    (S,B,C,h,w) the noise of every step.
    """

    def __init__(
        self,
        sampler: Sampler,
        workspace: Workspace,
        cache: graphs.GraphCache | None,
        labels: list[int],
        seeds: list[int],
        stats: SampleStats,
        start: Tensor | None,
        step_noise: Tensor | None,
    ):
        self.s, self.w, self.cache, self.count = sampler, workspace, cache, len(labels)
        c, device, b = sampler.model.config, sampler.device, len(labels)
        self.shape = (c.in_channels, c.input_size, c.input_size)
        self.stats, self.recorded = stats, stats.residual.shape[1] > 0
        null = [c.num_classes] * (b if sampler.guided else 0)
        w = workspace
        w.keys[:b] = as_keys(seeds).to(device)
        w.y[: b + len(null)] = torch.tensor(labels + null, dtype=torch.int64, device=device)
        w.x[:b] = normals(w.keys[:b], 0, 0, SAMPLE_INIT, self.shape) if start is None else start
        w.step.zero_()
        # the first step's coefficient of it is 0, which must not meet NaN
        w.x0.zero_()
        if w.watch is not None:
            for branch, total in enumerate(sampler.totals):
                w.watch.bank[branch * b : (branch + 1) * b] = total
        # from the host once, before the first launch
        self.step_noise = None if step_noise is None else step_noise.to(device, torch.float32)
        self.impl = implementations.choose(sampler.model.execution.impl, device, sampler.dtype)
        self.heads = c.num_heads
        self.block: BlockWeights | None = None
        if isinstance(sampler.model, FPDM):
            self.ops = implementations.resolve(self.impl, device, sampler.dtype)
            self.block = sampler.weights.block("block_fixed_point", injected=True)
            self.flag = Flag(w.watch.left) if w.watch is not None else None
        # one launch from tokens to the next timestep, where there is such a kernel
        self.fused: Any = None
        if self.block is not None and self.impl in implementations.TRITON:
            self.fused = importlib.import_module("fpdm.kernels.update")
        self.addresses: tuple[int, ...] = ()
        self.settings: tuple[Any, ...] = ()
        if cache is not None:
            self.settings = (self.recorded, *graphs.global_settings())
            positions = sampler.model.pos_embed.data_ptr()
            self.addresses = (positions, *graphs.addresses(sampler.weights))

    def execute(self, progress: Callable[[int], object] | None = None) -> Tensor:
        """Walk the launch plan; returns x_0 (B,C,h,w), which the next run overwrites."""
        for launch in self.s.launches:
            getattr(self, launch.op)(launch)
            if progress is not None and launch.op == "update":
                progress(self.count)
        return self.w.x[: self.count]

    def launch(
        self, piece: str, rows: int, variant: tuple[Any, ...], work: Callable[[], None]
    ) -> None:
        """Do ``work``, which depends on nothing but the key's entries and static buffers."""
        if self.cache is None:
            return work()
        return self.cache.run(self._key(piece, rows, variant), work)

    def _key(self, piece: str, rows: int, variant: tuple[Any, ...]) -> graphs.GraphKey:
        c, s = self.s.model.config, self.s
        return graphs.GraphKey(
            piece, rows, (*variant, *self.settings), (c.tokens, c.hidden_size),
            (s.dtype, self.w.z[0].dtype), str(s.device), self.impl, self.w.token, self.addresses,
        )  # fmt: skip

    @property
    def fpdm(self) -> FPDM:
        """The model; a DiT's launch plan asks for none of its parts."""
        assert isinstance(self.s.model, FPDM)
        return self.s.model

    def inputs(self, branches: int) -> Tensor:
        """x for every branch (G B,C,h,w)."""
        x = self.w.x[: self.count]
        return torch.cat([x, x]) if branches > 1 else x

    def tables(self, launch: Launch) -> None:
        """adaLN vectors of ``count`` timesteps at once: rows (timestep, branch, sample)."""
        model, w, n, weights = self.fpdm, self.w, launch.count, self.s.weights
        rows = launch.branches * self.count
        y = w.y[:rows]
        t = self.s.timesteps[launch.step : launch.step + n].repeat_interleave(rows)
        if model.config.pre_post_timestep_conditioning:
            mod = model.modulation(t, y.repeat(n), weights=weights)
            assert mod.fp is not None
            found = [mod.fp, *mod.pre, *mod.post, mod.final]
        else:
            found = [model.modulation_fp(t, y.repeat(n), weights=weights)]
            if launch.step == 0:
                run = model.modulation_pp(y, weights=weights)
                for vectors, value in zip(w.vectors[1:], [*run.pre, *run.post, run.final]):
                    vectors[:rows] = value
        for table, value in zip(w.tables, found):
            table[:n, :rows] = value.view(n, rows, -1)

    def encode(self, launch: Launch) -> None:
        """h, its injection, and the start of the iteration."""
        n = launch.branches * self.count
        self.launch("encode", n, (launch.branches, launch.start), partial(self._encode, launch, n))

    def _encode(self, launch: Launch, n: int) -> None:
        s, w, b = self.s, self.w, self.count
        slot = w.step % s.table_steps
        for vectors, table in zip(w.vectors, w.tables):
            vectors.copy_(table.index_select(0, slot)[0])
        h = self.fpdm.encode(self.inputs(launch.branches), w.modulation(n), weights=s.weights)
        self._inject(h, w.u[:n])
        gamma = None if s.gammas is None else s.gammas.index_select(0, w.step).to(h.dtype)
        for branch, known in enumerate(launch.start):
            rows = slice(branch * b, (branch + 1) * b)
            solutions = [x[rows] for x in w.solutions[:known]]
            w.z[0][rows] = initial_iterate(s.config, h[rows], solutions, gamma)
        w.j.zero_()
        if self.recorded:
            w.residual.fill_(math.nan)
        if w.watch is not None:
            k, kept = s.counts.index_select(0, w.step), s.reserves.index_select(0, w.step)
            reserve = kept[0, : launch.branches].repeat_interleave(b, output_size=n)
            stopping.begin(w.watch, n, k, reserve, s.plan.limit)

    def _inject(self, h: Tensor, out: Tensor) -> None:
        """u = E i + b1 into ``out``; folded, i is h."""
        weights, i = self.s.weights, h.to(out.dtype)
        with ops.no_autocast(out.device):
            if not weights.folded:
                i = self.ops.linear(i, *weights.linear(PROJECTION))
            self.ops.linear(i, *weights.injection(), out=out)

    def iterate(self, launch: Launch) -> None:
        """The solve: k iterations, or until every slot is done."""
        n = launch.branches * self.count
        if self.s.watched:
            self._watch(launch, n)
        else:
            for size in groups(launch.count, captured=self.cache is not None):
                self.launch("iterate", n, (size,), partial(self._group, n, size))
        b, w = self.count, self.w
        if self.recorded:
            self.stats.residual[launch.step] = w.residual[:, :b]
        used = w.watching.used[: launch.branches * b].view(-1, b) if w.watch else launch.count
        self.stats.iterations[launch.step, : launch.branches] = used

    def _group(self, n: int, size: int) -> None:
        """``size`` iterations from the first iterate buffer on."""
        w = self.w
        norms = w.norms[: size * 2 * n].view(size, 2, n) if self.recorded else None
        self._apply(n, 0, norms, size)
        if norms is not None:
            index = w.j + torch.arange(size, device=w.j.device)
            w.residual[:, :n].index_copy_(0, index, SolveStats.from_norms(norms).residual)
            w.j.add_(size)

    def _apply(self, n: int, parity: int, norms: Tensor | None, k: int = 1) -> None:
        """k iterations of the first n rows, from the iterate buffer ``parity`` to the other and
        back; ``norms`` (k,2,n)."""
        x, other, u, mod = self._operands(n, parity)
        assert self.block is not None
        with ops.no_autocast(x.device):
            iterate_forward(
                self.ops, x, (other, x), u, mod, self.block, self.heads, self.w.acts[:n], k, norms
            )

    def _operands(self, n: int, parity: int = 0) -> tuple[Tensor, ...]:
        """Of the first n rows: x, the buffer for f(x), u, modulation."""
        w = self.w
        return w.z[parity][:n], w.z[1 - parity][:n], w.u[:n], w.vectors[0][:n]

    def _watch(self, launch: Launch, rows: int) -> None:
        """Iterations until all slots are done, then what they hold to their rows."""
        w, watch, n, parity = self.w, self.w.watching, rows, 0
        if self._at_once(launch, rows):
            n = 0
        elif not self._loop(rows):
            n, parity = self._follow(launch, rows)
        stopping.collect(watch, torch.arange(n, device=w.j.device), w.z[parity])
        if self.s.plan.limit:
            watch.bank[:rows] -= watch.used[:rows]

    def _at_once(self, launch: Launch, n: int) -> bool:
        """The solve of n slots as one call on the host, collected, where that can be had."""
        w, block = self.w, self.block
        x, other, u, mod = self._operands(n)
        direct = self.s.solver is None and self.cache is None and LAG[x.device.type] == 0
        if block is None or not (direct and has_loop(self.ops, x.dtype, mod.dtype)):
            return False
        self.ops.solve(
            x, (other, x), u, mod, block, self.heads, w.acts[:n], self.s.most[launch.step],
            w.watching, self.s.tol, w.norms[: 2 * n].view(2, n),
            w.residual if self.recorded else None,
        )  # fmt: skip
        return True

    def _loop(self, n: int) -> bool:
        """The solve of n slots as one launch that ends on the device, where that can be had."""
        left = self.w.watching.left
        if self.cache is None or self.s.solver is not None or n > stopping.LOOP_ROWS:
            return False
        return self.cache.loop(
            self._key("solve", n, ()), lambda: left[0] > 0, partial(self._step, n, 0, 0)
        )

    def _follow(self, launch: Launch, n: int) -> tuple[int, int]:
        """The solve of n slots, one iteration after the other, the host following: at once and
        without slots that are done where shapes need no graph, else late and in buckets; with
        invariant all slots to the end, as a loop on the device has them. Returns how many slots are
        left, and in which iterate buffer."""
        w, parity, invariant = self.w, 0, self.s.config.invariant
        solver = None if self.s.solver is None else self.s.solver()
        best = None if solver is None else Best(w.z[0][:n])
        assert self.flag is not None
        exact = self.cache is None and self.flag.lag == 0 and not invariant
        for j in range(self.s.most[launch.step]):
            into = None if exact else 1 - parity
            if solver is None or best is None:
                self.launch("step", n, (parity,), partial(self._step, n, parity, into))
            else:
                self._step(n, parity, into, solver, best)
            parity = 1 - parity
            left = self.flag.read(j)
            if left == 0:
                break
            if left is None or invariant:
                continue
            if (size := left if exact else bucket(left)) < n:
                others = (w.u, w.vectors[0])
                stay = stopping.compact(w.watching, n, size, w.z[parity], others)
                n = len(stay)
                if solver is not None and best is not None:
                    solver.select(stay)
                    best.select(stay)
        return n, parity

    def _step(
        self,
        n: int,
        parity: int,
        into: int | None,
        solver: Solver | None = None,
        best: Best | None = None,
    ) -> None:
        """One iteration of n slots, its residuals, and who is done. The iterates go to the buffer
        ``into``; None: no slot was done before, they are where f was written."""
        w, watch = self.w, self.w.watching
        norms = w.norms[: 2 * n].view(1, 2, n)
        self._apply(n, parity, norms)
        src, dst, *_ = self._operands(n, parity)
        r = SolveStats.from_norms(norms).residual[0]
        if self.recorded:
            place = watch.place[:n]
            told = r if into is None else torch.where(watch.done[:n], math.nan, r)
            w.residual.view(-1).index_copy_(0, place, told)
            place.add_(w.residual.shape[1])
        if solver is None or best is None:
            out = None if into is None else w.z[into][:n]
            stopping.decide(watch, n, r, self.s.tol, src, dst, out)
        else:
            stopping.propose(watch, n, r, self.s.tol, src, dst, solver, best)

    def update(self, launch: Launch) -> None:
        """Prediction, guidance and the step to the next timestep."""
        n = launch.branches * self.count
        noisy = self.s.table.random[launch.step]
        if self.step_noise is not None:
            self.w.noise[: self.count] = self.step_noise[launch.step]
        variant = (launch.branches, launch.count % 2, noisy, self.step_noise is not None)
        self.launch("update", n, variant, partial(self._update, launch, n, noisy))

    def predict(self, x: Tensor, step: int) -> Tensor:
        """The guided output (B,2C,h,w) at x (B,C,h,w) in row ``step`` of the plan, for whoever
        steps on in place of ``update``. Rows are to be asked for in their order."""
        self.w.x[: self.count] = x
        *before, update = (launch for launch in self.s.launches if launch.step == step)
        for launch in before:
            getattr(self, launch.op)(launch)
        out = self._output(update, update.branches * self.count)
        self.w.step.add_(1)
        return out

    def _output(self, launch: Launch, n: int) -> Tensor:
        """The guided output of n rows (B,2C,h,w) fp32; their solutions become the latest."""
        s, w = self.s, self.w
        if isinstance(s.model, FPDM):
            out = s.model.unpatchify(self._tokens(s.model, launch, n)).float()
        else:
            t = s.timesteps.index_select(0, w.step).expand(n)
            out = s.model(self.inputs(launch.branches), t, w.y[:n], weights=s.weights).float()
        if launch.branches == 1:
            return out
        cond, null = out.chunk(2)
        g = s.guidance
        return steps.guide(cond, null, g.scale, g.channels, g.rescale)

    def _tokens(self, model: FPDM, launch: Launch, n: int) -> Tensor:
        """Tokens of the output of n rows (n,T,p p 2C); their solutions become the latest."""
        s, w = self.s, self.w
        final = (w.watch.result if w.watch else w.z[launch.count % 2])[:n]
        tokens = model.decode_tokens(final, w.modulation(n), weights=s.weights)
        for old, new in zip(w.solutions[:0:-1], w.solutions[-2::-1]):
            old[:n] = new[:n]
        if w.solutions:
            w.solutions[0][:n] = final
        return tokens

    def _update(self, launch: Launch, n: int, noisy: bool) -> None:
        s, w, b = self.s, self.w, self.count
        # where a step adds none, 0 times what was given could still be NaN
        given = noisy and self.step_noise is not None
        x, before = w.x[:b], w.x0[:b] if s.table.multistep else None
        noise = w.noise[:b] if given else None
        if self.fused is not None:
            self.fused.update_(
                self._tokens(self.fpdm, launch, n), x, s.rows, w.step, s.model.config.patch_size,
                s.guidance if launch.branches > 1 else None,
                w.keys[:b] if noisy and not given else None, SAMPLE_STEP, noise, before,
            )  # fmt: skip
        else:
            out = self._output(launch, n)
            if noisy and not given:
                noise = normals(w.keys[:b], w.step, 0, SAMPLE_STEP, self.shape)
            row = s.rows.index_select(0, w.step)[0]
            last = None
            if before is not None:
                last = before.clone()
                before.copy_(steps.denoised(x, out, row))
            x.copy_(steps.step(x, out, row, noise, last))
        w.step.add_(1)
