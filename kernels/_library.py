"""Operators of torch.library: schema, fake implementation and derivative, in the form that all ops share.

Names are without the namespace `fused_diffusion`. An operator that is defined here has no kernel until the
compiled library is loaded or `implement` gives it one in Python.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch

NAMESPACE = "fused_diffusion"


class Definition(NamedTuple):
    """An operator's schema, and its fake implementation.

    schema: as torch.library.define takes it. fake: makes the outputs, without values, from the arguments.
    """

    schema: str
    fake: Callable[..., Any]


def no_output(*arguments: object) -> None:
    """The fake of an operator that only writes to its arguments."""


def define(name: str, schema: str, fake: Callable[..., Any] = no_output) -> Any:
    """Defines an operator and returns it, to be called with its arguments in the schema's order."""
    torch.library.define(f"{NAMESPACE}::{name}", schema)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    return getattr(torch.ops.fused_diffusion, name)


def implement(name: str, function: Callable[..., Any]) -> None:
    """Implements an operator in Python, on the CPU (for Triton's interpreter) and on CUDA devices."""
    torch.library.impl(f"{NAMESPACE}::{name}", ("cpu", "cuda"), function)


def define_with_backward(
    name: str,
    forward: Definition,
    backward: Definition,
    *,
    op: str,
    setup_context: Callable[..., None],
    derivative: Callable[..., tuple],
) -> None:
    """Defines <name> and <name>_backward, an operator and the one that its gradient calls.

    setup_context: as torch.library.register_autograd takes it. derivative: makes of the operator
    <name>_backward, the context and the gradients of the outputs, the gradient of each input. There is no
    second derivative, and the error that says so names `op`.
    """
    define(name, *forward)
    run_backward = define(f"{name}_backward", *backward)

    def differentiate(ctx: Any, *grads: torch.Tensor) -> tuple:
        return derivative(run_backward, ctx, *grads)

    def no_second_derivative(ctx: Any, *grads: torch.Tensor) -> NoReturn:
        raise NotImplementedError(f"the gradient of {op} cannot be differentiated again")

    torch.library.register_autograd(f"{NAMESPACE}::{name}", differentiate, setup_context=setup_context)
    torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", no_second_derivative)
