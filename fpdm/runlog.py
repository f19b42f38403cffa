"""The run directory: what a training run writes beside its checkpoints.

    runs/<name>/config.yaml        the resolved configuration
                metrics.jsonl      a row every ``log_every`` steps, a function of the run alone
                timing.jsonl       images per second and peak memory of the same steps
                nonfinite.jsonl    skipped steps and the ids of their samples
                checkpoints/  samples/step_*.png  curves.png  export/  tensorboard/

Rows, TensorBoard's too, reach the kernel before the checkpoint of their step is written, and a
resumed run drops the rows of later steps, so that ``metrics.jsonl`` of a killed and resumed run
equals that of an uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fpdm.config import Config, ConfigError, UserError, to_dict
from fpdm.data import Dataset
from fpdm.distributed import Ranks
from fpdm.files import atomic_write, directory_lock, write_problem
from fpdm.images import told_ignored
from fpdm.settings import one_line


class RunDirectory:
    """Paths of one run, and the append-only row files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.metrics = root / "metrics.jsonl"
        self.timing = root / "timing.jsonl"
        self.nonfinite = root / "nonfinite.jsonl"
        self.checkpoints = root / "checkpoints"
        self.curves = root / "curves.png"
        self.export = root / "export"
        self.board = root / "tensorboard"
        self._held = contextlib.ExitStack()

    def sample(self, step: int) -> Path:
        """PNG of the sample grid after ``step`` steps."""
        return self.root / "samples" / f"step_{step:07d}.png"

    def prepare(self) -> None:
        """Creates the directories, takes the run and proves that files can be written there.

        Raises ConfigError before anything was trained, not at the first save.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._take()
            for directory in (self.checkpoints, self.root / "samples"):
                directory.mkdir(exist_ok=True)
                atomic_write(directory / ".probe", b"x" * 4096)
                (directory / ".probe").unlink()
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"train.out: got {self.root}, expected a directory that can be written: {reason}"
            ) from error

    def _take(self) -> None:
        """Locks the run until ``close``: two trainers would write every row twice."""
        lock = self._held.enter_context(directory_lock(self.root, 0.0))
        if lock == "unsupported":
            print(f"{self.root}: it cannot be locked: let no other process train there")
        if lock == "busy":
            raise ConfigError(
                f"train.name: got {self.root}, where another process is training, expected a run "
                "of its own, or that process to end first"
            )

    def close(self) -> None:
        """Lets another session have the run."""
        self._held.close()

    def write_config(self, text: str, resumed: bool) -> None:
        """Writes the resolved configuration; one of somebody's own that is there is kept."""
        with contextlib.suppress(FileNotFoundError):
            if not resumed and self.config.read_bytes() != text.encode():
                numbers = (f".yaml.bak{i or ''}" for i in itertools.count())
                paths = (self.config.with_suffix(suffix) for suffix in numbers)
                kept = next(path for path in paths if not path.exists())
                os.rename(self.config, kept)
                print(f"{self.config}: what was there is {kept.name} now", flush=True)
        atomic_write(self.config, text.encode())

    def keep_until(self, step: int) -> None:
        """Drops the rows of steps after ``step``, and a row that a kill cut short."""
        for path in (self.metrics, self.timing, self.nonfinite):
            if path.exists():
                _keep_until(path, step)

    def append(self, path: Path, row: Mapping[str, Any]) -> None:
        """Adds one row. One write: a kill leaves a whole row, or one that ``keep_until`` drops.
        Raises UserError when it cannot be written; then nothing of it remains."""
        data = (json.dumps(row) + "\n").encode()
        try:
            # a rank on a host with a file system of its own has no run directory yet
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab", buffering=0) as file:
                end = file.tell()
                # a disk that is nearly full takes a part without an error
                if (written := file.write(data)) < len(data):
                    # unless another rank went on behind it
                    if os.fstat(file.fileno()).st_size == end + written:
                        file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(write_problem(path, error)) from error


def _keep_until(path: Path, step: int) -> None:
    with open(path, "rb") as rows:
        kept = (line for line in rows if _until(line, step))
        atomic_write(path, lambda file: file.writelines(kept))


def _until(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def described(config: Config, model: torch.nn.Module, data: Dataset, ranks: Ranks) -> str:
    """What is trained, and on what."""
    parameters = sum(p.numel() for p in model.parameters())
    t, many = config.train, f"{ranks.world} ranks of " if ranks.world > 1 else ""
    kind = config.data.kind + told_ignored(getattr(data, "ignored", ()))
    return (
        f"{config.model.kind}, {parameters / 1e6:.2f} M parameters; {len(data)} samples "
        f"({kind}), batch {t.batch}, {t.steps} steps, {t.precision} on {many}{ranks.device}"
    )


def export_extra(config: Config, step: int) -> dict[str, Any]:
    """What the export of a run says beside its model."""
    data = config.data
    return {
        "step": step,
        "recipe": config.recipe,
        "sample": to_dict(config.sample),
        "label_dropout": config.train.label_dropout,
        "latent_scale": data.latent_scale if data.kind == "latents" else None,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the resident peak of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Window:
    """Sums since the last row; part of a checkpoint, so that a resumed run writes the same row."""

    good: int = 0
    loss: float = 0.0
    mse: float = 0.0
    vb: float = 0.0
    micro: int = 0
    n: int = 0
    m: int = 0

    def row(self, last: Mapping[str, float], looped: bool) -> dict[str, float | None]:
        """Means, and what the ``last`` step found; ``looped``: the model has a fixed point. A
        number that does not exist is None: NaN is not JSON."""
        good, micro = self.good or math.nan, self.micro or math.nan
        row = {
            "loss": self.loss / good,
            "mse": self.mse / good,
            "vb": self.vb / good,
            "n": self.n / micro if looped else None,
            "m": self.m / micro if looped else None,
            "residual": last.get("residual") if looped else None,
            "grad_norm": last.get("grad_norm"),
            "lr": last.get("lr"),
        }
        return {k: None if v is None or not math.isfinite(v) else v for k, v in row.items()}


class Progress:
    """Bar, timing rows and, when asked, TensorBoard of one session on rank 0."""

    def __init__(
        self, config: Config, directory: RunDirectory, device: torch.device, start: int, shown: bool
    ) -> None:
        train = config.train
        self.batch, self.directory, self.device = train.batch, directory, device
        self.bar = tqdm(
            total=train.steps,
            initial=start,
            unit="step",
            disable=not shown,
            dynamic_ncols=True,
            # in a file every refresh is a line of its own
            mininterval=0.2 if sys.stderr.isatty() else 15.0,
        )
        self.since, self.at = time.perf_counter(), start
        self.board = _tensorboard(directory.board, start) if train.tensorboard and shown else None

    def step(self) -> None:
        """One step is done."""
        self.bar.update()

    def row(self, row: Mapping[str, Any]) -> None:
        """Shows a row of metrics with the clock's numbers, which it stores apart."""
        now, step = time.perf_counter(), row["step"]
        rate = (step - self.at) * self.batch / max(now - self.since, 1e-9)
        self.since, self.at = now, step
        memory = peak_memory(self.device)
        timing = {"step": step, "images_per_s": rate, "peak_memory": memory, "time": time.time()}
        self.directory.append(self.directory.timing, timing)
        shown = {
            "loss": _short(row["loss"]),
            "img/s": f"{rate:.0f}",
            "n+m": _short((row["n"] or 0.0) + (row["m"] or 0.0)),
            "residual": _short(row["residual"]),
            "peak": f"{memory / 2**30:.2f}G",
        }
        self.bar.set_postfix(shown, refresh=False)
        if self.board is not None:
            with _writing(self.directory.board):
                for key, value in {**row, "images_per_s": rate, "peak_memory": memory}.items():
                    if key != "step" and value is not None:
                        self.board.add_scalar(key, value, step)
                # its writer is a thread that may wait: a kill would leave a gap
                self.board.flush()

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Ends bar and board."""
        self.bar.close()
        if self.board is not None:
            with contextlib.suppress(OSError):  # the row that was lost has said so
                self.board.close()


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """An OSError inside becomes the UserError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise UserError(write_problem(path, error)) from error


def _tensorboard(path: Path, start: int) -> Any:
    """A writer in ``path``; what an earlier session wrote of steps after ``start`` is not shown."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # versions that do not fit raise errors of many kinds
        raise ConfigError(
            "train.tensorboard: got true, expected the package tensorboard to be installed: "
            f"{one_line(error)}"
        ) from error
    with _writing(path):
        return SummaryWriter(str(path), purge_step=start + 1)
