"""Interleaved timing: every round runs every arm once, so that all see the same machine.

Ratios are medians over rounds of paired times; an absolute time is never compared across runs.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fpdm.graphs import CudaBackend

Arm = Callable[[], object]
# rounds: a median of fewer is one of its samples' luck
LEAST = 5
# a ratio known this well needs no further round
KNOWN = 0.04


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def once(fn: Arm, inner: int = 1) -> float:
    """Seconds per call of ``fn``, called ``inner`` times, the device's work included."""
    synchronize()
    start = time.perf_counter()
    for _ in range(inner):
        fn()
    synchronize()
    return (time.perf_counter() - start) / inner


REPLAYED = 10


def replayed(fn: Arm, calls: int = REPLAYED) -> Arm:
    """``calls`` calls of ``fn`` as one CUDA graph: the device's time without the host's, which for
    one operator is longer. ``fn`` itself without a GPU. Raises where it cannot be captured."""
    if not torch.cuda.is_available():
        return fn

    def work() -> None:
        for _ in range(calls):
            fn()

    return one_by_one([work])


def in_turn(works: Sequence[Arm]) -> Arm:
    """All of them, one after the other, as one arm."""

    def run() -> None:
        for work in works:
            work()

    return run


def one_by_one(works: Sequence[Callable[[], None]]) -> Arm:
    """All of them in turn, each a CUDA graph of its own in one memory pool, the first one captured
    first: it is to be the largest. Without a GPU they are called."""

    launched = in_turn(works)
    if not torch.cuda.is_available():
        return launched
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            launched()
    torch.cuda.synchronize()
    # unlike torch.cuda.graph's, a capture of it that fails spoils no later one
    backend = CudaBackend(torch.device("cuda", torch.cuda.current_device()))
    # a graph reads the buffers of its work by address: they live as long as it does
    captured = [(backend.capture(work), work) for work in works]

    def replay() -> None:
        for graph, _ in captured:
            graph.replay()

    return replay


def device_times(arms: dict[str, Arm], rounds: int) -> tuple[dict[str, Times], dict[str, str]]:
    """Times of one call of every arm by graph replays, and why an arm is left out."""
    found: dict[str, Arm] = {}
    missing: dict[str, str] = {}
    for name, fn in arms.items():
        try:
            found[name] = replayed(fn)
        except Exception as error:
            missing[name] = f"capture: {type(error).__name__}: {str(error)[:200]}"
    calls = REPLAYED if torch.cuda.is_available() else 1
    times = interleave(found, rounds)
    return {n: Times(tuple(t / calls for t in x.rounds)) for n, x in times.items()}, missing


def flushing() -> Arm:
    """Writes twice as much as the L2 cache of the current GPU holds: of what was used before,
    nothing is in it afterwards."""
    device = torch.device("cuda", torch.cuda.current_device())
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return partial(torch.empty(size, dtype=torch.uint8, device=device).fill_, 1)


def cold_times(arms: dict[str, Arm], rounds: int) -> dict[str, float]:
    """Median seconds of one call of every arm with nothing in the L2 cache, by replays of a graph
    that flushes it before every call, less one that only flushes; none without a GPU.

    What a flush leaves to be written back, the next one pays for alone as much as after a call."""
    if not torch.cuda.is_available():
        return {}
    flush = flushing()
    both = {name: replayed(in_turn([flush, fn])) for name, fn in arms.items()}
    alone, *times = interleave({"flush": replayed(flush), **both}, rounds).values()
    return {
        name: statistics.median(t - f for t, f in zip(found.rounds, alone.rounds)) / REPLAYED
        for name, found in zip(arms, times)
    }


def inner_calls(fn: Arm, at_least: float | None = None, warmed: bool = False) -> int:
    """Calls that take ``at_least`` seconds together, 2 ms where nothing else is asked for: a
    shorter sample measures the clock. On a GPU 20 ms, so that the host is ahead of it as it is in a
    loop: a call that is waited for alone takes the latency of its launches, too. ``warmed``: it
    ran before, so that nothing is compiled now."""
    if at_least is None:
        at_least = 2e-2 if torch.cuda.is_available() else 2e-3
    if not warmed:
        fn()
    return max(1, round(at_least / max(once(fn), 1e-9)))


@dataclass(frozen=True)
class Times:
    """Seconds per call, one per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        """Seconds: what other programs add to a round is never negative."""
        return min(self.rounds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        if len(self.rounds) < 4:
            return (max(self.rounds) - min(self.rounds)) / self.median
        low, _, high = statistics.quantiles(self.rounds, n=4)
        return (high - low) / self.median


def ratio(arm: Times, ours: Times) -> float:
    """How many times longer ``arm`` takes: the median of the paired ratios."""
    return statistics.median(a / b for a, b in zip(arm.rounds, ours.rounds))


def doubt(arm: Sequence[float], ours: Sequence[float]) -> float:
    """How uncertain ``ratio`` is, relative: 1.57 interquartile ranges over the root of the rounds
    (McGill, Tukey and Larsen 1978: two medians whose intervals part differ at about 95 %)."""
    pairs = Times(tuple(a / b for a, b in zip(arm, ours)))
    return 1.57 * pairs.spread / len(pairs.rounds) ** 0.5


def interleave(
    arms: dict[str, Arm], rounds: int, seconds: float = 60.0, known: float = 0.0,
    warmed: bool = False,
) -> dict[str, Times]:  # fmt: skip
    """Times of every arm, warmed here where it is not, its order turned from round to round: as
    many rounds as fit ``seconds``, at least 5 and at most ``rounds``, until the ``doubt`` of every
    ratio to the first arm is at most ``known``."""
    inner = {name: inner_calls(fn, warmed=warmed) for name, fn in arms.items()}
    began = time.perf_counter()
    times: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            if index >= LEAST:
                ours, *others = times.values()
                enough = others and max(doubt(t, ours) for t in others) <= known
                if enough or time.perf_counter() - began > seconds:
                    break
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                times[name].append(once(arms[name], inner[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Times(tuple(values)) for name, values in times.items()}
