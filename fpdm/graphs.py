"""Launches captured once and replayed: the sampler's on a GPU, and whatever else runs on static
buffers.

A launch is a function without arguments that reads and writes buffers whose addresses stay (see
fpdm.workspace) and a ``GraphKey`` that names everything the captured work depends on beside the
buffers' contents: another batch, shape, dtype, implementation or set of weights is another key, so
a graph is never replayed on addresses that it was not captured with. ``PreparedWeights.refresh()``
writes in place and keeps the keys.

    off    every launch runs eagerly
    on     the second launch of a key is captured (the first one warms up), later ones replay
    auto   3 eager launches are timed, then 3 replays; the graph is kept if it takes at most 95 % of
           the time, else dropped. Times are read when the device has them: nothing waits

A loop (under ``on`` only, where the backend can capture one) is a body that the device repeats for
as long as a flag in its memory is set.

At most ``limit`` keys are kept, the least recently used goes first. A capture that fails gives back
its memory and that of all graphs, and everything runs eagerly from then on, after one warning.
What a graph is belongs to a ``Backend``: CUDA's here, a recording one in the tests.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from fpdm.config import ConfigError
from fpdm.settings import one_line
from fpdm.weights import WeightView

GRAPHS = 64  # keys
TRIALS = 3  # launches timed each way
STREAMS = 32  # of one priority and device, in torch
# switches of torch.backends.cuda.matmul; those for split k are newer than torch 2.10
MATMUL = (
    "allow_fp16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction_split_k",
    "allow_bf16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction_split_k",
    "allow_fp16_accumulation",
)  # fmt: skip
GAIN = 0.95  # a graph that takes more of the eager time is not worth its memory


@dataclass(frozen=True)
class GraphKey:
    """``piece`` of work, ``rows`` of its batch, ``variant`` (whatever the host decides in it),
    ``shape`` of one row, dtypes, device, implementation, ``buffers`` (a workspace's token) and
    ``weights`` (addresses, see ``addresses``)."""

    piece: str
    rows: int
    variant: tuple[Any, ...]
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    device: str
    impl: str
    buffers: int
    weights: tuple[int, ...]


def global_settings() -> tuple[Any, ...]:
    """What torch is told process-wide about how products, attention (the routes "sdpa*" of
    fpdm.kernels.attention_routes) and indexed writes are computed."""
    cuda = torch.backends.cuda
    # from torch 2.9 on; the older getter raises where a caller has set this one
    precision = getattr(cuda.matmul, "fp32_precision", None)
    return (
        precision or torch.get_float32_matmul_precision(),
        *(getattr(cuda.matmul, name, None) for name in MATMUL), cuda.preferred_blas_library(),
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(), cuda.fp16_bf16_reduction_math_sdp_allowed(),
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def addresses(weights: WeightView) -> tuple[int, ...]:
    """What a graph captured with ``weights`` reads: the object and the address of every tensor."""
    tensors = [*weights.copies.values(), *weights.params.values()]
    return (id(weights), *(t.data_ptr() for t in tensors))


class Captured(Protocol):
    """Work that was captured."""

    def replay(self) -> None:
        """Run it again on the current contents of its buffers."""

    def release(self) -> None:
        """Give back its memory; it is not replayed again."""


class Backend(Protocol):
    """What captures work and tells the time. ``loops``: whether ``loop`` can be had."""

    loops: bool

    def loop(self, more: Callable[[], torch.Tensor], body: Callable[[], None]) -> None:
        """Within a capture: ``body`` for as long as ``more``, a boolean () tensor, is true."""

    def capture(self, work: Callable[[], None]) -> Captured:
        """``work`` captured, not run. On failure gives back the memory, then raises."""

    def mark(self) -> Any:
        """A point in the device's time."""

    def elapsed(self, start: Any, end: Any) -> float | None:
        """Seconds between two marks; None while the device has not passed the second."""

    def release(self) -> None:
        """All graphs are gone: give back what they shared."""


@dataclass
class _Entry:
    """What is known about a key. ``graph`` once captured; ``settled``: no more trials."""

    seen: int = 0
    graph: Captured | None = None
    settled: bool = False
    eager: list[tuple[Any, Any]] = field(default_factory=list)
    replays: list[tuple[Any, Any]] = field(default_factory=list)


class GraphCache:
    """Graphs by key; see the module. ``captures``, ``replays``, ``evictions`` count."""

    def __init__(self, backend: Backend, always: bool, limit: int = GRAPHS):
        self.backend, self.always, self.limit = backend, always, limit
        self.entries: OrderedDict[GraphKey, _Entry] = OrderedDict()
        self.broken, self.loops = False, always and backend.loops
        self.captures = self.replays = self.evictions = 0

    def run(self, key: GraphKey, work: Callable[[], None]) -> None:
        """Do ``work``, by replaying its graph where there is one or it is time for one."""
        if self.broken:
            return work()
        entry = self._entry(key)
        entry.seen += 1
        if entry.graph is None and not entry.settled and entry.seen > self._warm_up():
            self._capture(entry, work)
        if not self.always and not entry.settled:
            return self._trial(entry, work)
        return self._go(entry, work)

    def loop(
        self, key: GraphKey, more: Callable[[], torch.Tensor], body: Callable[[], None]
    ) -> bool:
        """Repeat ``body`` on the device while ``more()``, from the second time of a key on; False:
        nothing was done, the caller is to follow the iterations itself."""
        if self.broken or not self.loops:
            return False
        entry = self._entry(key)
        entry.seen += 1
        if entry.graph is None and entry.seen > 1:
            try:
                entry.graph = self.backend.capture(lambda: self.backend.loop(more, body))
                self.captures += 1
            except Exception as error:
                self.loops = False
                warnings.warn(
                    f"graphs: capture of a loop failed, the host follows it now: {one_line(error)}",
                    stacklevel=4,
                )
        if entry.graph is None:
            return False
        self._go(entry, body)
        return True

    def _warm_up(self) -> int:
        return 1 if self.always else 1 + TRIALS

    def _go(self, entry: _Entry, work: Callable[[], None]) -> None:
        if entry.graph is None:
            work()
        else:
            self.replays += 1
            entry.graph.replay()

    def _trial(self, entry: _Entry, work: Callable[[], None]) -> None:
        """Run with a mark before and after, then decide if enough is known."""
        start = self.backend.mark()
        self._go(entry, work)
        times = entry.eager if entry.graph is None else entry.replays
        if entry.seen > 1 and len(times) < TRIALS:
            times.append((start, self.backend.mark()))
        if len(entry.replays) == TRIALS:
            self._settle(entry)

    def _settle(self, entry: _Entry) -> None:
        eager, replays = (
            [self.backend.elapsed(*pair) for pair in pairs]
            for pairs in (entry.eager, entry.replays)
        )
        known = [t for t in (*eager, *replays) if t is not None]
        if len(known) < 2 * TRIALS:
            return
        entry.settled = True
        if statistics.median(known[TRIALS:]) > GAIN * statistics.median(known[:TRIALS]):
            self._drop(entry)

    def _entry(self, key: GraphKey) -> _Entry:
        if key not in self.entries:
            self.entries[key] = _Entry()
            if len(self.entries) > self.limit:
                _, oldest = self.entries.popitem(last=False)
                self.evictions += oldest.graph is not None
                self._drop(oldest)
        self.entries.move_to_end(key)
        return self.entries[key]

    def _capture(self, entry: _Entry, work: Callable[[], None]) -> None:
        try:
            entry.graph = self.backend.capture(work)
            self.captures += 1
            return
        except Exception as error:
            # a failure half-way must not end what runs eagerly without trouble
            reason = one_line(error)
        # only now, as the error's frames held what the work had allocated
        self.clear()
        self.broken, entry.settled = True, True
        warnings.warn(
            f"graphs: capture failed, everything runs eagerly now: {reason}", stacklevel=4
        )

    @staticmethod
    def _drop(entry: _Entry) -> None:
        graph, entry.graph = entry.graph, None
        if graph is not None:
            graph.release()

    def clear(self) -> None:
        """Drop every graph and give back their memory."""
        for entry in self.entries.values():
            self._drop(entry)
        self.entries.clear()
        self.backend.release()


class CudaBackend:
    """CUDA graphs that share one memory pool: launches leave nothing in it between replays, which
    follow one another on one stream. Loops are conditional WHILE nodes (CUDA 12.4, torch 2.14)."""

    # one capture at a time, whichever thread's: another's wait for the device would spoil it, and
    # the end of another's switches the collector on again
    _one = threading.RLock()
    # backends that may replay
    _living: ClassVar[weakref.WeakSet[CudaBackend]] = weakref.WeakSet()
    # (device, pool that no graph uses any more) -> references that torch may have left to it
    _owed: ClassVar[dict[tuple[int, Any], int]] = {}
    # graphs whose loop failed, kept for good: one goes with a guard that changes the current stream
    _unfinished: ClassVar[list[torch.cuda.CUDAGraph]] = []

    def __init__(self, device: torch.device):
        self.loops = hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node")
        self.recording: Any = None
        here = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", here)
        self.stream = self._stream_of_its_own()
        self._living.add(self)
        self.pool: Any = None
        # graphs alive; references to the pool that destroyed graphs may have left behind
        self.alive = self.left = 0

    def _stream_of_its_own(self) -> torch.cuda.Stream:
        """One that no living backend captures on: torch hands out 32 in turn, and cuBLAS keeps its
        workspace by stream, in the pool of whose graphs asked first."""
        taken = [backend.stream for backend in self._living]
        for _ in range(STREAMS):
            stream = torch.cuda.Stream(self.device)
            if stream not in taken:
                break
        return stream

    def capture(self, work: Callable[[], None]) -> Captured:
        """``work`` captured; see ``Backend``. Waits for the device."""
        with self._one:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize(self.device)
            # this thread's handle, which a capture could not make; on the caller's stream
            with torch.cuda.device(self.device):
                torch.cuda.current_blas_handle()
            # a capture cannot ask for what eager work left in the allocator's cache
            self.release()
            with torch.cuda.stream(self.stream):
                # cuBLAS takes its workspace for this stream from the pool: when a graph's reset
                # frees it (torch from #175276 on), only another capture gets it, which is replayed
                # in turn
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                with self._recording(graph):
                    work()
        self.alive += 1
        return _CudaGraph(graph, self)

    @contextlib.contextmanager
    def _recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        # a collection might destroy graphs or events of others, which a capture forbids
        collects = gc.isenabled()
        gc.disable()
        try:
            try:
                # thread_local: a thread that pins memory meanwhile must not spoil the capture
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            except BaseException:
                # the allocator was told before CUDA was
                self._unwind(graph)
                raise
            self.recording = graph
            try:
                yield
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        finally:
            self.recording = None
            if collects:
                gc.enable()

    def loop(self, more: Callable[[], torch.Tensor], body: Callable[[], None]) -> None:
        """A WHILE node whose graph is ``body`` and the flag's next value."""
        graph = self.recording
        # the allocator is told of the body as of a capture, and of what follows as of another one
        self.left += 2
        graph.begin_capture_to_while_node(more())
        self._unfinished.append(graph)
        try:
            body()
            graph.set_conditional_handle_for_current_node(more())
        finally:
            graph.end_capture_to_conditional_node()
        self._unfinished.remove(graph)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Return the memory of a capture that failed."""
        # the body of a loop that failed may have left its own stream current
        with contextlib.suppress(RuntimeError), torch.cuda.stream(self.stream):
            graph.capture_end()
        self._unwind(graph)

    def _unwind(self, graph: torch.cuda.CUDAGraph) -> None:
        """Tells the allocator, too, that a capture which failed or never began has ended."""
        # gives the pool back from pull request 190348 on, and only after a good capture before;
        # with 190308 ends what follows too, which must not have been ended
        graph.reset()
        # by torch's own hand from 180395 on
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        self.left += 1
        self._part()

    def _part(self) -> None:
        """Gives up the pool once no graph uses it; its id may not be used again."""
        if not self.alive:
            if self.left:
                self._owed[self.device.index, self.pool] = self.left
            self.pool, self.left = None, 0

    def mark(self) -> torch.cuda.Event:
        """An event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def elapsed(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        """Seconds between two events, None while the second has not happened."""
        return start.elapsed_time(end) / 1e3 if end.query() else None

    def release(self) -> None:
        """Return to the device the memory of pools without graphs, and what eager work has cached.

        A pool that is idle and yet keeps its memory is still referred to. References are dropped
        one at a time: torch does not tell which of its versions leave one behind, and dropping one
        too many would take another graph's memory."""
        with self._one:
            torch.cuda.empty_cache()
            for (index, pool), count in list(self._owed.items()):
                for _ in range(count):
                    if not _idle(index, pool):
                        break
                    torch._C._cuda_releasePool(index, pool)
                    torch.cuda.empty_cache()
                if not _segments(index, pool):
                    del self._owed[index, pool]

    def forget(self, graph: torch.cuda.CUDAGraph) -> None:
        """Destroy a graph; the pool goes with the last one."""
        graph.reset()
        self.alive -= 1
        self._part()


def _segments(index: int, pool: Any) -> list[dict[str, Any]]:
    """What a pool of the allocator holds of a device."""
    found: list[dict[str, Any]] = []
    # cudaMallocAsync has none
    with contextlib.suppress(RuntimeError):
        found = torch.cuda.memory_snapshot()
    return [s for s in found if (s["device"], tuple(s["segment_pool_id"])) == (index, pool)]


def _idle(index: int, pool: Any) -> bool:
    """Whether it holds memory that nobody uses."""
    return any(not s["active_size"] for s in _segments(index, pool))


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, backend: CudaBackend):
        self.graph, self.backend = graph, backend

    def replay(self) -> None:
        """Launch it on the current stream."""
        self.graph.replay()

    def release(self) -> None:
        """Destroy it."""
        self.backend.forget(self.graph)


def backend_for(device: torch.device) -> Backend | None:
    """What captures on ``device``; None on a CPU."""
    return CudaBackend(device) if device.type == "cuda" else None


def cache_for(
    setting: str, mode: str, device: torch.device, limit: int = GRAPHS
) -> GraphCache | None:
    """What ``setting`` asks for by ``mode``: off, on or auto. Raises ConfigError for on where
    nothing can be captured."""
    backend = None if mode == "off" else backend_for(device)
    if backend is None and mode == "on":
        raise ConfigError(f"{setting}: got on, expected auto or off on {device}")
    return None if backend is None else GraphCache(backend, mode == "on", limit)
