"""A function as a CUDA graph: captured once, replayed from then on."""

from collections.abc import Callable

import torch


def capture_cuda_graph(function: Callable[[], None], changed: list[torch.Tensor]) -> Callable[[], None]:
    """Captures `function` and returns the replay of its graph.

    changed: the tensors that `function` changes. It runs twice before the capture, on a side stream, as
    PyTorch asks for; `changed` then gets its former values back.
    """
    saved = [tensor.clone() for tensor in changed]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    for tensor, value in zip(changed, saved, strict=True):
        tensor.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
