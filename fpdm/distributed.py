"""Ranks that agree, and signals that are agreed on.

Gradients are summed by one flat all-reduce after the last backward of a step, not by
``DistributedDataParallel``: the shared block's gradients are final only when the whole backward is
over, so there is next to nothing to overlap with; one call on one buffer is deterministic, needs no
wrapper around the model, and counts no unused parameters.

Decisions (skip, stop, failed) are one MAX all-reduce per step, on the CPU through gloo also when
the gradients travel through NCCL: gloo notices a dead peer at once.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from fpdm.config import ConfigError, UserError

_SAME_S = 1.0  # seconds
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class PeerError(UserError):
    """Another rank stopped, froze or failed."""

    consequence = True


class StopRequested(BaseException):
    """Raised by a signal inside an interruptible phase; no ``Exception``: nothing swallows it."""


class StopFlag:
    """Turns ``SIGNALS`` into a flag; a second signal ends the process at once.

    A signal within ``_SAME_S`` of the first is the same request: a batch system signals every
    process of a job, and torchrun passes on to its workers what it gets itself.

    ``install`` from the main thread; ``restore`` puts the old handlers back.
    """

    def __init__(self) -> None:
        self.signum, self._since = 0, 0.0
        self._interruptible = False
        self._old: dict[int, object] = {}

    def install(self) -> None:
        """Takes the signals, except SIGHUP under nohup. The others are taken even where they were
        ignored: a script that ignores SIGTERM for itself hands that on to its children."""
        for signum in SIGNALS:
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue
            self._old[signum] = signal.signal(signum, self._handle)

    def restore(self) -> None:
        """Gives them back."""
        for signum, handler in self._old.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._old.clear()

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum:
            if now - self._since > _SAME_S:
                os._exit(128 + signum)
            return
        self.signum, self._since = signum, now
        if self._interruptible:
            self._interruptible = False
            raise StopRequested

    def interruptible(self, work: Callable[[], None]) -> bool:
        """Runs ``work``, which may be abandoned anywhere; False when a signal cut it short or was
        there before."""
        try:
            self._interruptible = True
            if self.signum:
                return False
            work()
            self._interruptible = False
            return True
        except StopRequested:
            return False
        finally:
            self._interruptible = False


class Ranks:
    """This process among its peers: ``rank`` of ``world`` on ``device``."""

    def __init__(self, device: str, timeout_s: int) -> None:
        self.rank, self.world, local = place()
        self.device = pick_device(device, local)
        self._told: Exception | None = None
        if self.world > 1:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            with self._watch("joining"):
                dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))

    @contextmanager
    def _watch(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # the first sentence, without the source position in front of it
            reason = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip()).split(". ")[0]
            raise PeerError(
                f"rank {self.rank}: a peer stopped or froze while {doing} ({reason}); "
                "start again to resume from the newest checkpoint"
            ) from error

    def agree(self, failure: Exception | None, *flags: int) -> list[int]:
        """Maximum of every flag over the ranks. If one failed, all raise: that one its own error,
        the others a PeerError that names it."""
        failed, *agreed = self._maximum([0 if failure is None else self.rank + 1, *flags])
        if failure is not None:
            self._told = failure
            raise failure
        if failed:
            raise PeerError(f"rank {failed - 1} failed, see its message; rank {self.rank} leaves")
        return agreed

    @contextmanager
    def telling(self, count: int) -> Iterator[None]:
        """An error that this rank alone meets inside is passed on where the others next ``agree``
        on ``count`` flags: they then name this rank, instead of reporting a lost connection."""
        try:
            yield
        except Exception as error:
            if error is not self._told and not isinstance(error, PeerError):
                with suppress(PeerError):
                    self._maximum([self.rank + 1, *[0] * count])
            raise

    def _maximum(self, flags: Sequence[int]) -> list[int]:
        if self.world == 1:
            return list(flags)
        packed = torch.tensor(flags, dtype=torch.int64)
        with self._watch("agreeing"):
            dist.all_reduce(packed, op=dist.ReduceOp.MAX)
        return [int(v) for v in packed]

    def sum_(self, buffer: Tensor) -> None:
        """Sum over ranks, in place, the same bits on every rank."""
        if self.world > 1:
            with self._watch("summing gradients"):
                dist.all_reduce(buffer)

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Rank 0's values for everybody, in place."""
        if self.world > 1:
            with self._watch("sharing the state"):
                for t in tensors:
                    dist.broadcast(t, src=0)

    def of_first(self, data: bytes) -> bytes:
        """Rank 0's ``data`` for everybody."""
        size = torch.tensor([len(data)])
        self.broadcast_([size])
        packed = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == 0:
            packed = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.broadcast_([packed])
        return bytes(packed.tolist())

    def close(self) -> None:
        """Leaves the group in order; not to be called after a ``PeerError``."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def place() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them; 0, 1 and 0 without it. Raises
    ConfigError for what is no rank among its peers: it would train a part, or nothing."""
    found = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise ConfigError(f"{name}: got {text!r}, expected a number, which torchrun sets")
        found.append(int(text))
    rank, world, local = found
    if rank >= world:
        raise ConfigError(
            f"RANK: got {rank} with WORLD_SIZE {world}, expected less: start the ranks with "
            "torchrun, or unset both"
        )
    if world > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE: got {world} without MASTER_ADDR, expected torchrun to start the ranks"
        )
    return rank, world, local


def pick_device(setting: str, local_rank: int = 0) -> torch.device:
    """``auto``: CUDA if there is one. Raises ConfigError when CUDA is asked for and absent."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "cpu" or (setting == "auto" and count == 0):
        return torch.device("cpu")
    if count <= local_rank:
        raise ConfigError(
            f"train.device: got {setting}, expected at least {local_rank + 1} CUDA device(s), "
            f"found {count}"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
