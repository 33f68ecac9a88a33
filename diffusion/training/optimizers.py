"""The optimizers that a recipe can name, over a network's weights."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.ops.newton_schulz import newton_schulz, supports
from ..models.unet import UNet
from ..utils.device import torch_multiplies_bfloat16
from .recipe import Recipe

MOMENTUM = 0.95  # Muon's, as Jordan et al. recommend


def contiguous_view(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A view [O, H, W, I] of a tensor [O, I, H, W], if the parameter of its shape is in channels_last."""
    last = parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    return tensor.permute(0, 2, 3, 1) if last else tensor


class Muon(torch.optim.Muon):
    """torch.optim.Muon with Nesterov momentum and the rates of "match_rms_adamw", from the same state.

    On CPUs with AMX the orthogonalisation is `kernels.ops.newton_schulz`. CPUs that do not multiply bfloat16
    compute it in float32. On a GPU matrices of one shape are orthogonalised as one batch, in a tenth of the
    launches. So weights differ by rounding.
    """

    def __init__(self, weights: list[torch.Tensor], **options: Any):
        super().__init__(weights, nesterov=True, adjust_lr_fn="match_rms_adamw", **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Moves the weights, all of which have gradients, by one step."""
        orthogonalise = _way_to_orthogonalise(self.param_groups[0]["params"][0].device)
        if closure is not None or orthogonalise is None:
            return super().step(closure)
        for group in self.param_groups:
            weights = group["params"]
            for weight in weights:
                if "momentum_buffer" not in self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            grads = [weight.grad for weight in weights]
            momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"])
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            for weight, direction in zip(weights, orthogonalise(updates, group), strict=True):
                weight.add_(direction, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)


Matrices = Sequence[torch.Tensor]  # after an orthogonalisation in bfloat16, with singular values near 1


def _way_to_orthogonalise(device: torch.device) -> Callable[[Matrices, dict], Matrices] | None:
    """The function of matrices and Muon's options, or None to leave it to PyTorch."""
    if device.type == "cuda":
        return orthogonalised_in_batches
    if supports(device):
        return _orthogonalised_by_amx
    return None if torch_multiplies_bfloat16(device) else orthogonalised_in_float32


def _orthogonalised_by_amx(matrices: Matrices, group: dict) -> Matrices:
    return [_orthogonalised(matrix, group) for matrix in matrices]


def _orthogonalised(matrix: torch.Tensor, group: dict) -> torch.Tensor:
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x).contiguous()
    x /= torch.linalg.vector_norm(x).clamp(min=group["eps"])
    x = newton_schulz(x, group["ns_steps"], *group["ns_coefficients"])
    return x.T if tall else x


def orthogonalised_in_float32(matrices: Matrices, group: dict) -> Matrices:
    """Where PyTorch would compute products of bfloat16 number by number."""
    return orthogonalised_in_batches(matrices, group, torch.float32)


def orthogonalised_in_batches(
    matrices: Matrices, group: dict, dtype: torch.dtype = torch.bfloat16
) -> Matrices:
    """Those of one shape together, by the same iteration: X <- a X + (b X X^T + c (X X^T)^2) X."""
    alike: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault(matrix.shape, []).append(i)
    a, b, c = group["ns_coefficients"]
    results = list(matrices)
    for shape, indices in alike.items():
        x = torch.stack([matrices[i] for i in indices]).to(dtype)
        tall = shape[0] > shape[1]
        x = (x.mT if tall else x).contiguous()
        x /= torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=group["eps"])
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        for i, result in zip(indices, x.mT if tall else x, strict=True):
            results[i] = result
    return results


class Optimizer:
    """One step of the recipe's optimizer over all parameters of a UNet.

    "adam" and "adamw" treat all weights alike. "muon" (Jordan et al. 2024; `Muon`) moves every
    convolution and attention projection between the first and the last convolution by the orthogonalised
    momentum of its matrix [outputs, inputs * taps], scaled to the length of an Adam step (Liu et al. 2025,
    arXiv 2502.16982, section 2.2); all other weights by Adam.
    """

    def __init__(self, recipe: Recipe, unet: UNet, device: torch.device):
        self.parameters = dict(unet.named_parameters())
        matrices = set(_matrices(unet)) if recipe.optimizer == "muon" else set()
        # Fused Adam on the CPU copies tensors that are not contiguous, so it gets contiguous views of
        # channels_last weights, in the shape [O, H, W, I]. Muon gets views as matrices.
        self.weights = {}
        for name, parameter in self.parameters.items():
            weight = contiguous_view(parameter.detach(), parameter)
            self.weights[name] = (weight.flatten(1) if name in matrices else weight).requires_grad_()
        kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
        options: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
        fused = device.type in ("cpu", "cuda")
        adam = kind([w for name, w in self.weights.items() if name not in matrices], fused=fused, **options)
        self.parts: list[torch.optim.Optimizer] = [adam]
        self._part_of: dict[str, torch.optim.Optimizer] = dict.fromkeys(self.weights, adam)
        if matrices:
            options |= {"momentum": MOMENTUM}
            muon = Muon([w for name, w in self.weights.items() if name in matrices], **options)
            self.parts.append(muon)
            self._part_of |= dict.fromkeys(matrices, muon)

    def set_learning_rate(self, rate: float) -> None:
        """Sets the learning rate of the next step."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate

    def zero_grad(self) -> None:
        """Removes the gradients of the parameters and of the optimizer's views."""
        for tensor in (*self.weights.values(), *self.parameters.values()):
            tensor.grad = None

    def take_gradients(self) -> None:
        """Hands the parameters' gradients to the optimizer's views of them."""
        for name, weight in self.weights.items():
            parameter = self.parameters[name]
            assert parameter.grad is not None, f"the loss does not depend on {name}"
            weight.grad = contiguous_view(parameter.grad, parameter).reshape(weight.shape)

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """The optimizer's state of a parameter: a step count, and tensors of the parameter's shape."""
        parameter, weight = self.parameters[name], self.weights[name]
        state = self._part_of[name].state.get(weight, {})
        return {
            key: value if value.ndim == 0 else value.as_strided(parameter.shape, parameter.stride())
            for key, value in state.items()
        }

    def keys(self, name: str) -> tuple[str, ...]:
        """The names in `state` after a step."""
        muon = isinstance(self._part_of[name], torch.optim.Muon)
        return ("momentum_buffer",) if muon else ("step", "exp_avg", "exp_avg_sq")

    def set_state(self, name: str, state: dict[str, torch.Tensor]) -> None:
        """The inverse of `state`; the tensors are copied."""
        parameter, weight = self.parameters[name], self.weights[name]
        # Adam keeps its step count on the CPU, unless it is fused on CUDA.
        step_device = parameter.device if parameter.is_cuda else "cpu"
        self._part_of[name].state[weight] = {
            key: value.to(step_device)
            if value.ndim == 0
            else contiguous_view(
                torch.empty_like(parameter, requires_grad=False).copy_(value), parameter
            ).reshape(weight.shape)
            for key, value in state.items()
        }


def _matrices(unet: UNet) -> Iterable[str]:
    """Names of the weights that Muon updates: matrices of the levels, without the embedding's projections."""
    for part in ("down", "mid", "up"):
        for name, module in getattr(unet, part).named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                yield f"{part}.{name}.weight"
