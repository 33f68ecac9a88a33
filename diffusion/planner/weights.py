"""Weights: a network's weights, packed once for all plans of it."""

import dataclasses
import hashlib
from collections.abc import MutableMapping
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..kernels import _native
from ..kernels.ops.convolution import native as convolution
from ..kernels.ops.convolution.packing import PackedWeight, Packing, choose_packing, interleave_gates, pack
from ..utils.memory import total_memory
from .graph import Value

MAX_SHARE_OF_MEMORY = 1 / 4  # largest share of all memory for packed weights

# Float32 networks of at most this many parameters are convolved as accurately as PyTorch does, in half again
# the time. Int8 limbs have two to three times its error and F(4 x 4, 3 x 3) up to 1.3 times, and a sampler
# multiplies it: the images of such a network of 370,000 parameters were 1.1e-4 off after ten steps.
SMALL_NETWORK = 2**20


Key = tuple[object, ...]  # of a constant


class Weights:
    """Packed convolutions and copied vectors of a network, for feature maps of one dtype.

    Everything is a copy of the weights as they were at first use.
    """

    def __init__(self, parameters: list[Tensor], dtype: torch.dtype):
        self.dtype, self.simd = dtype, _native.simd_in_use()
        # Whether the feature maps are narrower than the network's own.
        self.narrows = any(p.is_floating_point() and p.dtype.itemsize > dtype.itemsize for p in parameters)
        self._largest_m = self._affordable_m(parameters)
        small = sum(parameter.numel() for parameter in parameters) <= SMALL_NETWORK
        self.accurate = dtype == torch.float32 and small
        if self.accurate:
            self._largest_m = min(self._largest_m, 2)
        # Products in int8 limbs need a fourth row, a bound on the magnitude of each channel.
        uses_limbs = self.simd == "amx" and dtype != torch.bfloat16 and not self.accurate
        self.affine_rows = 4 if uses_limbs else 3
        self._packed: dict[tuple[Key, Packing, bool], PackedWeight] = {}
        self._copies: dict[tuple[Key, torch.dtype], Tensor] = {}
        # Of tensors that are computed anew for each plan, such as a table of positions; plans keep them.
        self._passing: MutableMapping[tuple[Key, torch.dtype], Tensor] = WeakValueDictionary()
        self._parameters = parameters  # memory that was freed could become another tensor's
        self._memory = {parameter.data_ptr() for parameter in parameters}

    def _affordable_m(self, parameters: list[Tensor]) -> int:
        """The largest m of Winograd's algorithm whose packed weights fit MAX_SHARE_OF_MEMORY; 0 for none."""
        size = 2 if self.dtype == torch.bfloat16 and convolution.multiplies_bf16_pairs() else 4
        numbers = sum(p.numel() for p in parameters if p.ndim == 4 and p.shape[2:] == (3, 3)) * size
        budget = MAX_SHARE_OF_MEMORY * (total_memory(torch.device("cpu")) or float("inf"))
        return next((m for m in (4, 2) if numbers * (m + 2) ** 2 / 9 <= budget), 0)

    def packed(
        self,
        value: Value,
        height: int,
        width: int,
        dtype: torch.dtype,
        *,
        winograd: bool = False,
        gated: bool = False,
    ) -> PackedWeight:
        """A weight [K, C], [K, C, 1, 1] or [K, C, 3, 3], packed for a map of this size and dtype.

        gated: whether it is of a GEGLU layer, whose rows are in another order.
        """
        source = self._constant(value)
        weight = source.detach()
        weight = weight if weight.ndim == 4 else weight[:, :, None, None]
        simd = "avx512" if self.accurate and self.simd == "amx" else self.simd
        packing = choose_packing(weight.shape, height, width, dtype, simd, winograd)
        packing = packing._replace(winograd_m=min(packing.winograd_m, self._largest_m))
        key = self._key(source), packing, gated
        if key not in self._packed:
            packed = pack(interleave_gates(weight, packing) if gated else weight, packing)
            shape = torch.empty_like(packed.weight, device="meta")  # weights that were joined can be freed
            self._packed[key] = dataclasses.replace(packed, weight=shape)
        return self._packed[key]

    def vector(self, value: Value | None) -> Tensor | None:
        """A bias, or the weight of a norm, as float32; None for None."""
        return None if value is None else self.copy(value, torch.float32)

    def gated_vector(self, value: Value | None, packing: Packing) -> Tensor | None:
        """The bias of a GEGLU layer, as float32, in the order of the rows of its packed weight."""
        vector = self.vector(value)
        return None if vector is None else interleave_gates(vector, packing)

    def copy(self, value: Value, dtype: torch.dtype | None = None) -> Tensor:
        """A constant's copy, in its own dtype or in another one."""
        source = self._constant(value)
        key = self._key(source), source.dtype if dtype is None else dtype
        copies = self._copies if source.data_ptr() in self._memory else self._passing
        found = copies.get(key)
        if found is None:
            found = copies[key] = source.detach().to(key[1]).clone(memory_format=torch.contiguous_format)
        return found

    def packings(self) -> list[Packing]:
        """The formats in use."""
        return [packing for _, packing, _ in self._packed]

    def packed_bytes(self) -> int:
        """Bytes of all packed weights and copies."""
        tensors = [
            *self._copies.values(),
            *self._passing.values(),
            *(weight.data for weight in self._packed.values()),
        ]
        return sum(tensor.nbytes for tensor in tensors)

    def _constant(self, value: Value) -> Tensor:
        assert value.constant is not None
        return value.constant

    def _key(self, constant: Tensor) -> Key:
        """Equal for two plans' equal constants: of what is computed anew for each plan, a digest."""
        layout = constant.dtype, tuple(constant.shape), constant.stride()
        if constant.data_ptr() in self._memory:
            return constant.data_ptr(), *layout
        numbers = constant.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return hashlib.blake2b(numbers.data).digest(), *layout
