"""The backend "fused_diffusion" of `torch.compile`: the graphs that Dynamo captures, planned for the CPU."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from .accelerate import check_precision
from .accelerated_forward import AcceleratedForward


class _Bound(nn.Module):
    """A captured graph with its parameters and buffers as its own: `forward` takes the other arguments."""

    def __init__(self, graph_module: fx.GraphModule, held: Mapping[int, Tensor]):
        super().__init__()
        self.run = graph_module.forward  # its module is none of this one's, since it changes as it runs
        self.positions = list(held)
        for position, tensor in held.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(f"argument_{position}", tensor)
            else:
                self.register_buffer(f"argument_{position}", tensor)

    def forward(self, *given: Any) -> Any:
        arguments = list(given)
        for position in self.positions:  # they ascend
            arguments.insert(position, getattr(self, f"argument_{position}"))
        return self.run(*arguments)


def _is_held(argument: object) -> bool:
    """Whether Dynamo passes a tensor that the module holds: a parameter, or a buffer, which it marks."""
    marked = hasattr(argument, "_dynamo_static_input_type")
    return isinstance(argument, nn.Parameter) or (isinstance(argument, Tensor) and marked)


def fused_diffusion(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles a graph of Dynamo as `diffusion.accelerate` does a module.

    Used by name, `torch.compile(model, backend="fused_diffusion", options={"precision": "fast"})`. Each
    graph between two breaks has a plan of its own. A graph that cannot be planned runs as it was captured.

    options: "precision", "exact" (default) or "fast". mode: is not used.
    ValueError: another option, or an unknown precision.
    """
    unknown = set(options or {}) - {"precision"}
    if unknown:
        raise ValueError(f'the option of "fused_diffusion" is precision, not {", ".join(sorted(unknown))}')
    precision = (options or {}).get("precision", "exact")
    check_precision(precision)
    planned: AcceleratedForward | None = None
    held: dict[int, Tensor] = {}

    def run(*arguments: Any) -> Any:
        nonlocal planned, held
        if planned is None or not all(arguments[i] is tensor for i, tensor in held.items()):
            held = {i: argument for i, argument in enumerate(arguments) if _is_held(argument)}
            bound = _Bound(graph_module, held).eval()
            planned = AcceleratedForward(bound, precision, numbers_vary=False)  # numbers are sizes
        return planned(*(argument for i, argument in enumerate(arguments) if i not in held))

    return run
