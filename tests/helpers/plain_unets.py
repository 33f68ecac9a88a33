"""Small UNets in plain functions of PyTorch, as NVlabs' EDM and OpenAI's guided-diffusion write theirs.

Their convolutions have their biases added afterwards, in place; they resample by convolutions of single
channels; sums are multiplied by a number; attention is two einsums around a softmax, on images and heads in
one dimension, in functions of autograd; group norms and softmaxes are in float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF = math.sqrt(0.5)


class Recomputed(torch.autograd.Function):
    """A function's result, as a checkpoint that is recomputed gives it."""

    @staticmethod
    def forward(ctx, function, *tensors):
        with torch.no_grad():
            return function(*tensors)


class Softmax(torch.autograd.Function):
    """Weights of keys [B, Q, K] in float32, of q [B, C, Q] and k [B, C, K]."""

    @staticmethod
    def forward(ctx, q, k):
        k = (k / math.sqrt(k.shape[1])).to(torch.promote_types(torch.float32, k.dtype))
        return torch.einsum("ncq,nck->nqk", q.to(k.dtype), k).softmax(dim=2).to(q.dtype)


# ---- As in EDM.


class Filtered(nn.Module):
    """A convolution [K, C, kernel, kernel] after a resampling: "up", "down" or "". kernel 0: that alone."""

    def __init__(self, channels: int, outputs: int, kernel: int, resample: str = "", filter: tuple = (1, 1)):
        super().__init__()
        self.resample = resample
        self.weight = nn.Parameter(torch.randn(outputs, channels, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.randn(outputs)) if kernel else None
        line = torch.tensor(filter, dtype=torch.float32)
        square = (line[:, None] * line)[None, None] / line.sum() ** 2
        self.register_buffer("filter", square if resample else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.filter is not None:
            filters, channels = self.filter.to(x.dtype), x.shape[1]
            padding = (filters.shape[-1] - 1) // 2
            if self.resample == "up":
                filters = filters.mul(4).tile([channels, 1, 1, 1])
                x = F.conv_transpose2d(x, filters, groups=channels, stride=2, padding=padding)
            else:
                filters = filters.tile([channels, 1, 1, 1])
                x = F.conv2d(x, filters, groups=channels, stride=2, padding=padding)
        if self.weight is None or self.bias is None:
            return x
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        return x.add_(bias.reshape(1, -1, 1, 1))


class Affine(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(outputs, inputs)),
            nn.Parameter(torch.randn(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.to(x.dtype).t()).add_(self.bias.to(x.dtype))


class ScaledBlock(nn.Module):
    """A residual block whose sums are multiplied by a number; scales: whether the embedding scales, too."""

    def __init__(
        self, channels: int, outputs: int, resample: str = "", heads: int = 0, scales=False, filter=(1, 1)
    ):
        super().__init__()
        self.scales, self.heads = scales, heads
        self.norm0, self.norm1 = nn.GroupNorm(4, channels), nn.GroupNorm(4, outputs)
        self.conv0 = Filtered(channels, outputs, 3, resample, filter)
        self.affine = Affine(24, outputs * (2 if scales else 1))
        self.conv1 = Filtered(outputs, outputs, 3)
        plain = channels == outputs and not resample
        self.skip = None if plain else Filtered(channels, outputs, int(channels != outputs), resample, filter)
        if heads:
            self.norm2 = nn.GroupNorm(4, outputs)
            self.qkv, self.proj = Filtered(outputs, 3 * outputs, 1), Filtered(outputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        before = x
        x = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(embedding).unsqueeze(2).unsqueeze(3).to(x.dtype)
        if self.scales:
            scale, shift = params.chunk(chunks=2, dim=1)
            x = F.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        else:
            x = F.silu(self.norm1(x.add_(params)))
        x = self.conv1(F.dropout(x, p=0.1, training=self.training))
        x = x.add_(before if self.skip is None else self.skip(before)) * HALF
        if self.heads:
            n, c = x.shape[:2]
            qkv = self.qkv(self.norm2(x)).reshape(n * self.heads, c // self.heads, 3, -1)
            q, k, v = qkv.unbind(2)
            attended = torch.einsum("nqk,nck->ncq", Softmax.apply(q, k), v)
            x = self.proj(attended.reshape(*x.shape)).add_(x) / math.sqrt(2)
        return x


class ScaledUNet(nn.Module):
    """As in EDM: x [N, 3, H, W], and a noise level for each image."""

    def __init__(self, heads: int = 1, scales: bool = False, filter: tuple = (1, 1)):
        super().__init__()
        more = {"scales": scales, "filter": filter}
        self.first, self.embed = Filtered(3, 16, 3), Affine(8, 24)
        self.a = ScaledBlock(16, 16, heads=heads, **more)
        self.down = ScaledBlock(16, 24, "down", **more)
        self.b = ScaledBlock(24, 24, heads=heads, **more)
        self.up = ScaledBlock(24, 24, "up", **more)
        self.c = ScaledBlock(40, 16, heads=heads, **more)
        self.norm, self.last = nn.GroupNorm(4, 16), Filtered(16, 3, 3)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        c_in = 1 / (0.5**2 + sigma.reshape(-1, 1, 1, 1) ** 2).sqrt()
        angles = (sigma.log() / 4).ger(torch.arange(4, dtype=sigma.dtype, device=sigma.device))
        emb = torch.cat([angles.cos(), angles.sin()], dim=1)
        emb = F.silu(self.embed(emb.reshape(emb.shape[0], 2, -1).flip(1).reshape(*emb.shape)))
        skip = self.a(self.first(c_in * x), emb)
        h = self.up(self.b(self.down(skip, emb), emb), emb)
        h = self.c(torch.cat([h, skip], dim=1), emb)
        return x + c_in * self.last(F.silu(self.norm(h)))


# ---- As in guided-diffusion.


class Norm32(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype)).type(input.dtype)


class PooledBlock(nn.Module):
    """A residual block with "up", "down" or "" between its norm and its convolution."""

    def __init__(self, channels: int, outputs: int, resample: str = "", scales: bool = True):
        super().__init__()
        self.resample, self.scales = resample, scales
        self.norm0, self.norm1 = Norm32(4, channels), Norm32(4, outputs)
        self.conv0 = nn.Conv2d(channels, outputs, 3, padding=1)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.affine = nn.Linear(24, outputs * (2 if scales else 1))
        self.skip = nn.Identity() if channels == outputs else nn.Conv2d(channels, outputs, 1)

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2, 2) if self.resample else x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(self.resampled(F.silu(self.norm0(x))))
        x = self.resampled(x)
        emb = self.affine(F.silu(embedding)).type(h.dtype)
        while emb.ndim < h.ndim:
            emb = emb[..., None]
        if self.scales:
            scale, shift = torch.chunk(emb, 2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + emb)
        return self.skip(x) + self.conv1(F.dropout(F.silu(h), 0.1, training=self.training))


class AttentionOfSequences(nn.Module):
    """Attention of a map as a sequence [N, C, S]. split: whether queries, keys and values are split first."""

    def __init__(self, channels: int, heads: int, split: bool):
        super().__init__()
        self.heads, self.split = heads, split
        self.norm = Norm32(4, channels)
        self.qkv, self.out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return Recomputed.apply(self.attended, x, *self.parameters())

    def attended(self, x: Tensor, *_: Tensor) -> Tensor:
        n, c, *size = x.shape
        x = x.reshape(n, c, -1)
        qkv, width, length = self.qkv(self.norm(x)), c // self.heads, x.shape[2]
        scale = 1 / math.sqrt(math.sqrt(width))
        if self.split:
            q, k, v = qkv.chunk(3, dim=1)
            q, k = ((t * scale).view(n * self.heads, width, length) for t in (q, k))
            v = v.reshape(n * self.heads, width, length)
        else:
            q, k, v = qkv.reshape(n * self.heads, 3 * width, length).split(width, dim=1)
            q, k = q * scale, k * scale
        weights = torch.einsum("bct,bcs->bts", q, k)
        weights = torch.softmax(weights.to(self.norm.weight.dtype), dim=-1).type(weights.dtype)
        h = torch.einsum("bts,bcs->bct", weights, v).reshape(n, -1, length)
        return (x + self.out(h)).reshape(n, c, *size)


class PooledUNet(nn.Module):
    """As in guided-diffusion: x [N, 3, H, W], timesteps and labels below 5, one for each image."""

    def __init__(self, split: bool = True, scales: bool = True):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(8, 24), nn.SiLU(), nn.Linear(24, 24))
        self.labels = nn.Embedding(5, 24)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.attend = PooledBlock(16, 16, scales=scales), AttentionOfSequences(16, 2, split)
        self.down, self.b = PooledBlock(16, 16, "down", scales), PooledBlock(16, 24, scales=scales)
        self.inner = AttentionOfSequences(24, 3, split)
        self.up, self.c = PooledBlock(24, 24, "up", scales), PooledBlock(40, 16, scales=scales)
        self.last_attend = AttentionOfSequences(16, 1, split)
        self.last = nn.Sequential(Norm32(4, 16), nn.SiLU(), nn.Conv2d(16, 6, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        angles = (
            timesteps[:, None].to(x.dtype) * torch.exp(-torch.arange(4, device=x.device).to(x.dtype))[None]
        )
        emb = self.embed(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)) + self.labels(labels)
        skip = self.attend(self.a(self.first(x), emb))
        h = self.up(self.inner(self.b(self.down(skip, emb), emb)), emb)
        h = self.c(torch.cat([h, skip], dim=1), emb)
        return self.last(self.last_attend(h))


def small(network: nn.Module) -> nn.Module:
    """The network in eval mode, with weights that keep the size of what they multiply."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)
