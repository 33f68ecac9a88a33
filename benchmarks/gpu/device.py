"""Times on a CUDA device: calls in graphs, over more memory than its cache holds."""

import ctypes
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

REPLAYS = 10
CALLS = (4, 200)  # fewest and most calls in one graph
MEMORY = 6 << 30  # bytes that the buffers of one comparison may take


def calls_beyond_cache(nbytes: int, largest: int = CALLS[1]) -> tuple[int, bool]:
    """Number of calls with own buffers of nbytes each, and whether they exceed twice the cache."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    wanted = math.ceil(2 * cache / nbytes) + 1
    count = max(1, min(max(CALLS[0], wanted), largest, MEMORY // nbytes))
    return count, count >= wanted


def capture(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of `run`. An error during capture leaves the process unusable.

    What `run` returns is kept until it is captured, so that its parts lie in memory of their own.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # the first call compiles, tunes and allocates
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    graph.kept = kept
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph, replays: int = REPLAYS) -> float:
    """Median time of a replay among several in a row, so that it contains no launch from the host."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 3)]
    for event in events:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(intervals(events[2:]))


def intervals(events: Sequence[torch.cuda.Event]) -> list[float]:
    """Seconds from each event to the next."""
    return [1e-3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def call_seconds(function: Callable[..., Any], calls: Sequence[tuple[tuple, dict]]) -> float:
    """Time of one call, from a graph with one call for each of these arguments."""
    graph = capture(lambda: [function(*args, **kwargs) for args, kwargs in calls])
    return replay_seconds(graph) / len(calls)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copies larger than the cache."""
    size = 1 << 27 if torch.cuda.mem_get_info()[0] > 16 << 30 else 1 << 20  # float32 numbers
    where = torch.cuda.current_device()
    calls = [(tuple(torch.randn(size, device=where) for _ in range(2)), {}) for _ in range(4)]
    return 8 * size / call_seconds(lambda x, y: y.copy_(x), calls)


class Watched:
    """The captured graphs, and the end of each of their replays."""

    def __init__(self):
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.events: list[torch.cuda.Event] = []

    def step_seconds(self) -> float | None:
        """Median time from the end of one replay to that of the next, if there are at least three."""
        if len(self.events) < 3:
            return None
        torch.cuda.synchronize()
        return statistics.median(intervals(self.events))

    def nodes(self) -> tuple[list[int], str | None]:
        """The number of nodes of each graph, by the driver; or none, with the reason."""
        try:
            return [node_count(graph) for graph in self.graphs], None
        except (OSError, RuntimeError, AttributeError) as error:
            return [], f"nodes of graphs cannot be counted: {error}"


def node_count(graph: torch.cuda.CUDAGraph) -> int:
    """Nodes of a graph that was made with keep_graph=True."""
    count = ctypes.c_size_t()
    graph_of_driver = ctypes.c_void_p(graph.raw_cuda_graph())
    status = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(graph_of_driver, None, ctypes.byref(count))
    if status:
        raise RuntimeError(f"cuGraphGetNodes gave status {status}")
    return count.value


@contextmanager
def watched_graphs() -> Iterator[Watched]:
    """Records all graphs captured within the context, and keeps them, so that their nodes can be counted."""
    watched, original = Watched(), torch.cuda.CUDAGraph

    class Graph(original):
        def __new__(cls, keep_graph: bool = False):
            return super().__new__(cls, True)

        def __init__(self, keep_graph: bool = False):
            super().__init__(True)
            watched.graphs.append(self)

        def replay(self) -> None:
            super().replay()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            watched.events.append(event)

    torch.cuda.CUDAGraph = Graph
    try:
        yield watched
    finally:
        torch.cuda.CUDAGraph = original
        watched.graphs.clear()
