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


class OperatorWithBackward(NamedTuple):
    """An operator and the one that its gradient calls, which every backend defines with the same schemas.

    op: the public op, which errors name. setup_context: as torch.library.register_autograd takes it.
    derivative: makes of the operator <name>_backward, the context and the gradients of the outputs, the
    gradient of each input.
    """

    op: str
    forward: Definition
    backward: Definition
    setup_context: Callable[..., None]
    derivative: Callable[..., tuple]

    def define(self, name: str) -> None:
        """Defines <name> and <name>_backward, as yet without kernels. There is no second derivative."""
        define(name, *self.forward)
        run_backward = define(f"{name}_backward", *self.backward)

        def differentiate(ctx: Any, *grads: torch.Tensor) -> tuple:
            return self.derivative(run_backward, ctx, *grads)

        def no_second_derivative(ctx: Any, *grads: torch.Tensor) -> NoReturn:
            raise NotImplementedError(f"the gradient of {self.op} cannot be differentiated again")

        autograd = torch.library.register_autograd
        autograd(f"{NAMESPACE}::{name}", differentiate, setup_context=self.setup_context)
        autograd(f"{NAMESPACE}::{name}_backward", no_second_derivative)

    def register(self, name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        """Defines both operators and implements them in Python, on the CPU and on CUDA devices."""
        self.define(name)
        implement(name, forward)
        implement(f"{name}_backward", backward)
