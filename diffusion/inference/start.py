"""Start: the start of a call of `sample`, from noise, images with noise, or images with a mask."""

from dataclasses import replace

import torch

from ..models.network import NetworkConfig
from ..samplers.table import StepTable
from ..utils.validation import check_dense, check_finite, number, whole_number
from ..utils.words import counted
from .buffers import Batch, Noise, drawn_first
from .repaint import can_resample, repaint_rows

STRENGTH = 0.8  # of images without a mask
RESAMPLES = 10  # with a mask, U of the paper; 1 where steps cannot be repeated
JUMP_LENGTH = 1


class Start:
    """The arguments of `DDPM.sample` about what it starts from, checked.

    noise: a function, the initial noise as a tensor [N, C, H, W], or None for the package's noise.
    images: float32 [1 or N, C, H, W] in the range that is diffused, or None. mask: float32
    [1 or N, 1, H, W], or None. strength, resamples, jump_length: as those of `sample`.

    strength: the share of the steps that are taken. shape: height and width of the images, or None for the
    network's. count: number of images that the noise or the images ask for; None for any number.

    ValueError for arguments that do not fit each other.
    """

    def __init__(
        self,
        config: NetworkConfig,
        noise: Noise | torch.Tensor | None,
        images: torch.Tensor | None,
        mask: torch.Tensor | None,
        strength: float | None,
        resamples: int | None,
        jump_length: int | None,
    ):
        if images is None and (mask is not None or strength is not None):
            raise ValueError(f"{'strength' if mask is None else 'mask'} needs an image")
        if images is not None and mask is not None:
            if images.shape[2:] != mask.shape[2:]:
                sizes = [" x ".join(map(str, tensor.shape[2:])) for tensor in (mask, images)]
                raise ValueError(f"mask must be of the image's size, and they are {' and '.join(sizes)}")
            if len(mask) not in (1, len(images)) and len(images) != 1:
                raise ValueError(
                    f"there are {counted(len(mask), 'mask')} for {counted(len(images), 'image')}"
                )
        if mask is None and (resamples is not None or jump_length is not None):
            raise ValueError(f"{'jump_length' if resamples is None else 'resamples'} needs a mask")
        self._resamples = None if resamples is None else whole_number("resamples", resamples, 1)
        self._jump_length = (
            JUMP_LENGTH if jump_length is None else whole_number("jump_length", jump_length, 1)
        )
        self._config, self._images, self._mask = config, images, mask
        self.strength = 1.0
        if images is not None:
            default = STRENGTH if mask is None else 1.0
            self.strength = number("strength", default if strength is None else strength, above=0, most=1)
        self._initial = noise if isinstance(noise, torch.Tensor) else None
        self._noise: Noise | None = None
        self.shape: tuple[int, int] | None = None
        self.count: int | None = None
        if images is not None:
            self.shape = (images.shape[2], images.shape[3])
            counts = {len(images), 1 if mask is None else len(mask)} - {1}
            self.count = max(counts) if counts else None
        if noise is not None:
            function, found = drawn_first(
                (lambda k: noise) if isinstance(noise, torch.Tensor) else noise, config
            )
            self._noise = None if isinstance(noise, torch.Tensor) else function
            if found is not None:
                self.count, self.shape = found[0], self.shape or found[1:]

    def request(self, labels: torch.Tensor | None, sample_ids: torch.Tensor, seed: int) -> Batch:
        """The request for images of these labels and sample ids; ValueError unless there are as many."""
        count, request = len(sample_ids), Batch(labels, sample_ids, seed, self._noise)
        if self._initial is not None:
            shape = (count, self._config.in_channels, *(self.shape or self._config.image_shape))
            initial = check_finite("noise", check_dense("noise", self._initial, shape))
            request = replace(request, initial=initial.detach().float())
        if self._images is not None:
            image = _repeated("images", self._images, count)
            mask = None if self._mask is None else _repeated("masks", self._mask, count)
            from_noise = mask is not None and self.strength == 1
            request = replace(request, image=image, mask=mask, from_noise=from_noise)
        return request

    def rows(self, table: StepTable) -> list[int] | None:
        """The rows of the table in the order in which they run, for images with a mask; None for others."""
        if self._mask is None:
            return None
        if self._jump_length >= len(table) > 1:
            raise ValueError(
                f"jump_length must be less than the {counted(len(table), 'step')}, not {self._jump_length}"
            )
        resamples = self._resamples
        if resamples is None:
            resamples = RESAMPLES if can_resample(table) else 1
        elif resamples > 1 and not can_resample(table):
            raise ValueError(
                "a sampler that evaluates the network twice in a step cannot be resampled; inpaint by "
                "another one, or with resamples=1"
            )
        return repaint_rows(len(table), resamples, self._jump_length)


def _repeated(name: str, tensor: torch.Tensor, count: int) -> torch.Tensor:
    if len(tensor) not in (1, count):
        raise ValueError(f"there are {len(tensor)} {name} for {counted(count, 'sample')}")
    return tensor.expand(count, *tensor.shape[1:])
