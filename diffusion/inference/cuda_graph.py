"""A function as a CUDA graph: captured once, replayed from then on."""

from collections.abc import Callable
from typing import Any

import torch

from ..utils.device import EXCLUSIVE


def capture_cuda_graph(
    function: Callable[[], None], changed: list[torch.Tensor], pool: Any
) -> Callable[[int], None]:
    """Captures `function`, on the device of the tensors; returns what replays its graph a number of times.

    changed: the tensors that `function` changes. It runs twice before the capture, on a side stream, as
    PyTorch asks for; `changed` then gets its former values back. pool: of `torch.cuda.graph_pool_handle`; its
    memory is for all graphs of which no two run at once, and of which none reads another's tensors.

    One thread captures at a time. Others may use the device meanwhile.
    """
    device = changed[0].device
    with EXCLUSIVE, torch.cuda.device(device):
        stream, own = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        saved = [tensor.clone() for tensor in changed]
        stream.wait_stream(own)
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        own.wait_stream(stream)
        for tensor, value in zip(changed, saved, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        # Without a stream of this device, the graph would be of the device that captured first.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            function()

    def replay(count: int) -> None:
        with torch.cuda.device(device):
            for _ in range(count):
                graph.replay()

    return replay
