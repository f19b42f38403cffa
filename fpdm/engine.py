"""The sampling engine: a plan of (timestep, iterations), a list of launches, one loop to walk it.

    x_S ~ N(0, I) from the sample's seed;  for every (t, k) of the plan:
        h = Pre(x);  x*_0 from h and the reused solution;  x*_k = f^k(x*_0);  o = Final(Post(x*_k))
        o = guide(o[cond], o[null]);  x = step(x, o, z)                     z from the sample's seed

Shapes: x (B,C,h,w) fp32; h, x* (G B,T,D) with G = 2 branches where guided (cond first), else 1.
With ``tol`` a sample's iteration ends when its relative residual does (fpdm.stopping).

The launches read and write the static buffers of one workspace; a CPU executes them, on a GPU
fpdm.graphs captures and replays them. Everything a run changes lives in a ``Run`` (fpdm.run) and
its workspace; a sampler whose workspace is taken (by another thread, or from within ``progress``)
runs on one of the run's own, eagerly. Nothing here waits for the device, except that under ``tol``
the host follows the iterations at the distance that fpdm.stopping describes.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fpdm import budget, graphs, solvers, steps
from fpdm.config import ConfigError, SamplerConfig
from fpdm.diffusion import Diffusion
from fpdm.kernels import ops
from fpdm.model import FPDM, DiT
from fpdm.plan import launches, most_iterations, reserves
from fpdm.run import Run, SampleStats
from fpdm.settings import integer
from fpdm.solvers import Solver
from fpdm.weights import PreparedWeights
from fpdm.workspace import Sizes, Workspace

TABLE_BYTES = 64 << 20  # of adaLN vectors computed ahead, for several timesteps at once
KEPT = {"none": 0, "full": 1, "blend": 1, "extrapolate": 2}


@dataclass(frozen=True)
class Samples:
    """x (B,C,h,w) fp32 and what its making cost."""

    x: Tensor
    stats: SampleStats


def check_labels(labels: Sequence[int] | Tensor, num_classes: int) -> list[int]:
    """``labels``, a sequence or a tensor (B,), as integers in 0..num_classes-1. Raises ConfigError
    that names the first that is not."""
    return _integers("labels", labels, num_classes - 1)


def _integers(name: str, given: Sequence[int] | Tensor, most: int) -> list[int]:
    """``given`` as integers in 0..``most``. Raises ConfigError that names the first that is not."""
    expected = f"expected integers 0..{'2^64 - 1' if most == 2**64 - 1 else most}"
    try:
        values = list(given.tolist() if isinstance(given, Tensor) else given)
    except TypeError:
        raise ConfigError(f"{name}: got {given!r}, {expected}") from None
    found = []
    for value in values:
        number = integer(value)
        if number is None or not 0 <= number <= most:
            raise ConfigError(f"{name}: got {value!r}, {expected}")
        found.append(number)
    return found


def check_seeds(seeds: Sequence[int] | Tensor, count: int) -> list[int]:
    """``seeds``, a sequence or a tensor, as ``count`` integers in [0, 2^64). Raises ConfigError for
    another number of them, and names the first that is no such integer."""
    found = _integers("seeds", seeds, 2**64 - 1)
    if len(found) != count:
        raise ConfigError(f"seeds: got {len(found)} for {count} labels, expected one per label")
    return found


class Sampler:
    """Samples of ``model`` under ``diffusion`` as ``config`` asks.

    ``weights`` (compute dtype ``config.dtype``) are prepared and folded here unless given. Casts
    and folds are a snapshot: when the model's parameters change in any way, ``weights.refresh()``
    or a new Sampler is due. A sample is a function of its seed and label: the same in any batch and
    shard, up to rounding, and bit for bit with ``config.invariant``, which runs every sample alone
    (its two branches together) at the cost of the batch's efficiency.
    ``calibration`` is what allocation learned needs. ``solver`` makes the solver of one solve in
    place of ``config.solver``; with any but the plain iteration a sample returns its best iterate.
    ``timesteps``, descending, replace ``config.steps`` and ``config.spacing``. ``plan`` says what
    will run and what it costs (budget.Plan).

    With CUDA graphs the sampler keeps one workspace and its graphs until ``release()``; otherwise
    nothing outlives a call. Raises ConfigError for settings that cannot be met.
    """

    def __init__(
        self,
        model: FPDM | DiT,
        diffusion: Diffusion,
        config: SamplerConfig,
        weights: PreparedWeights | None = None,
        calibration: budget.Calibration | None = None,
        solver: Callable[[], Solver] | None = None,
        timesteps: Sequence[int] = (),
    ):
        # torch.compile wraps: what it would compile is not called here
        model = getattr(model, "_orig_mod", model)
        if not isinstance(model, FPDM | DiT):
            raise ConfigError(f"model: got {type(model).__name__}, expected an FPDM or a DiT")
        if timesteps:
            config = replace(config, steps=len(timesteps))
        channels = model.config.in_channels
        if (config.guidance_channels or 1) > channels:
            raise ConfigError(
                f"sample.guidance_channels: got {config.guidance_channels}, expected 1..{channels}"
            )
        self.model, self.diffusion, self.config = model, diffusion, config
        self.device, self.dtype = model.pos_embed.device, getattr(torch, config.dtype)
        self.solver = solver
        if solver is None and (config.solver != "picard" or config.damping != 1.0):
            self.solver = partial(solvers.make, config.solver, config.window, config.damping)
        self.weights = weights or PreparedWeights(model, self.dtype, fold=True)
        if not self.weights.belongs_to(model):
            raise ConfigError("weights: got those of another model, expected this model's")
        if self.weights.dtype != self.dtype:
            raise ConfigError(
                f"sample.dtype: got {self.dtype}, expected the weights' {self.weights.dtype}"
            )
        folded = self.weights.folded or model.config.kind == "dit"
        self.plan = budget.plan(
            model.config, config, diffusion.config, folded, calibration, timesteps
        )
        self.guided = max(self.plan.branches) > 1
        self.guidance = steps.Guidance(
            config.guidance, config.guidance_channels or channels, config.guidance_rescale
        )
        self.batch = 1 if config.invariant else config.batch
        self.tol = config.tol
        _warn_of_rounding(config.tol, self.dtype, self._residual_dtype())
        # adaptive counts what every sample has left, also where no residual reaches tol
        counted = self.tol > 0 or self.plan.limit > 0 or self.solver is not None
        self.watched = model.config.kind == "fpdm" and counted
        self._make_tables()
        ks = [k for _, k in self.plan.steps]
        self.most = most_iterations(ks, self.plan.limit) if self.plan.limit else ks
        self.table_steps = self._table_steps()
        self.launches = launches(ks, self.plan.branches, self.table_steps, KEPT[config.reuse])
        self.graphs = graphs.cache_for("sample.graphs", config.graphs, self.device)
        self._kept: Workspace | None = None
        self._taken = threading.Lock()
        self._owner: int | None = None  # the thread that took it
        self.mark()  # tables and casts may be on their way still

    def _make_tables(self) -> None:
        """What the launches look up by step, on the device."""
        config, device = self.config, self.device
        timesteps = [t for t, _ in self.plan.steps]
        self.timesteps = torch.tensor(timesteps, device=device)
        ks, branches = [k for _, k in self.plan.steps], self.plan.branches
        self.counts = torch.tensor(ks, device=device)
        self.reserves = torch.tensor(reserves(ks, branches), device=device)
        # iterations that every branch may run in all
        self.totals = [sum(k for k, c in zip(ks, branches) if b < c) for b in range(max(branches))]
        self.table = steps.build_table(self.diffusion, timesteps, config.method, config.eta)
        self.rows = self.table.rows(device)
        last, end = self.diffusion.config.timesteps - 1, config.reuse_gamma_end
        self.gammas = None
        if end is not None:
            values = [end + (config.reuse_gamma - end) * t / last for t in timesteps]
            self.gammas = torch.tensor(values, device=device)

    def _table_steps(self) -> int:
        """Timesteps whose modulations fit in TABLE_BYTES, at least one."""
        c = self.model.config
        width = 6 * c.hidden_size
        if c.pre_post_timestep_conditioning:
            width = (6 * (1 + c.pre_depth + c.post_depth) + 2) * c.hidden_size
        row_bytes = self.batch * (2 if self.guided else 1) * width * self.dtype.itemsize
        return max(1, min(len(self.plan.steps), TABLE_BYTES // row_bytes))

    def _residual_dtype(self) -> torch.dtype:
        """What iterates are stored in."""
        model = self.model
        return model.residual_dtype(self.weights) if isinstance(model, FPDM) else self.dtype

    def sizes(self, count: int) -> Sizes:
        """What a run of ``count`` samples needs."""
        residual = self._residual_dtype()
        return Sizes(
            min(count, self.batch), 2 if self.guided else 1, max(self.most), self.table_steps,
            KEPT[self.config.reuse], self.watched, self.dtype, residual, self.device,
        )  # fmt: skip

    def release(self) -> None:
        """Give back the workspace and the graphs that outlive a call, once no call runs; they are
        made again when needed. Raises ConfigError from within ``progress``."""
        if self._owner == threading.get_ident():
            raise ConfigError("release: got it within a call of this sampler, expected it after")
        with self._taken:
            self._forget()

    @torch.no_grad()
    def sample(
        self,
        labels: Sequence[int] | Tensor,
        seeds: Sequence[int] | Tensor,
        noise: Tensor | None = None,
        step_noise: Tensor | None = None,
        progress: Callable[[int], object] | None = None,
        stats: bool = True,
    ) -> Samples:
        """One image per (label, seed).

        noise (B,C,h,w) replaces the start noise, step_noise (S,B,C,h,w) the noise of every step.
        ``progress`` is called with the number of samples that were advanced by one timestep
        (launched, not necessarily finished). Without ``stats`` no residual is kept, and none
        is computed unless ``tol`` needs it. Raises ConfigError for bad labels, seeds or shapes, and
        for a batch that does not fit into memory.
        """
        y = check_labels(labels, self.model.config.num_classes)
        keys = check_seeds(seeds, len(y))
        c = self.model.config
        shape = (len(y), c.in_channels, c.input_size, c.input_size)
        _check_shape("noise", noise, shape)
        _check_shape("step_noise", step_noise, (len(self.plan.steps), *shape))
        x = torch.empty(shape, dtype=torch.float32, device=self.device)
        found = self.statistics(len(y), stats)
        mine = self._taken.acquire(blocking=False)
        if mine:
            self._owner = threading.get_ident()
        try:
            # the caller's autocast must reach neither a captured launch nor a solver
            with ops.no_autocast(self.device):
                self.wait()
                workspace = self._workspace(len(y), mine)
                for start in range(0, len(y), self.batch):
                    part = slice(start, min(start + self.batch, len(y)))
                    run = Run(
                        self, workspace, self.graphs if mine else None, y[part], keys[part],
                        found[part], None if noise is None else noise[part],
                        None if step_noise is None else step_noise[:, part],
                    )  # fmt: skip
                    x[part] = run.execute(progress)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            if mine:
                self._forget()
            raise ConfigError(self._too_large(len(y))) from error
        finally:
            if mine:
                self.mark()
                self._owner = None
                self._taken.release()
        return Samples(x, found)

    def mark(self) -> None:
        """Records, on the current stream, the end of all work launched for this sampler so far."""
        self._free = _now(self.device)

    def wait(self, buffers: Sequence[Tensor] = ()) -> None:
        """Makes the current stream wait for the work of the last call, which may have been on
        another one. ``buffers`` outlive the call: they are not reused before this stream is done
        with them."""
        if self._free is not None:
            self._free.wait()
        if buffers:
            _hold(buffers)

    def statistics(self, count: int, residuals: bool) -> SampleStats:
        """Statistics of ``count`` samples, still empty; no residuals unless ``residuals``."""
        s, branches = len(self.plan.steps), max(self.plan.branches)
        size = (s, max(self.most) if residuals else 0, count)
        residual = torch.full(size, math.nan, dtype=torch.float32, device=self.device)
        iterations = torch.zeros((s, branches, count), dtype=torch.int64, device=self.device)
        return SampleStats(self.plan, residual, iterations)

    def _workspace(self, count: int, mine: bool) -> Workspace:
        """The kept workspace if it is this call's, large enough and of the dtypes that the model
        asks for now, else a new one, which replaces it (and makes its graphs useless)."""
        config, sizes = self.model.config, self.sizes(count)
        if not mine or self.graphs is None:
            return Workspace.allocate(config, sizes)
        kept = self._kept
        if (
            kept is None
            or kept.sizes.batch < sizes.batch
            or replace(kept.sizes, batch=sizes.batch) != sizes
        ):
            self._forget()
            # it outlives the caller's inference mode, outside of which it could not be written
            with torch.inference_mode(False):
                kept = self._kept = Workspace.allocate(config, sizes)
        _hold(kept.tensors())
        return kept

    def _forget(self) -> None:
        self._kept = None
        if self.graphs is not None:
            self.graphs.clear()

    def _too_large(self, count: int) -> str:
        sizes = replace(self.sizes(count), device=torch.device("meta"))
        need = Workspace.allocate(self.model.config, sizes).nbytes() / 2**30
        return (
            f"sample.batch: got {sizes.batch}, expected less: out of memory on {self.device} "
            f"({need:.3g} GiB for the batch beside the weights)"
        )


def _is_out_of_memory(error: RuntimeError) -> bool:
    """On a GPU torch has a class for it, on a CPU a message."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _now(device: torch.device) -> torch.cuda.Event | None:
    """An event after everything launched so far on the current stream; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _hold(buffers: Sequence[Tensor]) -> None:
    """Tells the allocator that the current stream uses ``buffers``: once freed, they are handed out
    again only when that stream has passed this point."""
    for buffer in buffers:
        if buffer.is_cuda:
            buffer.record_stream(torch.cuda.current_stream(buffer.device))


def _warn_of_rounding(tol: float, dtype: torch.dtype, iterate: torch.dtype) -> None:
    """An iterate that is stored in ``dtype`` keeps a residual of its rounding: 0.32 to 0.52 eps in
    98 of 100 samples of the shipped model, in bfloat16 and in float16. One in float32 is still made
    of products in ``dtype``: at 0.38 eps no sample of bfloat16 is left at its cap, at 0.13 all."""
    least = torch.finfo(dtype).eps / (2 if iterate == dtype else 4)
    if 0 < tol < least:
        warnings.warn(
            f"sample.tol: got {tol:g}, expected about {least:.2g} or more in {dtype}: rounding "
            "keeps most residuals above it, and those samples run to their cap",
            stacklevel=3,
        )


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ConfigError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")
