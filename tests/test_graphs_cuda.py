"""The CUDA backend of fpdm.graphs on a CUDA that only takes notes: the order of its calls, and what
a capture that failed leaves behind."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fpdm import graphs


class FakeGraph:
    """Notes calls; ``broken``: those that fail."""

    log: ClassVar[list[str]] = []
    broken: ClassVar[set[str]] = set()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kw: Any) -> None:
            FakeGraph.log.append(name)
            if name in FakeGraph.broken:
                raise RuntimeError(f"{name} is not permitted")

        return call


class FakeLoopingGraph(FakeGraph):
    def begin_capture_to_while_node(self, more: Tensor) -> None:
        FakeGraph.log.append(f"while {bool(more)}")


# by hand, where no end of a capture tells the allocator
GIVEN_BACK = ("_cuda_endAllocateToPool", "_cuda_releasePool")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeGraph]]:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for name in ("Stream", "synchronize", "current_blas_handle", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: FakeGraph.log.append(name))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    for name in GIVEN_BACK:
        monkeypatch.setattr(
            torch._C, name, lambda *where, name=name: FakeGraph.log.append(name), raising=False
        )  # fmt: skip
    monkeypatch.setattr(graphs.CudaBackend, "_owed", {})
    monkeypatch.setattr(graphs.CudaBackend, "_unfinished", [])
    FakeGraph.log.clear()
    yield FakeGraph
    FakeGraph.broken = set()


BEFORE = ("synchronize", "current_blas_handle", "empty_cache")


def test_the_order_of_a_capture(cuda: type[FakeGraph]) -> None:
    """The library's handle is made and cached memory returned before; nothing is collected
    meanwhile; a failure gives back, collects again, and hands the error on."""
    backend = graphs.CudaBackend(torch.device("cuda"))
    assert not backend.loops
    collects: list[bool] = []

    def work() -> None:
        cuda.log.append("work")
        collects.append(gc.isenabled())

    backend.capture(work).replay()
    begin = ["Stream", *BEFORE, "capture_begin", "work"]
    assert cuda.log == [*begin, "capture_end", "replay"]
    assert (collects, gc.isenabled(), backend.alive) == ([False], True, 1)
    for broken, tail in (
        ("capture_end", ["work", "capture_end", "capture_end", "reset", GIVEN_BACK[0]]),
        ("capture_begin", ["reset", GIVEN_BACK[0]]),
    ):
        cuda.log.clear()
        cuda.broken = {broken}
        with pytest.raises(RuntimeError, match="not permitted"):
            backend.capture(work)
        assert cuda.log == [*BEFORE, "capture_begin", *tail]
        assert (gc.isenabled(), backend.alive, backend.recording) == (True, 1, None)


def test_the_order_of_a_loop(cuda: type[FakeGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    """WHILE the flag: body, the flag's next value into the node's handle. The node is closed
    whatever happens."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeLoopingGraph)
    backend, left = graphs.CudaBackend(torch.device("cuda")), torch.ones(1)
    assert backend.loops
    cuda.log.clear()

    def body() -> None:
        cuda.log.append("body")
        left.zero_()

    backend.capture(lambda: backend.loop(lambda: left[0] > 0, body))
    node = ["set_conditional_handle_for_current_node", "end_capture_to_conditional_node"]
    begin = [*BEFORE, "capture_begin"]
    assert cuda.log == [*begin, "while True", "body", *node, "capture_end"]
    cuda.log.clear()

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        backend.capture(lambda: backend.loop(lambda: left[0] > 0, broken))
    assert cuda.log == [*begin, "while False", node[1], "capture_end", "reset", GIVEN_BACK[0]]


class Device:
    """Which stream is current, which ones are being captured, and whether that was invalidated."""

    current, capturing, invalid = "caller", set(), False


class TrackedGraph:
    """As torch's CUDAGraph: a body has a stream of its own, which a guard makes current until the
    node is closed. Ending an invalidated body raises before its guard goes; that goes with the
    graph, and makes current what was so when it came."""

    def __init__(self) -> None:
        self.guards: list[str] = []
        self.ended = False

    def capture_begin(self, **how: Any) -> None:
        assert not Device.capturing
        self.stream = Device.current
        Device.capturing.add(self.stream)

    def capture_end(self) -> None:
        if Device.current != self.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        Device.capturing.discard(self.stream)
        self.ended = True

    def begin_capture_to_while_node(self, more: Tensor) -> None:
        self.guards.append(Device.current)
        Device.current = "body"
        Device.capturing.add("body")

    def end_capture_to_conditional_node(self) -> None:
        Device.capturing.discard("body")
        if Device.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")
        Device.current = self.guards.pop()

    def set_conditional_handle_for_current_node(self, more: Tensor) -> None:
        pass

    def reset(self) -> None:
        pass

    replay = reset

    def __del__(self) -> None:
        while self.guards:
            Device.current = self.guards.pop()


def test_a_body_that_cannot_be_captured_leaves_no_trace(
    cuda: type[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is captured on, the caller's stream stays current, and other graphs are made."""

    @contextlib.contextmanager
    def stream(name: str) -> Iterator[None]:
        before, Device.current = Device.current, name
        try:
            yield
        finally:
            Device.current = before

    monkeypatch.setattr(torch.cuda, "CUDAGraph", TrackedGraph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    cache = graphs.GraphCache(graphs.CudaBackend(torch.device("cuda")), always=True)
    left, key = torch.ones(1), graphs.GraphKey("x", 1, (), (), (), "cuda", "", 0, ())

    def waits() -> None:
        Device.invalid = True
        raise RuntimeError("operation not permitted when stream is capturing")

    assert not cache.loop(key, lambda: left[0] > 0, waits)
    with pytest.warns(UserWarning, match="capture of a loop failed"):
        assert not cache.loop(key, lambda: left[0] > 0, waits)
    gc.collect()
    assert (Device.current, Device.capturing, cache.loops) == ("caller", set(), False)
    for _ in range(3):
        cache.run(replace(key, rows=2), lambda: None)
    assert (cache.captures, cache.replays, cache.broken) == (1, 2, False)
    # nor when all of it goes
    del cache
    gc.collect()
    assert (Device.current, Device.capturing) == ("caller", set())


def test_captures_of_threads_do_not_meet(cuda: type[FakeGraph]) -> None:
    """CUDA invalidates a capture while another thread waits for the device, as the next one does
    first; and the collector stays off to the end of each."""
    begun, collects = threading.Event(), []

    def work() -> None:
        begun.set()
        time.sleep(0.05)
        collects.append(gc.isenabled())

    def capture() -> None:
        graphs.CudaBackend(torch.device("cuda")).capture(work)

    other = threading.Thread(target=lambda: (begun.wait(), capture()))
    other.start()
    capture()
    other.join()
    order = [name for name in cuda.log if name != "Stream"]
    assert order == [*BEFORE, "capture_begin", "capture_end"] * 2
    assert (collects, gc.isenabled()) == ([False, False], True)


class Allocator:
    """As torch's CUDACachingAllocator: a pool is freed once nothing refers to it, and what goes
    below that, or records twice into one, is an assertion. ``version`` of torch: what the end of a
    capture that CUDA invalidated does."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.uses: dict[Any, int] = {}
        self.recording: set[Any] = set()
        self.segments: list[dict[str, Any]] = []
        self.made = 0

    def handle(self) -> tuple[int, int]:
        self.made += 1
        return 0, self.made

    def begin(self, pool: Any) -> None:
        assert pool not in self.recording
        # a name that went cannot be used again
        assert self.uses.get(pool, 1) > 0
        self.uses[pool] = self.uses.get(pool, 0) + 1
        self.recording.add(pool)
        where = {"device": 0, "segment_pool_id": pool}
        self.segments.append({**where, "active_size": 0})

    def end(self, _: int, pool: Any) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.discard(pool)

    def release(self, _: int, pool: Any) -> None:
        self.uses[pool] -= 1
        assert self.uses[pool] >= 0, "uc >= 0"

    def empty(self) -> None:
        self.segments = [
            s for s in self.segments if s["active_size"] or self.uses[s["segment_pool_id"]]
        ]


class PooledGraph:
    """As torch's CUDAGraph to the allocator."""

    allocator: ClassVar[Allocator]
    fails: ClassVar[str] = ""

    def __init__(self) -> None:
        self.held = self.done = self.ended = False

    def capture_begin(self, pool: Any, **how: Any) -> None:
        self.pool_id = pool
        self.allocator.begin(pool)
        self.held = True
        if PooledGraph.fails == "begin":
            raise RuntimeError("operation not permitted")

    def capture_end(self) -> None:
        if PooledGraph.fails:
            if self.allocator.version != "2.11":
                with contextlib.suppress(RuntimeError):
                    self.allocator.end(0, self.pool_id)
                self.ended = True
            raise RuntimeError("operation failed due to a previous error during capture")
        self.allocator.end(0, self.pool_id)
        self.done = True

    def begin_capture_to_while_node(self, more: Tensor) -> None:
        self._again()

    def end_capture_to_conditional_node(self) -> None:
        self._again()

    def _again(self) -> None:
        self.allocator.end(0, self.pool_id)
        self.allocator.begin(self.pool_id)

    def set_conditional_handle_for_current_node(self, more: Tensor) -> None:
        pass

    def replay(self) -> None:
        pass

    def reset(self) -> None:
        version = self.allocator.version
        if version == "190308" and self.held and not (self.done or self.ended):
            self.allocator.end(0, self.pool_id)
        if self.held and (self.done or version in ("190348", "190308")):
            self.allocator.release(0, self.pool_id)
        self.held = self.done = False

    __del__ = reset


@pytest.fixture(params=["2.11", "180395", "190348", "190308"])
def allocator(request: pytest.FixtureRequest, cuda: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = Allocator(request.param)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PooledGraph)
    monkeypatch.setattr(PooledGraph, "allocator", found, raising=False)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", found.handle)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: found.segments)
    monkeypatch.setattr(torch.cuda, "empty_cache", found.empty)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", found.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", found.release, raising=False)
    yield found
    PooledGraph.fails = ""


@pytest.mark.parametrize("fails", ["begin", "work"])
@pytest.mark.parametrize("others", [0, 2])
def test_a_pool_is_given_back_once(
    allocator: Allocator, fails: str, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever torch it is, and whatever it releases by itself: no reference is left of a capture
    that failed, and none is taken from graphs that live."""
    backend = graphs.CudaBackend(torch.device("cuda"))
    living = [backend.capture(lambda: None) for _ in range(others)]
    monkeypatch.setattr(PooledGraph, "fails", fails)

    def work() -> None:
        if PooledGraph.fails == "work":
            # the allocator's cache of a tensor that the error's frame holds
            allocator.segments[-1]["active_size"] = 1
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        backend.capture(work)
    allocator.segments[-1]["active_size"] = 0
    PooledGraph.fails = ""
    assert allocator.recording == set()
    backend.release()
    if others:
        assert allocator.uses[(0, 1)] >= others
    # others are made, in the same pool while there are graphs
    living.append(backend.capture(lambda: None))
    assert allocator.made == (1 if others else 2)
    for graph in living:
        graph.release()
    gc.collect()
    backend.release()
    assert (allocator.segments, set(allocator.uses.values())) == ([], {0})


def test_a_loops_pool_is_given_back(allocator: Allocator) -> None:
    """A body is a capture of its own to the allocator, and so is what follows it."""
    backend, left = graphs.CudaBackend(torch.device("cuda")), torch.ones(1)
    for _ in range(3):
        loop = backend.capture(lambda: backend.loop(lambda: left[0] > 0, lambda: None))
        plain = backend.capture(lambda: None)
        loop.release()
        assert allocator.uses[backend.pool] >= 1
        plain.release()
        backend.release()
        assert (allocator.segments, set(allocator.uses.values())) == ([], {0})


def test_an_index_that_is_not_given_is_the_current_device(
    cuda: type[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert graphs.CudaBackend(torch.device("cuda")).device == torch.device("cuda", 1)
    assert graphs.CudaBackend(torch.device("cuda", 0)).device == torch.device("cuda", 0)


def test_backends_do_not_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch hands out its streams in turn; cuBLAS keeps a workspace for each, in one of their
    pools."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(graphs.CudaBackend, "_living", weakref.WeakSet())
    turn = itertools.cycle(range(3))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: next(turn))
    backends = [graphs.CudaBackend(torch.device("cuda")) for _ in range(2)]
    assert [b.stream for b in backends] == [0, 1]
    next(turn)
    # 0 and 1 are taken
    backends.append(graphs.CudaBackend(torch.device("cuda")))
    assert backends[2].stream == 2
    # none is left: one is shared
    assert graphs.CudaBackend(torch.device("cuda")).stream in range(3)
    del backends[1]
    gc.collect()
    assert graphs.CudaBackend(torch.device("cuda")).stream == 1
