"""Small training runs for the tests, in this process or in children that may be killed."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the optimiser's first import; here it is paid once for all children

from fpdm import checkpoint, figures
from fpdm.cli import run_main
from fpdm.config import (
    Config,
    DataConfig,
    FixedPointConfig,
    ModelConfig,
    OptimConfig,
    SamplerConfig,
    TrainConfig,
)
from fpdm.train import Trainer

MODEL = ModelConfig(
    input_size=8, patch_size=2, in_channels=1, hidden_size=32, num_heads=2, num_classes=10
)
LIMIT = 60.0  # seconds that a child may take
FAST = SamplerConfig(steps=2, iters=1, guidance=1.0)


def small(out: Path, model: ModelConfig = MODEL, **changes: Any) -> Config:
    """A run of 40 steps on digits; ``changes`` are fields of TrainConfig or OptimConfig."""
    train: dict[str, Any] = {
        "out": str(out), "name": "run", "steps": 40, "batch": 16, "log_every": 3, "save_every": 5,
        "grid_every": 0, "grid_per_class": 1, "device": "cpu", "seed": 3,
    }  # fmt: skip
    optim = {k: changes.pop(k) for k in list(changes) if k in OptimConfig.__dataclass_fields__}
    fixed_point = changes.pop("fixed_point", FixedPointConfig(n_max=2, m_max=2))
    return Config(
        recipe="digits",
        model=model,
        data=DataConfig(kind="digits"),
        fixed_point=fixed_point,
        optim=OptimConfig(**{"lr": 1e-3, "ema_decay": 0.9, **optim}),
        train=TrainConfig(**{**train, **changes}),
        sample=FAST if model.kind == "fpdm" else replace(FAST, iters=None),
    )


def fingerprint(config: Config) -> dict[str, Any]:
    """Everything a resumed run must share with an uninterrupted one, bit for bit."""
    root = Path(config.train.out) / config.train.name
    newest = checkpoint.load_newest(root / "checkpoints")
    assert newest is not None
    found: dict[str, Any] = {
        f"{group}/{name}": hashlib.sha256(t.contiguous().view(torch.uint8).numpy()).hexdigest()
        for group, named in newest.tensors.items()
        for name, t in ((n, t.reshape(-1)) for n, t in named.items())
    }
    found["state"] = newest.meta["state"]
    found["metrics"] = (root / "metrics.jsonl").read_text()
    found["grid"] = hashlib.sha256(
        (root / "samples" / f"step_{config.train.steps:07d}.png").read_bytes()
    ).hexdigest()
    return found


def orphans(config: Config) -> list[Path]:
    """Temporary files left in a run directory."""
    root = Path(config.train.out) / config.train.name
    return [path for path in root.rglob("*") if ".tmp" in path.name or path.name == ".probe"]


def stopping(at: int, kind: type[Trainer] = Trainer) -> type[Trainer]:
    """A trainer that gets SIGTERM in its step ``at`` (counted from 1)."""

    class Stopping(kind):  # type: ignore[misc, valid-type]
        def local_step(self, step: int) -> None:
            super().local_step(step)
            if step == at - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    return Stopping


class HashingTrainer(Trainer):
    """Appends a hash of all parameters after every step, one file per rank."""

    def _advance(self) -> int:
        signum = super()._advance()
        digest = hashlib.sha256()
        for p in self.model.parameters():
            digest.update(p.detach().contiguous().numpy().tobytes())
        with open(self.directory.root / f"hashes.{self.ranks.rank}", "a") as file:
            file.write(digest.hexdigest() + "\n")
        return signum


class UnequalTrainer(HashingTrainer):
    """Negative control: ranks that do not sum their gradients."""

    def _share(self) -> None:
        super()._share()
        self.ranks.sum_ = lambda buffer: None  # type: ignore[method-assign]


class OverflowTrainer(Trainer):
    """A gradient overflows in every ``EVERY``-th step (``ALWAYS``: in every step from there on)."""

    EVERY = 40
    ALWAYS = False

    def local_step(self, step: int) -> None:
        super().local_step(step)
        due = step % self.EVERY == self.EVERY - 1
        if due or (self.ALWAYS and step >= self.EVERY):
            self.optimizer.gradients[7] = float("inf")


class FailingTrainer(Trainer):
    """Rank 1 raises in step 5."""

    def local_step(self, step: int) -> None:
        super().local_step(step)
        if self.ranks.rank == 1 and step == 5:
            raise ValueError("planted")


def _main(kind: type[Trainer], config: Config, log: str, env: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)

    def work(argv: list[str]) -> int:
        kind(config).run()
        return 0

    # drawing the curves takes longer than the run
    figures.plot_history = lambda metrics, path: False  # type: ignore[assignment]
    sys.argv = ["fpdm.train"]
    run_main("fpdm.train", work)


_context: Any = None


def _server() -> Any:
    global _context
    if _context is None:
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(["runs"])
        # the server does not inherit sys.path, and skips in silence what it cannot import
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        forkserver.ensure_running()
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return _context


def start(
    config: Config, log: Path, kind: type[Trainer] = Trainer, env: dict[str, str] | None = None
) -> Any:
    """A child that trains; forked from a process that has everything imported and nothing done."""
    process = _server().Process(target=_main, args=(kind, config, str(log), env or {}))
    process.start()
    return process


def start_pair(
    config: Config | list[Config], log: Path, kind: type[Trainer] = Trainer
) -> list[Any]:
    """Two gloo ranks, of one configuration or each of its own; logs are log.0 and log.1."""
    configs = config if isinstance(config, list) else [config] * 2
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(
            configs[r], Path(f"{log}.{r}"), kind, {**common, "RANK": str(r), "LOCAL_RANK": str(r)}
        )
        for r in range(2)
    ]


def changed(config: Config, **train: Any) -> Config:
    """``config`` with other fields of its train section."""
    return replace(config, train=replace(config.train, **train))


def finish(process, seconds: float = LIMIT) -> int:
    """Exit status of a child that must end by itself."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"still running after {seconds} s")
    return process.exitcode


def wait_for(condition, seconds: float = LIMIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class FullDisk(Trainer):
    """No file may grow beyond 1 kB after the second checkpoint."""

    def save(self) -> None:
        if self.step > 8:
            no_space(1000)
        super().save()


def no_space(size: int) -> None:
    """No file may grow beyond ``size`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
