"""Stand-ins for a CUDA device in a dry run: the same lines of the other files run, on the CPU.

Events read the host's clock, a capture runs the captured function, a replay does nothing.
"""

import time
from types import SimpleNamespace
from typing import Any

import torch


def preload() -> None:
    """Imports the modules of all parts once, before the processes are forked."""
    import diffusers  # noqa: F401
    import pytest  # noqa: F401

    import diffusion.training.trainer  # noqa: F401

    torch.set_num_threads(1)  # a process with threads of OpenMP cannot be forked


class Event:
    def __init__(self, enable_timing: bool = False):
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: "Event") -> float:
        return max(1e-6, 1e3 * (other.time - self.time))


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: Any) -> None:
        pass


class CUDAGraph:
    def __new__(cls, keep_graph: bool = False):
        return super().__new__(cls)

    def __init__(self, keep_graph: bool = False):
        self.captured = False

    def replay(self) -> None:
        if not self.captured:
            raise RuntimeError("a graph is replayed that was never captured")


class Capture:
    """torch.cuda.graph"""

    def __init__(self, graph: CUDAGraph, **options: Any):
        self.graph = graph

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, *exception: Any) -> None:
        self.graph.captured = kind is None


def install() -> None:
    """Takes the place of those functions of torch.cuda that the parts call, in this process."""
    from . import device

    replaced = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "graph": Capture,
        "stream": lambda stream: stream,
        "current_stream": Stream,
        "current_device": lambda: "cpu",
        "synchronize": lambda *device: None,
        "mem_get_info": lambda *device: (1 << 30, 1 << 30),
        "reset_peak_memory_stats": lambda *device: None,
        "max_memory_allocated": lambda *device: 0,
        "max_memory_reserved": lambda *device: 0,
        "empty_cache": lambda: None,
        "get_device_properties": lambda *device: SimpleNamespace(
            name="no device", multi_processor_count=0, L2_cache_size=1 << 14, total_memory=0, major=0, minor=0
        ),
    }
    for name, stand_in in replaced.items():
        setattr(torch.cuda, name, stand_in)
    device.node_count = lambda graph: int(graph.captured)
    device.MEMORY = 1 << 20
    device.CALLS = (2, 3)
