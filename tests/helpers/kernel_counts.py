"""Counts the kernels that PyTorch would launch on a CUDA device, and the bytes that they would move."""

from collections import Counter

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that launch nothing: views, and memory without values.
FREE = {"device", "empty", "empty_strided", "empty_like", "new_empty", "detach", "alias"}
SHUFFLES = {"pixel_shuffle", "pixel_unshuffle"}  # views, where the factor is 1
KINDS = {
    "convolution": "convolution",
    "group_norm_silu": "norm",
    "attention": "attention",
    "biased_sum_": "biased sum",
    "addmm": "linear map",
    "addmm_": "linear map",
    "mm": "linear map",
    "cat": "concatenation",
    "add": "sum",
    "add_": "sum",
    "upsample_nearest2d": "doubling",
    "constant_pad_nd": "padding",
    "index_select": "embedding",
    "remainder": "embedding",
    "step_embeddings_": "embedding",
    "reverse_step_": "reverse step",
}


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


class KernelCounts(TorchDispatchMode):
    """kernels, bytes: by kind. Each kernel reads its inputs and writes its outputs once.

    PyTorch convolves in channels_last where the input or the weight is, and copies the other. cuDNN adds no
    bias; cuBLAS adds one as it multiplies. A padding fills its output, and then copies its input.
    """

    def __init__(self):
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def count(self, kind: str, *moved: Tensor) -> None:
        self.kernels[kind] += 1
        self.bytes[kind] += sum(map(size, moved))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        free = function.is_view or name in FREE or (name in SHUFFLES and args[1] == 1)
        if free or not any(tensor.is_cuda for tensor in [*inputs, *outputs]):
            return result
        if name == "convolution":
            x, weight, bias = args[:3]
            for kind, tensor in (("copy of a weight", weight), ("copy of a map", x)):
                if tensor.stride(1) != 1 or not tensor.is_contiguous(memory_format=torch.channels_last):
                    self.count(kind, tensor, tensor)
            self.count("convolution", x, weight, *outputs)
            if bias is not None:
                self.count("bias of a convolution", *outputs, *outputs)
            return result.contiguous(memory_format=torch.channels_last)  # fake tensors ask no cuDNN
        if name == "constant_pad_nd":
            self.count("padding", *outputs)
            outputs = inputs
        if name == "attention":  # its sums of exponentials are a small part
            outputs = outputs[:1]
        written = [
            value
            for value, argument in zip(args, function._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor)
        ]
        reads = inputs
        if name == "biased_sum_":  # out and copy are only written
            reads, outputs = [t for t in args[:3] if t is not None], [t for t in args[3:5] if t is not None]
        elif name == "addmm_":
            outputs = written
        self.count(KINDS.get(name, name), *reads, *outputs)
        return result

    def table(self) -> str:
        """A line for each kind of kernel, and one for all."""
        rows = [(kind, count, self.bytes[kind]) for kind, count in self.kernels.most_common()]
        rows.append(("all", self.kernels.total(), self.bytes.total()))
        return "\n".join(f"{kind:24}{count:6}{moved / 1e9:9.2f} GB" for kind, count, moved in rows)
