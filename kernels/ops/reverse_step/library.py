"""reverse_step as torch.library operators: schemas and fakes, the same for every backend.

The compiled libraries implement `fused_diffusion::reverse_step` and `fused_diffusion::reverse_step_`.
x, x0_prev, x0, noise: float32 of one shape, contiguous. model_output, model_output_uncond: [B, C, ...] or
[B, 2C, ...], contiguous or channels_last. sample_ids: int64 [B]. table: float64 [rows, ROW_LENGTH].
counter: int64 [4], (step, seed, stream of step 0, 0). Both are on x's device. The row is table[step] and the
noise stream is stream + step, so that one CUDA graph serves every step. The last entry counts CUDA blocks
within a call.
"""

import torch
from torch import Tensor

from ..._library import define as define_operator
from ..philox.library import as_int64, sample_ids_tensor
from .arguments import Arguments, InPlaceArguments
from .coefficients import as_coefficients

SCHEMA = (
    "(Tensor x, Tensor model_output, Tensor? model_output_uncond, Tensor? x0_prev, Tensor? noise, "
    "Tensor table, Tensor counter, Tensor sample_ids) -> (Tensor, Tensor)"
)
SCHEMA_IN_PLACE = (
    "(Tensor(a!) x, Tensor model_output, Tensor? model_output_uncond, Tensor(b!)? x0, Tensor? noise, "
    "Tensor table, Tensor(c!) counter, Tensor sample_ids, Tensor(d!)? unet_input) -> ()"
)


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def define(name: str) -> None:
    """Defines fused_diffusion::<name> and, in place, fused_diffusion::<name>_, as yet without kernels."""
    define_operator(name, SCHEMA, _fake)
    define_operator(f"{name}_", SCHEMA_IN_PLACE)


define("reverse_step")

# out[b] = embeddings[step % S, label_index[b]], the embedding of each image at a sampler's step. embeddings:
# [S, L, E], of S steps from a multiple of S on and of L labels. counter: as above. label_index: int64 [B].
# out: [B, E], of the dtype of embeddings.
step_embeddings_ = define_operator(
    "step_embeddings_", "(Tensor embeddings, Tensor counter, Tensor label_index, Tensor(a!) out) -> ()"
)

# out = x, of the same shape, strides and dtype, contiguous or channels_last.
copy_dense_ = define_operator("copy_dense_", "(Tensor x, Tensor(a!) out) -> ()")


def step_counter(seed: int, stream: int, device: torch.device | str) -> Tensor:
    return torch.tensor([0, as_int64(seed), stream, 0], dtype=torch.int64, device=device)


def operator_arguments(arguments: Arguments) -> tuple:
    """The operator's arguments, from those of the public function."""
    x, model_output, row, model_output_uncond, x0_prev, noise, seed, sample_ids, stream = arguments
    table = torch.tensor([as_coefficients(row)], dtype=torch.float64, device=x.device)
    counter = step_counter(seed, stream, x.device)
    ids = sample_ids_tensor(sample_ids, x.shape[0], x.device)
    return x, model_output, model_output_uncond, x0_prev, noise, table, counter, ids


def in_place_arguments(arguments: InPlaceArguments) -> tuple:
    """The operator's arguments, from those of the public function."""
    x, model_output, table, counter, sample_ids, model_output_uncond, x0, noise, unet_input = arguments
    return x, model_output, model_output_uncond, x0, noise, table, counter, sample_ids, unet_input
