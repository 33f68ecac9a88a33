"""A UNet planned for sampling on a CPU: packed weights, a fixed layout of buffers, fused operators.

The plan computes `UNet.denoise` as a fixed list of calls of compiled operators. A convolution applies the
normalisation, modulation and SiLU before it, and adds its bias and the residual. Skip connections are written
where the decoder reads them, so that nothing is concatenated. Each evaluation uses the same buffers.
"""

import copy
import itertools
import threading
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ..kernels import _native
from ..kernels._recorded_calls import recording
from ..kernels.ops.attention.library import attention_amx_
from ..kernels.ops.convolution import native as convolution
from ..kernels.ops.convolution.arguments import Conv3x3Arguments
from ..kernels.ops.convolution.library import convolution_, convolution_arguments, upsample_nearest2x_
from ..kernels.ops.convolution.packing import PackedWeight, Packing, choose_packing, pack
from ..kernels.ops.group_norm_silu.library import group_norm_affine_
from ..models.blocks import Attention, Downsample, Norm, Resample, ResBlock, Upsample
from ..models.unet import UNet
from ..utils.device import DTYPES
from ..utils.memory import total_memory

_Call = tuple[Callable, tuple]
ChannelAffine = tuple[Tensor | None, bool]  # [affine_rows, N, C] of a norm, or None; whether SiLU follows
_RECORDABLE: dict[Callable, str] = {  # operators whose calls can be recorded, by category
    group_norm_affine_: "norm",
    convolution_: "convolution",
    attention_amx_: "attention",
    upsample_nearest2x_: "rest",
}
MAX_SHARE_OF_MEMORY = 1 / 4  # largest share of all memory for packed weights
# For attention by AMX, which holds the logits of some queries at all positions.
MAX_PLANNED_AMX_POSITIONS = 2048

# Float32 networks of at most this many parameters are convolved as accurately as PyTorch does, in half again
# the time. Int8 limbs and F(4 x 4, 3 x 3) have two to three times its error, and a sampler multiplies it: the
# images of a network of 370,000 parameters were 1.1e-4 off after ten steps.
SMALL_NETWORK = 2**20


class PlannedUNet:
    """`UNet.denoise` on the CPU, by a plan for each size of input, with a copy of the UNet's present weights.

    dtype: of the feature maps, float32, bfloat16 or float16. In bfloat16, processors that multiply in it do
    so; elsewhere the arithmetic is in float32. The result of an image does not depend on its batch.
    ValueError: `unsupported` gives a reason.

    The UNet must not be altered (`models.structure.altered`), since the plan follows its configuration.
    """

    def __init__(self, unet: UNet, dtype: torch.dtype):
        reason = unsupported(unet, dtype)
        if reason is not None:
            raise ValueError(f"this UNet cannot be planned for the CPU: {reason}")
        self.unet, self.dtype = unet, dtype
        self.simd = _native.simd_in_use()
        self._largest_m = self._affordable_m()
        self._accurate = dtype == torch.float32 and unet.config.num_parameters <= SMALL_NETWORK
        if self._accurate:
            self._largest_m = min(self._largest_m, 2)
        # Products in int8 limbs need a fourth row, a bound on the magnitude of each channel.
        uses_limbs = self.simd == "amx" and dtype != torch.bfloat16 and not self._accurate
        self.affine_rows = 4 if uses_limbs else 3
        self._weights: dict[tuple[nn.Module, Packing], PackedWeight] = {}
        self._vectors: dict[Tensor, Tensor] = {}
        self._norms: dict[Norm, Norm] = {}
        self._thread_local = threading.local()  # the plan of each thread, with its buffers

    def denoise(self, x: Tensor, embedding: Tensor) -> Tensor:
        """As `UNet.denoise`. The result is a buffer, which the thread's next call overwrites."""
        plan: _Plan | None = getattr(self._thread_local, "plan", None)
        if plan is None or plan.input.shape != x.shape:
            self._thread_local.plan = plan = None  # frees the buffers of another size first
            with torch.inference_mode(False), torch.no_grad():  # later calls may be in any mode
                self._thread_local.plan = plan = _Plan(self, *x.shape)
        return plan.run(x, embedding)

    def calls(self) -> list[tuple[str, Callable[[], None]]]:
        """The calls of the last evaluation, in order, each with its kind, to be timed one by one.

        The kinds are "convolution", "norm", "attention" and "rest".
        """
        return [(_kind(call[0]), _bound([call])[0]) for call in self._thread_local.plan.calls]

    def _affordable_m(self) -> int:
        """The largest m of Winograd's algorithm whose packed weights fit MAX_SHARE_OF_MEMORY; 0 for none."""
        convs = [m for m in self.unet.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        size = 2 if self.dtype == torch.bfloat16 and convolution.multiplies_bf16_pairs() else 4
        numbers = sum(m.weight.numel() for m in convs) * size
        budget = MAX_SHARE_OF_MEMORY * (total_memory(torch.device("cpu")) or float("inf"))
        return next((m for m in (4, 2) if numbers * (m + 2) ** 2 / 9 <= budget), 0)

    def weight(self, module: nn.Conv2d | nn.Linear, height: int, width: int, winograd: bool) -> PackedWeight:
        """The module's weight, packed for a feature map of this size; a linear layer is a convolution."""
        weight = module.weight.detach()
        weight = weight if weight.ndim == 4 else weight[:, :, None, None]
        simd = "avx512" if self._accurate and self.simd == "amx" else self.simd
        packing = choose_packing(weight.shape, height, width, self.dtype, simd, winograd)
        packing = packing._replace(winograd_m=min(packing.winograd_m, self._largest_m))
        if (module, packing) not in self._weights:
            self._weights[module, packing] = pack(weight, packing)
        return self._weights[module, packing]

    def norm(self, norm: Norm) -> Norm:
        """A copy of a norm, with its present weights."""
        if norm not in self._norms:
            self._norms[norm] = copy.deepcopy(norm)
        return self._norms[norm]

    def vector(self, parameter: Tensor | None) -> Tensor | None:
        """A bias, or the weight of a norm, as float32; None for None."""
        if parameter is None:
            return None
        if parameter not in self._vectors:
            self._vectors[parameter] = parameter.detach().float().clone(memory_format=torch.contiguous_format)
        return self._vectors[parameter]


def unsupported(unet: nn.Module, dtype: torch.dtype) -> str | None:
    """The reason why an unaltered UNet cannot be planned, or None."""
    if not isinstance(unet, UNet):
        return f"it is {type(unet).__name__}, not UNet"
    first = next(unet.parameters())
    if first.device.type != "cpu":
        return f"it is on {first.device}, not on the CPU"
    for name, parameter in unet.named_parameters():
        if (parameter.device, parameter.dtype) != (first.device, first.dtype):
            kind = f"{parameter.dtype} on {parameter.device}"
            return f"{name} is {kind}, not {first.dtype} on {first.device} as others are"
    if first.dtype not in DTYPES.values():
        return f"its weights are {first.dtype}, in which nothing can be embedded"
    config = unet.config
    if config.activation != "silu":
        return f"its activation is {config.activation}, and the compiled convolution has SiLU"
    if config.mid_divisor != 1:
        return f"the outputs of its middle blocks are divided by {config.mid_divisor:g}"
    if dtype not in convolution.DTYPES:
        return f"the dtype is {dtype}, not float32, bfloat16 or float16"
    x = torch.empty(0, 1, 4, 4, dtype=dtype, device="cpu")
    packed = PackedWeight(x.new_empty(1, 1, 3, 3), x.new_empty(0, dtype=torch.float32), Packing())
    return convolution.supports(Conv3x3Arguments(x, packed))


class _Plan:
    """The calls for x of one shape, bound to their buffers."""

    def __init__(self, planned: PlannedUNet, batch: int, channels: int, height: int, width: int):
        unet = planned.unet
        self.planned, self.batch = planned, batch
        self.calls: list[_Call] = []
        self._buffers: dict[tuple, Tensor] = {}
        self.input = self._image(channels, height, width)
        patch = unet.config.patch_size
        height, width = height // patch, width // patch
        self.embedding = torch.empty(batch, sum(unet.embedding_sizes), dtype=torch.float32, device="cpu")
        embeddings = iter(self.embedding.split(unet.embedding_sizes, dim=1))  # one for each ResBlock
        self._lay_out(unet, embeddings, height, width)
        self._bound = _bound(self.calls)

    def run(self, x: Tensor, embedding: Tensor) -> Tensor:
        self.input.copy_(x)
        self.embedding.copy_(embedding)
        for run in self._bound:
            run()
        return self.output

    # ---- Buffers.

    def _image(self, channels: int, height: int, width: int) -> Tensor:
        shape = (self.batch, channels, height, width)
        return torch.empty(shape, dtype=self.planned.dtype, device="cpu", memory_format=torch.channels_last)

    def _scratch(self, use: str, channels: int, height: int, width: int) -> Tensor:
        """A feature map that lives until the next call with the same `use` and shape."""
        key = (use, channels, height, width)
        if key not in self._buffers:
            self._buffers[key] = self._image(channels, height, width)
        return self._buffers[key]

    # ---- Calls.

    def _call(self, function: Callable, *arguments: object) -> None:
        self.calls.append((function, arguments))

    def _norm_affine(self, norm: Norm, x: Tensor, **modulation: Tensor) -> ChannelAffine:
        """The affine map of each channel that a norm is for this x, and whether SiLU follows."""
        key = ("affine", x.shape[1])
        if key not in self._buffers:
            self._buffers[key] = x.new_empty(self.planned.affine_rows, *x.shape[:2], dtype=torch.float32)
        affine, silu = self._buffers[key], norm.activation == "silu"
        weight, bias = self.planned.vector(norm.weight), self.planned.vector(norm.bias)
        add, scale, shift = (modulation.get(name) for name in ("add", "scale", "shift"))
        self._call(
            group_norm_affine_, x, norm.groups, weight, bias, norm.eps, add, scale, shift, silu, affine
        )
        return affine, silu

    def _convolve(
        self,
        module: nn.Conv2d | nn.Linear,
        x: Tensor,
        out: Tensor,
        *,
        norm: ChannelAffine = (None, False),
        residual: Tensor | None = None,
        stride: int = 1,
        padding: int | None = None,
        scale: int = 1,
    ) -> None:
        """out = conv(norm(upsampled x)) + bias + residual.

        norm: of `_norm_affine`, with its SiLU. padding: by default half the kernel. scale: 2 for the nearest
        upsampling of x before the convolution.
        """
        kernel = module.weight.shape[-1] if module.weight.ndim == 4 else 1
        height, width = out.shape[2:]
        packed = self.planned.weight(module, height, width, winograd=kernel == 3 and stride == 1)
        affine, silu = norm
        arguments = convolution_arguments(
            x,
            packed,
            out,
            stride=stride,
            padding=padding,
            scale=scale,
            bias=self.planned.vector(module.bias),
            affine=affine,
            silu=silu,
            residual=residual,
        )
        self._call(convolution_, *arguments)

    def _residual_block(self, block: ResBlock, x: Tensor, embedding: Tensor, out: Tensor) -> None:
        size = out.shape[2], out.shape[3]
        hidden = self._scratch("hidden", out.shape[1], *size)
        if block.resample is None:
            self._convolve(block.conv1, x, hidden, norm=self._norm_affine(block.norm1, x))
        elif isinstance(block.resample, Upsample):
            self._convolve(block.conv1, x, hidden, norm=self._norm_affine(block.norm1, x), scale=2)
            x = self._resized(block.resample, x, "upsampled", size)
        else:
            normalised = self._scratch("normalised", x.shape[1], *x.shape[2:])
            self._call(_store, normalised, self.planned.norm(block.norm1), x)
            smaller = self._resized(block.resample, normalised, "pooled", size)
            self._convolve(block.conv1, smaller, hidden)
            x = self._resized(block.resample, x, "downsampled", size)
        names = ("scale", "shift") if block.scale_shift else ("add",)
        modulation = dict(zip(names, embedding.chunk(len(names), dim=1), strict=True))
        if block.skip is not None:
            self._convolve(block.skip, x, out)
            x = out
        self._convolve(
            block.conv2, hidden, out, norm=self._norm_affine(block.norm2, hidden, **modulation), residual=x
        )

    def _resized(self, resample: Downsample | Upsample, x: Tensor, use: str, size: tuple[int, int]) -> Tensor:
        """x in another resolution, without weights, in the scratch buffer `use`."""
        out = self._scratch(use, x.shape[1], *size)
        self._resize(resample, x, out)
        return out

    def _resize(self, resample: Downsample | Upsample, x: Tensor, out: Tensor) -> None:
        if isinstance(resample, Upsample):
            self._call(upsample_nearest2x_, x, out)
        else:
            self._call(_store, out, resample, x)

    def _attend(self, attention: Attention, x: Tensor, out: Tensor) -> None:
        batch, _, height, width = x.shape
        channels = attention.proj.weight.shape[1]  # fewer than x has for `narrow_attention`
        qkv = self._scratch("qkv", 3 * channels, height, width)
        norm: ChannelAffine = (None, False)
        if attention.norm is not None:
            norm = self._norm_affine(attention.norm, x)
        self._convolve(attention.qkv, x, qkv, norm=norm)
        split = qkv.permute(0, 2, 3, 1).view(batch, height * width, 3, attention.heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, H W, channels / heads]
        attended = self._scratch("attended", channels, height, width)
        heads = attended.permute(0, 2, 3, 1).view(batch, height * width, attention.heads, -1).transpose(1, 2)
        scale = q.shape[-1] ** -0.5
        if self.planned.simd == "amx" and height * width <= MAX_PLANNED_AMX_POSITIONS:
            splits = 1 if self.planned.dtype == torch.bfloat16 else 3  # bfloat16 splits of each number
            self._call(attention_amx_, q, k, v, scale, splits, heads)
        else:
            self._call(_attention_into, heads, q, k, v, scale)
        self._convolve(attention.proj, attended, out, residual=x)

    def _block(
        self, block: ResBlock, attention: Attention | None, x: Tensor, embedding: Tensor, out: Tensor
    ) -> None:
        before = out if attention is None else self._scratch("block", *out.shape[1:])
        self._residual_block(block, x, embedding, before)
        if attention is not None:
            self._attend(attention, before, out)

    def _resample_level(
        self, resample: Resample, x: Tensor, embeddings: Iterator[Tensor], out: Tensor
    ) -> None:
        """The change of resolution at the end of a level."""
        if isinstance(resample, ResBlock):
            self._residual_block(resample, x, next(embeddings), out)
        elif resample.conv is None:
            self._resize(resample, x, out)
        elif isinstance(resample, Upsample):
            self._convolve(resample.conv, x, out, scale=2)
        else:
            self._convolve(resample.conv, x, out, stride=2, padding=0 if resample.asymmetric else 1)

    # ---- The network.

    def _lay_out(self, unet: UNet, embeddings: Iterator[Tensor], height: int, width: int) -> None:
        """Records the calls of `UNet.denoise` for feature maps of height x width at the first level."""
        decoder_inputs = self._decoder_inputs(unet, height, width)
        skips = [
            buffer[:, below:] for buffer, below in reversed(decoder_inputs)
        ]  # as the encoder writes them
        reads = [buffer for buffer, _ in decoder_inputs]
        writes = [buffer[:, :below] for buffer, below in decoder_inputs]

        patch, image = unet.config.patch_size, self.input
        if patch > 1:
            image = self._image(unet.input_conv.weight.shape[1], height, width)
            self._call(_store, image, partial(pixel_unshuffle, downscale_factor=patch), self.input)
        if unet.config.center_input:
            self._call(_center, image)
        x = skips.pop(0)
        self._convolve(unet.input_conv, image, x)
        for level in unet.down:
            for i, block in enumerate(level.blocks):
                out = skips.pop(0)
                attention = level.attentions[i] if len(level.attentions) else None
                self._block(block, attention, x, next(embeddings), out)
                x = out
            if level.resample is not None:
                out = skips.pop(0)
                self._resample_level(level.resample, x, embeddings, out)
                x = out

        if unet.config.has_middle:
            middle = self._scratch("middle", *x.shape[1:])
            self._block(unet.mid.blocks[0], unet.mid.attention, x, next(embeddings), middle)
            self._residual_block(unet.mid.blocks[1], middle, next(embeddings), writes.pop(0))
        else:
            self._call(_copy, writes.pop(0), x)

        for level in reversed(unet.up):
            for i, block in enumerate(level.blocks):
                x = reads.pop(0)
                last = i == len(level.blocks) - 1
                channels = block.conv2.weight.shape[0]
                out = self._scratch("level", channels, *x.shape[2:]) if last else writes.pop(0)
                if last and level.resample is None and writes:
                    out = writes.pop(0)
                attention = level.attentions[i] if len(level.attentions) else None
                self._block(block, attention, x, next(embeddings), out)
                x = out
            if level.resample is not None:
                out = writes.pop(0)
                self._resample_level(level.resample, x, embeddings, out)
        self.output = output = self._image(unet.output_conv.weight.shape[0], height, width)
        self._convolve(unet.output_conv, x, output, norm=self._norm_affine(unet.output_norm, x))
        if patch > 1:
            self.output = self._image(unet.config.out_channels, height * patch, width * patch)
            self._call(_store, self.output, partial(pixel_shuffle, upscale_factor=patch), output)
        if unet.config.time_embedding == "fourier":
            self._call(_divide, self.output, next(embeddings))

    def _decoder_inputs(self, unet: UNet, height: int, width: int) -> list[tuple[Tensor, int]]:
        """The input of each decoder block, in order, with its number of channels from below.

        Its other channels are those of a skip connection, which the encoder writes there.
        """
        skips = [unet.input_conv.weight.shape[0]]
        sizes = []
        for i, level in enumerate(unet.down):
            outputs = [block.conv2.weight.shape[0] for block in level.blocks]
            skips += outputs + outputs[-1:] * (level.resample is not None)
            sizes.append((height >> i, width >> i))
        inputs = []
        for i, level in reversed(list(enumerate(unet.up))):
            for block in level.blocks:
                channels = block.conv1.weight.shape[1]
                inputs.append((self._image(channels, *sizes[i]), channels - skips.pop()))
        return inputs


def _kind(function: Callable) -> str:
    return _RECORDABLE.get(function, "attention" if function is _attention_into else "rest")


def _bound(calls: list[_Call]) -> list[Callable[[], None]]:
    """Functions that run the calls, those of neighbouring compiled operators as one recording."""
    bound: list[Callable[[], None]] = []
    for recordable, group in itertools.groupby(calls, lambda call: call[0] in _RECORDABLE):
        if recordable:
            with recording() as recorded:
                for function, arguments in group:
                    function(*arguments)
            bound.append(recorded.run)
        else:
            bound += [partial(function, *arguments) for function, arguments in group]
    return bound


def _attention_into(out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Attention by one fixed operator: "auto" chooses by batch size, and images must not depend on it."""
    out.copy_(torch.ops.fused_diffusion.attention(q, k, v, scale)[0])


def _copy(out: Tensor, x: Tensor) -> None:
    out.copy_(x)


def _center(image: Tensor) -> None:
    image.mul_(2).sub_(1)


def _divide(image: Tensor, divisor: Tensor) -> None:
    image.div_(divisor[:, :, None, None])


def _store(out: Tensor, function: Callable[..., Tensor], *arguments: Tensor) -> None:
    out.copy_(function(*arguments))
