"""EDMUNet: the preconditioned networks of EDM (Karras et al. 2022, arXiv 2206.00364)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ..utils.validation import choice, refuse
from .arguments import check_arguments
from .blocks import Conv2d, module_list, run
from .edm_blocks import BOX, Block, DecoderLevel, EncoderLevel, Fourier, padding_of, positional
from .edm_preconditioning import IDDPM, PRECONDITIONINGS, preconditioning
from .network import MAX_CHANNELS, Network, NetworkConfig, check_halvings

HEAD_CHANNELS = 64  # of the attention heads of ADM; narrower levels have no attention


@dataclass(frozen=True)
class EDMConfig(NetworkConfig):
    """The architecture of an `EDMUNet`.

    sample_size: height and width of the images, divisible by 2**(levels - 1).
    in_channels: channels of the images.
    kind: "song", the DDPM++ and NCSN++ of Song et al. 2021 (arXiv 2011.13456, appendix H), or "adm",
        that of Dhariwal & Nichol 2021 (arXiv 2105.05233, section 3).
    channels, channel_mult: the base width, and its multiple at each level.
    embedding_mult: width of the embedding, as a multiple of the base width.
    num_res_blocks: number of residual blocks of each level on the way down; the way up has one more.
    attention_levels: levels with attention; the middle always has it.
    dropout: probability in every residual block.
    num_classes: number K of classes, or None. The label K stands for no label: its one-hot vector is 0.
    preconditioning: see `edm_preconditioning.preconditioning`.
    sigma_data: standard deviation of the training images, for the preconditioning "edm".
    num_levels: noise levels of the preconditioning "iddpm".

    These are for "song" only:

    embedding: of the noise level, "positional" or "fourier".
    noise_mult: width of that embedding, as a multiple of the base width.
    encoder: "standard", or "skip" or "residual", where the image of each level is added to its features.
    decoder: "standard", or "skip", where each level adds to the output.
    resample_filter: taps, along one axis, of the filter that changes the resolution; their sum is 1.
    """

    sample_size: int
    in_channels: int = 3
    kind: str = "song"
    channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    embedding_mult: int = 4
    num_res_blocks: int = 4
    attention_levels: tuple[int, ...] = (1,)
    dropout: float = 0.0
    num_classes: int | None = None
    preconditioning: str = "edm"
    sigma_data: float = 0.5
    num_levels: int = 1000
    embedding: str = "positional"
    noise_mult: int = 1
    encoder: str = "standard"
    decoder: str = "standard"
    resample_filter: tuple[float, ...] = BOX

    bounds: ClassVar[dict[str, dict[str, float]]] = {
        "channels": {"least": 4, "most": MAX_CHANNELS},
        "num_res_blocks": {"least": 1, "most": 64},
        "attention_levels": {"least": 0, "most": 15},
        "dropout": {"least": 0, "below": 1},
        "num_classes": {"least": 1, "most": 2**31 - 1},
        "sigma_data": {"above": 0, "most": 1000},
        "num_levels": {"least": 2, "most": 100_000},
        "resample_filter": {"least": -16, "most": 16},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("kind of network", self.kind, ("song", "adm"))
        choice("preconditioning", self.preconditioning, PRECONDITIONINGS)
        choice("embedding", self.embedding, ("positional", "fourier"))
        choice("encoder", self.encoder, ("standard", "skip", "residual"))
        choice("decoder", self.decoder, ("standard", "skip"))
        levels = len(self.channel_mult)
        if not 1 <= levels <= 16:
            refuse("channel_mult", "a number for each of 1..16 levels", list(self.channel_mult))
        if not all(level < levels for level in self.attention_levels):
            refuse("attention_levels", f"in 0..{levels - 1}", list(self.attention_levels))
        if self.channels % 2:
            refuse("channels", "even", self.channels)
        taps = self.resample_filter
        if len(taps) % 2 or not taps or abs(sum(taps) - 1) > 1e-3:
            refuse("resample_filter", "an even number of taps with the sum 1", list(taps))
        if self.kind == "adm":
            for name in ("embedding", "noise_mult", "encoder", "decoder", "resample_filter"):
                default = type(self).__dataclass_fields__[name].default
                if getattr(self, name) != default:
                    refuse(name, f"{default!r} for the kind 'adm'", getattr(self, name))
        self.check_size(self.image_shape)

    @property
    def out_channels(self) -> int:
        """Channels of the denoised image."""
        return self.in_channels

    @property
    def has_null_label(self) -> bool:
        """Whether there is a label for no label: with classes, always, as its one-hot vector is 0."""
        return self.num_classes is not None

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * mult for mult in self.channel_mult)

    def level_heads(self, level: int) -> int:
        """Heads of an attention at this level."""
        return 1 if self.kind == "song" else self.level_channels[level] // HEAD_CHANNELS

    def check_size(self, size: Sequence[int]) -> None:
        """ValueError unless images of this height and width can be halved between all levels."""
        check_halvings(size, len(self.channel_mult) - 1)


class EDMUNet(Network):
    """The denoiser of EDM: the image D(x; sigma) in x = image + sigma * noise (eq. 7 of the paper).

    `forward(x, sigma, labels)` takes noise levels as timesteps, and a null label, the number of classes, for
    none. The networks are those of the paper's tables 1 and 7.
    """

    Config = EDMConfig
    config: EDMConfig
    down: Sequence[EncoderLevel]
    middle: Sequence[Block]
    up: Sequence[DecoderLevel]

    def __init__(self, config: EDMConfig):
        super().__init__()
        self.config = config
        song, widths = config.kind == "song", config.level_channels
        embedding = config.channels * config.embedding_mult
        noise = config.channels * config.noise_mult
        self.precondition = preconditioning(config.preconditioning, config.sigma_data, config.num_levels)
        self.fourier = Fourier(noise // 2) if config.embedding == "fourier" else None
        self.embed_0 = nn.Linear(noise, embedding)
        self.embed_1 = nn.Linear(embedding, embedding)
        if config.num_classes is not None:
            self.embed_label = nn.Linear(config.num_classes, noise if song else embedding, bias=song)
        options: dict[str, Any] = {
            "embedding": embedding,
            "adaptive": not song,
            "project": song,
            "skip_scale": math.sqrt(0.5) if song else 1.0,
            "eps": 1e-6 if song else 1e-5,
            "dropout": config.dropout,
        }

        def block(inputs: int, outputs: int, **more: Any) -> Block:
            return Block(inputs, outputs, **options, **more)

        taps, count, images = config.resample_filter, config.num_res_blocks, config.in_channels
        width = config.channels if song else widths[0]
        self.input_conv = Conv2d(images, width, 3, padding=1)
        skips, auxiliary = [width], images
        down = []
        for level, channels in enumerate(widths):
            heads = config.level_heads(level) if level in config.attention_levels else 0
            resample = extra = None
            if level:
                resample = block(width, width, way="down", taps=taps)
                skips.append(width)
                if config.encoder == "skip":
                    extra = Conv2d(images, width, 1)
                elif config.encoder == "residual":
                    # The filter comes after the convolution, without padding of its own.
                    extra = Conv2d(auxiliary, width, 3, padding=1 + padding_of(taps))
                    auxiliary = width
            inputs = [width, *[channels] * (count - 1)]
            down.append(EncoderLevel(resample, extra, [block(n, channels, heads=heads) for n in inputs]))
            skips += [channels] * count
            width = channels
        self.down = module_list(down)
        self.middle = module_list(
            [block(width, width, heads=config.level_heads(len(widths) - 1)), block(width, width)]
        )
        up = []
        for level, channels in reversed(list(enumerate(widths))):
            coarsest = level == len(widths) - 1
            resample = None if coarsest else block(width, width, way="up", taps=taps)
            heads = config.level_heads(level) if level in config.attention_levels else 0
            blocks = []
            for i in range(count + 1):
                attends = not song or i == count
                blocks.append(block(width + skips.pop(), channels, heads=heads if attends else 0))
                width = channels
            outputs = images if level == 0 or config.decoder == "skip" else None
            up.append(DecoderLevel(resample, blocks, channels, outputs, options["eps"]))
        self.up = module_list(reversed(up))  # up[i] is of the same resolution as down[i]

    def discrete_levels(self) -> Tensor | None:
        """The noise levels of the preconditioning "iddpm", float32 falling to 0; None for another's."""
        return self.precondition.levels() if isinstance(self.precondition, IDDPM) else None

    def forward(
        self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None, backend: str = "auto"
    ) -> Tensor:
        """The denoised images [B, C, H, W], in float32, or in float64 for a network of that dtype.

        x: images with noise, [B, C, H, W]. timesteps: their noise levels sigma > 0, [B]. labels: int64 [B] in
        0..K, or K for no label; None for no label in the whole batch. backend: of the kernels. ValueError for
        arguments that do not fit the configuration.
        """
        config, dtype = self.config, self.input_conv.weight.dtype
        check_arguments(config, x, timesteps, labels)
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        x, sigma = x.to(precise), timesteps.to(precise)
        skip, output, scale, noise = self.precondition(sigma)
        skip, output, scale = (c[:, None, None, None] for c in (skip, output, scale))
        network = self._denoise((scale * x).to(dtype), self._embed(noise, labels, dtype), backend)
        return skip * x + output * network.to(precise)

    def _embed(self, noise: Tensor, labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The embedding [B, E] of c_noise and labels, for all blocks."""
        song = self.config.kind == "song"
        if self.fourier is not None:
            waves = self.fourier(noise)
        else:
            waves = positional(noise, self.embed_0.in_features, song)
        label = self._one_hot(labels, noise)
        embedding = waves.to(dtype)
        if label is not None and song:
            # The square root gives a one-hot vector the length of a standard normal one.
            embedding = embedding + self.embed_label(label.to(dtype) * math.sqrt(label.shape[1]))
        embedding = self.embed_1(silu(self.embed_0(embedding)))
        if label is not None and not song:
            embedding = embedding + self.embed_label(label.to(dtype))
        return silu(embedding)

    def _one_hot(self, labels: Tensor | None, noise: Tensor) -> Tensor | None:
        """One-hot labels [B, K] like noise [B]; 0 for the null label. None for an unconditional network."""
        classes = self.config.num_classes
        if classes is None:
            return None
        if labels is None:
            return noise.new_zeros(len(noise), classes)
        return (labels[:, None] == torch.arange(classes, device=labels.device)).to(noise.dtype)

    def _denoise(self, x: Tensor, embedding: Tensor, backend: str) -> Tensor:
        """The raw network, F of the paper's eq. 7."""
        h = run(self.input_conv, x, backend=backend)
        skips, image = [h], x
        for encoder in self.down:
            h, image = encoder(h, image, embedding, skips, backend)
        for block in self.middle:
            h = run(block, h, embedding, backend=backend)
        output = None
        for decoder in reversed(self.up):
            h, output = decoder(h, output, embedding, skips, backend)
        assert output is not None
        return output


def edm_loss(
    config: NetworkConfig,
    predict: Callable[..., Tensor],
    x0: Tensor,
    labels: Tensor | None,
    sigma: Tensor,
    noise: Tensor,
    weighting: str = "uniform",
) -> Tensor:
    """Mean weighted squared error of the denoised images (Karras et al. 2022, table 1); a scalar.

    predict: the network. x0, noise: [B, C, H, W]. labels: int64 [B], or None. sigma: noise levels [B].
    ValueError for another preconditioning than "edm", whose loss is another, and for another weighting than
    "uniform", which stands for EDM's own weight of each level.
    """
    choice("loss weighting of continuous noise levels", weighting, ("uniform",))
    if not isinstance(config, EDMConfig) or config.preconditioning != "edm":
        kind = config.preconditioning if isinstance(config, EDMConfig) else "none"
        raise ValueError(f"there is no loss for the preconditioning {kind!r}; 'edm' has one")
    if sigma.shape != x0.shape[:1] or not sigma.is_floating_point():
        raise ValueError(f"t must be noise levels, floats [{len(x0)}], not {sigma.dtype} {list(sigma.shape)}")
    if noise.shape != x0.shape:
        raise ValueError(f"noise must have the images' shape {list(x0.shape)}, not {list(noise.shape)}")
    output = predict(x0 + sigma[:, None, None, None].to(x0.dtype) * noise, sigma, labels).float()
    weights = (sigma**2 + config.sigma_data**2) / (sigma * config.sigma_data) ** 2
    return (weights * (output - x0).square().flatten(1).mean(1)).mean()
