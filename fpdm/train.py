"""Training with stochastic Jacobian-free backpropagation (paper section 3.3).

    python -m fpdm.train RECIPE [--section.key value]        plain, or under torchrun

One step: for every micro-batch draw (n, m), for every sample t, noise, label dropout and flip; run
the model n iterations without and m with gradient; sum the gradients of the global batch; AdamW and
EMA. Everything random is a function of (seed, step, slot in the global batch), and (n, m) of (seed,
step, micro-batch): a resumed run is the same run, on another number of ranks the same to rounding.

A signal is agreed by all ranks at the end of a step, which is then saved. The exit status is 128
plus its number, as of a program that it ends; under torchrun, which would call that a failure, 0.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpdm import __version__, checkpoint, figures
from fpdm.batches import Loader, Micro, draw_iterations, draw_samples
from fpdm.checks import check_alike, check_data, check_machine, check_same, too_large
from fpdm.cli import run_main
from fpdm.config import Config, ConfigError, Impl, UserError, to_dict, to_yaml
from fpdm.data import open_dataset
from fpdm.diffusion import Diffusion
from fpdm.distributed import Ranks, StopFlag
from fpdm.engine import Sampler
from fpdm.exports import export
from fpdm.kernels import implementations
from fpdm.microstep import MicroStep
from fpdm.model import FPDM, build_model
from fpdm.optim import AdamWEMA, LossScaler, learning_rate
from fpdm.process import lasting_output
from fpdm.recipes import load_config
from fpdm.runlog import Progress, RunDirectory, Window, described, export_extra
from fpdm.settings import flat, one_line
from fpdm.start import begin_with, class_names, settled
from fpdm.weights import PreparedWeights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRID_CLASSES = 10


@dataclass
class Counters:
    """Bad steps so far, and in a row."""

    skipped: int = 0
    in_a_row: int = 0


class Trainer:
    """A training run as ``config`` describes it; ``run`` starts or resumes it.

    Raises ConfigError, DataError or CheckpointError (all ``UserError``) for what the user can mend.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.stop = StopFlag()
        self.directory = RunDirectory(
            Path(config.train.out) / (config.train.name or config.recipe or "run")
        )
        self.step = self.saved = 0
        self.window, self.counters = Window(), Counters()
        self._last: dict[str, float] = {}
        self._losses: list[tuple[Sequence[int], Tensor]] = []
        self._announced = self.finished = False

    def run(self) -> int:
        """Trains to the end or to a signal; returns the number of steps done in all."""
        main_thread = threading.current_thread() is threading.main_thread()
        if main_thread:
            self.stop.install()
        try:
            self.ranks = Ranks(self.config.train.device, self.config.train.ddp_timeout_s)
            self._build_together()
            self._share()
            # the two flags of _advance: a bad step, a signal
            with self.ranks.telling(2):
                self._open_log()
                self.finished = self._loop()
                if self.finished and self.ranks.rank == 0:
                    self._finish()
            self.ranks.close()
            return self.step
        finally:
            with contextlib.ExitStack() as closing:
                if main_thread:
                    closing.callback(self.stop.restore)
                closing.callback(self.directory.close)
                for part in ("progress", "loader"):
                    if hasattr(self, part):
                        closing.callback(getattr(self, part).close)

    def _build_together(self) -> None:
        failure: Exception | None = None
        try:
            self._build()
        except Exception as error:
            failure = error
        self.ranks.agree(failure)

    def _build(self) -> None:
        device = self.ranks.device
        check_machine(self.config, self.ranks.world, device)
        self.data = open_dataset(self.config.data)
        self.config = config = settled(self.config, self.data)
        self.classes = class_names(config.data, self.data)
        check_data(config, self.data)
        precision = config.train.precision
        self.impl = self._choose(DTYPES[precision], f"train.precision = {precision}")
        # named from here on: no part of the run may take another
        model = build_model(config.model, replace(config.execution, impl=self.impl))
        model.initialize(torch.Generator().manual_seed(config.train.seed))
        if self.ranks.rank == 0:
            self.begun = begin_with(model, config, self.directory.checkpoints)
        self.model = model.to(device)
        self.diffusion = Diffusion(config.diffusion, device=str(device))
        self.prepared = PreparedWeights(self.model, DTYPES[config.train.precision], accumulate=True)
        self.optimizer = AdamWEMA(self.model, config.optim, self.prepared)
        self.micro = MicroStep(self.model, self.diffusion, self.prepared, config, device)
        t = config.train
        self.scaler = (
            LossScaler(t.scale_init, t.scale_growth_interval, t.scale_floor)
            if t.precision == "fp16"
            else LossScaler(1.0, sys.maxsize, 1.0)
        )
        self.sampler = self._sampler()
        if self.ranks.rank == 0:
            # only now: a start that is refused leaves no empty directories
            self.directory.prepare()
            self._resume()
        self.loader = Loader(self.data, config, self.ranks)

    def _choose(self, dtype: torch.dtype, setting: str) -> Impl:
        """The implementation for ``dtype``, which ``setting`` wants."""
        try:
            return implementations.choose(self.config.execution.impl, self.ranks.device, dtype)
        except implementations.ImplError as error:
            told = str(error).replace("impl: ", "execution.impl: ", 1)
            raise implementations.ImplError(f"{told} ({setting})") from error

    def _sampler(self) -> Sampler:
        """Of the grids; made before the first step, so that what cannot be met is refused then.

        It shares the parameters, not the implementation: ``auto`` is chosen for its own dtype.
        """
        config, seen = self.config, copy.copy(self.model)
        wanted = config.sample.dtype
        impl = self._choose(getattr(torch, wanted), f"sample.dtype = {wanted}, of the grids")
        seen.execution = replace(config.execution, impl=impl)
        return Sampler(seen, self.diffusion, config.sample)

    def _resume(self) -> None:
        root = self.directory.checkpoints
        if self.config.train.resume == "never" and checkpoint.any_under(root):
            raise ConfigError(
                f"train.resume: got never, but {self.directory.root} holds checkpoints; expected "
                "resume=auto or another train.name"
            )
        found = checkpoint.load_newest(root, report=print)
        if found is not None:
            world = self.ranks.world
            check_same(found.meta, self.config, self.data, world, found.path)
            self.optimizer.load_state(found.tensors)
            self._restore(found.meta["state"])
            self.begun = found.meta.get("init")
            total = self.config.train.steps
            print(f"resumed {found.path}: step {self.step} of {total}", flush=True)
        elif self.directory.metrics.exists():
            print(f"no checkpoint under {root}: the run begins anew, its rows too", flush=True)
        self.directory.keep_until(self.step)
        self.saved = self.step
        self.directory.write_config(to_yaml(self.config), found is not None)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "scaler": asdict(self.scaler),
            "window": asdict(self.window),
            "counters": asdict(self.counters),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.step, s = state["step"], state["scaler"]
        self.scaler.scale, self.scaler.good = s["scale"], s["good"]
        self.scaler.floor_hits = s["floor_hits"]
        self.window, self.counters = Window(**state["window"]), Counters(**state["counters"])

    def _share(self) -> None:
        """Everybody continues from rank 0's state: only rank 0 reads checkpoints."""
        if self.ranks.world == 1:
            return
        check_alike(self.ranks, self.config, self.data.fingerprint)
        state, groups = self._state(), self.optimizer.state()
        mine = flat(state)
        packed = torch.tensor(list(mine.values()), dtype=torch.float64)
        self.ranks.broadcast_([packed, *(t for g in groups.values() for t in g.values())])
        self.optimizer.load_state(groups)
        for (name, old), value in zip(mine.items(), packed.tolist()):
            part, _, key = name.rpartition(".")
            (state[part] if part else state)[key] = type(old)(value)
        self._restore(state)

    def _open_log(self) -> None:
        shown = self.ranks.rank == 0
        if shown:
            told = described(self.config, self.model, self.data, self.ranks)
            print(f"{self.directory.root}: {told}", flush=True)
        self.progress = Progress(self.config, self.directory, self.ranks.device, self.step, shown)
        implementations.reset_counters()
        if shown and self._grid_due(self.step) and not self.directory.sample(self.step).exists():
            self._grid()

    def _loop(self) -> bool:
        """True at the end of the run, False after a signal."""
        train = self.config.train
        while self.step < train.steps:
            signum = self._advance()
            if self.ranks.rank == 0:
                self._after_step(signum)
            if signum:
                return False
        return not self.stop.signum

    def _advance(self) -> int:
        """One step on all ranks; returns the agreed signal number."""
        with self._kept():
            found, bad, norm, signum = self._agreed_gradients()
        if found:
            self._skip(bad)
        else:
            self._update(norm)
        self.step += 1
        self._row_if_due()
        self._check_nonfinite()
        return signum

    def _agreed_gradients(self) -> tuple[int, bool, float, int]:
        """The step's gradients, summed over the ranks: whether some rank's are bad, whether this
        one's are, their norm, and the agreed signal number. Changes no parameter."""
        failure: Exception | None = None
        bad, norm = True, math.nan
        try:
            norm = self._gradients()
            bad = not (math.isfinite(norm) and bool(self.optimizer.tail[:3].isfinite().all()))
        except torch.OutOfMemoryError as error:
            without_graphs = self.micro.graphs is None
            failure = ConfigError(
                too_large(self.config, self.ranks.device, self.step + 1, without_graphs, error)
            )
        except Exception as error:
            failure = error
        found, signum = self.ranks.agree(failure, int(bad), self.stop.signum)
        if not found and self.ranks.world > 1:
            self.ranks.sum_(self.optimizer.buffer)
            norm = self.optimizer.grad_norm()
            found = int(not math.isfinite(norm))  # the same bits, so the same answer, on every rank
        return found, bad, norm, signum

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """An error inside, where no parameter changes, comes after what was trained before it is
        saved: the error may come back, hours of good steps do not."""
        window = replace(self.window)
        try:
            yield
        except Exception:
            self.window = window
            if self.ranks.rank == 0 and self.step != self.saved:
                try:
                    self.save()
                    told = f"saved step {self.step}, the last before the error, in {self._saved}"
                except Exception as error:  # a device that is lost gives nothing back
                    told = f"step {self.step} could not be saved: {one_line(error)}"
                self.progress.say(told)
            raise

    def _gradients(self) -> float:
        """The step's gradients, into the optimiser's buffer; their norm. A step that finds no
        memory beside the graphs of ``train.graphs=auto`` is computed again without them."""
        window = replace(self.window)
        for last in (False, True):
            self.optimizer.zero_grad()
            try:
                self.local_step(self.step)
                break
            except torch.OutOfMemoryError:
                if last or not self.micro.leave_graphs("out of memory beside them"):
                    raise
            self.window = replace(window)
        return self.optimizer.grad_norm()

    def local_step(self, step: int) -> None:
        """Leaves the rank's share of the gradients (times the loss scale) and of the means of loss,
        mse, vb and residual in the optimiser's buffer."""
        seed, self._losses = self.config.train.seed, []
        for a, micro in enumerate(self.loader.get(step)):
            n, m = draw_iterations(seed, step, a, self.config.fixed_point, self.ranks.rank)
            self.window.micro += 1
            self.window.n += n
            self.window.m += m
            rows = self._micro_step(step, micro, n, m)
            self.optimizer.tail[:4] += rows.sum(1) / self.config.train.batch
            self._losses.append((micro.ids, rows[0]))

    def _micro_step(self, step: int, micro: Micro, n: int, m: int) -> Tensor:
        train, device = self.config.train, self.ranks.device
        x0 = micro.x.to(device, non_blocking=True)
        y = micro.y.to(device, non_blocking=True)
        draws = draw_samples(
            train.seed, step, micro.slots, x0, y, self.config.diffusion.timesteps,
            train.label_dropout, self.config.model.num_classes,
        )  # fmt: skip
        scale = self.scaler.scale / train.batch
        return self.micro(x0, draws, n, m, scale, self._row_due(step + 1))

    def _update(self, norm: float) -> None:
        optim, scale = self.config.optim, self.scaler.scale
        multiplier = 1.0 / scale
        if optim.clip_norm is not None:
            multiplier *= min(1.0, optim.clip_norm / (norm / scale + 1e-6))
        lr = learning_rate(optim, self.step, self.config.train.steps)
        self.optimizer.step(lr, multiplier)
        self.scaler.update(False)
        self.counters.in_a_row = 0
        loss, mse, vb, residual = self.optimizer.tail[:4].tolist()
        w = self.window
        w.good, w.loss, w.mse, w.vb = w.good + 1, w.loss + loss, w.mse + mse, w.vb + vb
        self._last = {"residual": residual, "grad_norm": norm / scale, "lr": lr}

    def _skip(self, mine: bool) -> None:
        """Changes nothing but the loss scale; the rank that caused it says which samples."""
        self.scaler.update(True)
        self.counters.skipped += 1
        self.counters.in_a_row += 1
        self._last = {}
        if mine:
            pairs = [pair for ids, loss in self._losses for pair in zip(ids, loss.tolist())]
            ids = [i for i, value in pairs if not math.isfinite(value)]
            row = {
                "step": self.step + 1, "rank": self.ranks.rank, "ids": ids,
                "cause": "loss" if ids else "gradient", "scale": self.scaler.scale,
            }  # fmt: skip
            self.directory.append(self.directory.nonfinite, row)
            what = f"loss of samples {ids[:8]}" if ids else "gradient"
            self.progress.say(
                f"step {self.step + 1}: skipped on all ranks, non-finite {what} on rank "
                f"{self.ranks.rank}; loss scale {self.scaler.scale:g}"
            )

    def _check_nonfinite(self) -> None:
        """Ends a run that no longer learns; there is nothing new to save."""
        limit, floor = self.config.train.max_nonfinite, self.scaler.floor_hits
        if self.counters.in_a_row < limit and floor < limit:
            return
        where = f"{self.counters.in_a_row} non-finite steps in a row"
        if self.counters.in_a_row < limit:
            where = f"{floor} non-finite steps at the lowest loss scale {self.scaler.floor:g}"
        raise UserError(
            f"step {self.step}: {where}, expected fewer than train.max_nonfinite = {limit}; see "
            f"{self.directory.nonfinite}; the newest checkpoint is from before"
        )

    def _row_due(self, step: int) -> bool:
        return step % self.config.train.log_every == 0 or step == self.config.train.steps

    def _grid_due(self, step: int) -> bool:
        every = self.config.train.grid_every
        return step == self.config.train.steps or (every > 0 and step > 0 and step % every == 0)

    def _row_if_due(self) -> None:
        if not self._row_due(self.step):
            return
        w, self.window = self.window, Window()
        if self.ranks.rank:
            return
        means = w.row(self._last, looped=isinstance(self.model, FPDM))
        skipped = self.counters.skipped
        row = {"step": self.step, **means, "scale": self.scaler.scale, "skipped": skipped}
        self.directory.append(self.directory.metrics, row)
        self.progress.row(row)

    def _after_step(self, signum: int) -> None:
        train, step = self.config.train, self.step
        self.progress.step()
        if not self._announced:
            self._announce()
        if signum or step == train.steps or (train.save_every and step % train.save_every == 0):
            self.save()
        if signum:
            self.progress.say(
                f"{signal.Signals(signum).name}: saved step {step} of {train.steps} in "
                f"{self._saved}; start again to resume"
            )
        elif self._grid_due(step):
            with self._kept():
                self._grid()

    def save(self) -> None:
        """Writes and verifies a checkpoint of this step."""
        versions = {"fpdm": __version__, "torch": torch.__version__}
        meta = {
            "config": to_dict(self.config),
            "data": self.data.fingerprint,
            "init": self.begun,
            "classes": self.classes,
            "state": self._state(),
            "versions": versions | {"python": platform.python_version()},
            "ranks": self.ranks.world,
        }
        keep = self.config.train.keep
        root = self.directory.checkpoints
        self._saved = checkpoint.save(root, self.step, self.optimizer.state(), meta, keep)
        self.saved = self.step

    def _grid(self) -> None:
        """Samples of the average, rows are classes; fixed seeds and labels make grids comparable.

        A signal abandons it: the grid is drawn again when the run resumes at this step.
        """
        model, train = self.config.model, self.config.train
        rows = min(model.num_classes, GRID_CLASSES)
        classes = [i * model.num_classes // rows for i in range(rows)]
        labels = [c for c in classes for _ in range(train.grid_per_class)]
        drawn: list[Tensor] = []

        def draw() -> None:
            self.sampler.weights.refresh()
            drawn.append(self.sampler.sample(labels, seeds=range(len(labels))).x)

        self._announce()
        implementations.reset_counters()
        with self.optimizer.swapped():
            self.stop.interruptible(draw)
        self.sampler.release()
        implementations.ran(self.sampler.model.execution.impl)
        implementations.reset_counters()
        if drawn:
            bad = int((~drawn[0].flatten(1).isfinite().all(1)).sum())
            if bad:
                self.progress.say(f"step {self.step}: {bad} images of the grid hold NaN or Inf")
            # of latents the first three channels are shown as they are
            x = drawn[0][:, :3] if model.in_channels > 2 else drawn[0][:, :1]
            path = self.directory.sample(self.step)
            figures.save_grid(x, path, train.grid_per_class, labels=classes)

    def _announce(self) -> None:
        """Says which implementation ran every operator; raises ImplError if one is another than
        announced. A run that was at its end already has run none."""
        told = implementations.ran(self.impl)
        if told and not self._announced:
            self.progress.say(f"operators on {self.ranks.device}: {told}")
            self._announced = True

    def _finish(self) -> None:
        self._announce()
        self.progress.close()
        export(
            self.directory.export, self.config.model, self.optimizer.ema_state_dict(),
            which="ema", diffusion=self.config.diffusion,
            extra=export_extra(self.config, self.step)
            | {"init": self.begun, "classes": self.classes},
        )  # fmt: skip
        # after what nothing can replace
        drawn = figures.plot_history(self.directory.metrics, self.directory.curves)
        curves = f"curves {self.directory.curves}, " if drawn else ""
        print(
            f"done: {self.step} steps; samples {self.directory.sample(self.step)}, {curves}"
            f"export (EMA) {self.directory.export}",
            flush=True,
        )


def main(argv: list[str]) -> int:
    """``fpdm.train RECIPE [--section.key value]``."""
    config = load_config(argv[0] if argv else "", argv[1:])
    with lasting_output():
        trainer = Trainer(config)
        trainer.run()
    if trainer.finished or "TORCHELASTIC_RUN_ID" in os.environ:
        return 0
    return 128 + trainer.stop.signum


if __name__ == "__main__":
    run_main("fpdm.train", main)
