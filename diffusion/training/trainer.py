"""One training run: the step, with its optimizer, averages and random numbers.

Everything random in a step is a function of (seed, step), and the order of the images is a function of (seed,
epoch). So tensors and step number are the whole state of a run, and a resumed run continues as if it had
never stopped. Random numbers are drawn for the whole batch, and each rank takes its share: any number of
ranks trains on the same images, timesteps and noise.
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from ..data.datasets import DatasetImages
from ..data.image_set import SomeImages
from ..ddpm import DDPM
from ..models.unet import UNet, UNetConfig
from ..process.objective import drop_labels, lognormal_timesteps, random_timesteps
from ..process.schedule import NoiseSchedule
from ..samplers import SAMPLERS, options_of
from ..storage.images import to_float
from ..utils.device import resolve_device
from ..utils.memory import check_fits, keep_freed_memory
from ..utils.ranks import Ranks
from ..utils.validation import refuse, whole_number, whole_numbers
from .fine_tuning import ImagesSeen, images_seen, start_from
from .images import check_data, images_as_tensor
from .log_line import LogLine
from .optimizers import Optimizer
from .recipe import Recipe
from .seeds import seed_of

# Defaults for sampling the models trained here. "trailing" starts at the last timestep, where x_t is pure
# noise; this matters with few steps (Lin et al. 2023, arXiv 2305.08891, section 3.3).
_DEFAULTS = {"spacing": "trailing", "use_clipped_model_output": True}
SAMPLER_OPTIONS: dict[str, dict[str, Any]] = {
    sampler: {name: value for name, value in _DEFAULTS.items() if name in options_of(sampler)}
    for sampler in SAMPLERS
}


class Trainer:
    """A training run: the model, its averages, the optimizer, and the step they have reached.

    recipe: the numbers that define the training.
    images: uint8 [N, C, H, W]: a tensor, an array, some images of a tensor (`data.image_set.SomeImages`), or
        those of a data set (`data.datasets.DatasetImages`), which are decoded as the steps need them. An
        array may also be [N, H, W, C] or [N, H, W]. labels: whole numbers [N], or None for an unconditional
        model.
    validation: images and labels for the validation loss, or None for none.
    device: of the computation; images and labels stay on the CPU.
    ranks: the share of each batch that this process works on. Several ranks take their steps within
        `distributed.shared_gradients`, as `train` does.
    init: a model whose weights the run starts from. It has the recipe's architecture except for the classes;
        see `fine_tuning.recipe_for` and `fine_tuning.start_from`.
    class_names: of the labels 0, 1, ..., which the model keeps; None for none.
    workers: processes that decode the images of a data set ahead of the steps; 0 decodes between them.
    command: JSON values that the state keeps, such as the options of the command line that made the run.

    After step n = 0, 1, ... an average with decay d becomes d' average + (1 - d') weights, with
    d' = min(d, (1 + n) / (10 + n)), so that it soon forgets the untrained weights.

    The options of the computation change the weights by rounding only:

    autocast: run the UNet in bfloat16 or float16 (with a scaled loss) where PyTorch finds it safe.
    micro_batch: images evaluated at a time, whose gradients are added up; by default all of the rank's.
    channels_last: memory format of the UNet.
    activation_checkpointing: recompute activations in the backward pass instead of keeping them.
    compile: use torch.compile.

    ValueError if the data do not fit the recipe, or if the run needs more memory than the device has.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: torch.Tensor | np.ndarray | SomeImages | DatasetImages,
        labels: torch.Tensor | np.ndarray | Sequence[int] | None,
        validation: tuple[torch.Tensor, torch.Tensor | None] | None = None,
        device: str | torch.device = "cpu",
        *,
        autocast: torch.dtype | None = None,
        micro_batch: int | None = None,
        channels_last: bool = True,
        activation_checkpointing: bool = False,
        compile: bool = False,
        ranks: Ranks | None = None,
        init: DDPM | None = None,
        class_names: Sequence[str] | None = None,
        workers: int = 0,
        command: dict[str, Any] | None = None,
    ):
        if not isinstance(recipe, Recipe):
            refuse("recipe", "a diffusion.Recipe (diffusion.train also takes a recipe's name)", recipe)
        self.ranks = ranks or Ranks()
        config = UNetConfig.from_dict(recipe.unet)
        if not isinstance(images, SomeImages | DatasetImages):
            images = images_as_tensor(images)
        if labels is not None:
            labels = whole_numbers("labels", labels)
        check_data(config, images, labels, recipe.batch_size)
        if recipe.batch_size < self.ranks.world_size:
            raise ValueError(
                f"a batch of {recipe.batch_size} cannot be shared by {self.ranks.world_size} ranks"
            )
        if micro_batch is not None:
            micro_batch = whole_number("micro_batch", micro_batch, 1)
        if validation is not None:
            validation = images_as_tensor(validation[0]), validation[1]
            check_data(config, *validation, 1, "validation images")
        self.recipe, self.images, self.labels, self.validation = recipe, images, labels, validation
        self.device, self.autocast, self.micro_batch = resolve_device(device), autocast, micro_batch
        if self.device.type == "cpu":
            keep_freed_memory()
        held = 3 + 1 + len(recipe.more_ema_decays)  # weights, gradients, at least one moment, averages
        what = f"the weights, gradients, moments and averages of {config.num_parameters:,} parameters"
        check_fits(what, 4 * held * config.num_parameters, self.device)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        with torch.random.fork_rng(), torch.device("cpu"):
            torch.manual_seed(seed_of(recipe.seed, "weights", 0))
            unet = UNet(config)
        if init is not None:
            start_from(unet, init.unet, class_names, init.class_names)
        schedule = NoiseSchedule.from_config(recipe.schedule)
        self.model = DDPM(
            unet,
            schedule,
            prediction_type=recipe.prediction_type,
            sampler_options=SAMPLER_OPTIONS,
            class_names=class_names,
        )
        self.model.to(self.device, memory_format=self.format)  # type: ignore[call-overload] # torch's stub lacks it
        self.averages = {decay: self.model.copy() for decay in (recipe.ema_decay, *recipe.more_ema_decays)}
        for average in self.averages.values():
            average.unet.eval().requires_grad_(False)
        unet.checkpoint_activations(activation_checkpointing)
        self.network = torch.compile(unet) if compile else unet
        self.optimizer = Optimizer(recipe, unet, self.device)
        self.timesteps = None  # cumulative distribution; None for the uniform one
        if recipe.timestep_sampling == "lognormal":
            self.timesteps = lognormal_timesteps(schedule, recipe.noise_mean, recipe.noise_std)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=autocast == torch.float16)
        self.workers = whole_number("workers", workers, 0)
        # The step of the next batch of a data set, the run's last step, and the batches.
        self._reader: tuple[int, int, Iterator[torch.Tensor]] | None = None
        self.command = dict(command or {})
        self.step = 0
        self.seconds = 0.0
        seen = None if init is None else images_seen(init)
        self.images_seen = ImagesSeen(0, 0 if seen is None else seen.total)
        self.log_line = LogLine()
        self._order: tuple[int, torch.Tensor] | None = None

    @property
    def ema(self) -> DDPM:
        """The averaged model of the recipe's ema_decay, which is the result of the training."""
        return self.averages[self.recipe.ema_decay]

    @functools.cached_property
    def data_digest(self) -> str:
        """SHA-256 of the images and labels that are trained on, in hexadecimal."""
        images = self.images
        if isinstance(images, torch.Tensor):
            digest = hashlib.sha256(images.contiguous().numpy().data)
        else:
            digest = hashlib.sha256(images.digest())
        digest.update(b"" if self.labels is None else self.labels.contiguous().numpy().data)
        return digest.hexdigest()

    def train_step(self) -> torch.Tensor:
        """Takes one optimizer step and returns the norm of its gradient, a scalar on the device.

        Loss and norm of the whole batch are added to `log_line`.
        """
        recipe = self.recipe
        if self.ranks.world_size > 1 and not isinstance(self.network, DistributedDataParallel):
            raise RuntimeError("several ranks take their steps within distributed.shared_gradients")
        x, labels, t, noise = self._rank_batch()
        torch.manual_seed(seed_of(recipe.seed, f"dropout of rank {self.ranks.rank}", self.step))
        self.optimizer.set_learning_rate(recipe.learning_rate_at(self.step))
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        starts = range(0, len(x), self.micro_batch or len(x))
        for start in starts:
            part = slice(start, start + starts.step)
            # DistributedDataParallel takes the mean over the ranks; with this factor that is the mean over
            # the batch.
            share = len(x[part]) * self.ranks.world_size / recipe.batch_size
            with self._without_sync(start != starts[-1]):
                loss = share * self.loss(
                    x[part], None if labels is None else labels[part], t[part], noise[part]
                )
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.optimizer.take_gradients()
        for optimizer in self.optimizer.parts:
            self.scaler.unscale_(optimizer)
        weights = list(self.optimizer.weights.values())
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if norm.device.type != "cpu" or norm > recipe.gradient_clip:  # on a GPU, comparing would wait
            torch.nn.utils.clip_grads_with_norm_(weights, recipe.gradient_clip, norm)
        for optimizer in self.optimizer.parts:
            self.scaler.step(optimizer)
        self.scaler.update()
        parameters: list[torch.Tensor] = list(self.model.unet.parameters())
        with torch.no_grad():
            for decay, average in self.averages.items():
                decay = min(decay, (1 + self.step) / (10 + self.step))
                torch._foreach_lerp_(list(average.unet.parameters()), parameters, 1 - decay)
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(total)
            total /= self.ranks.world_size
        self.step += 1
        self.images_seen = self.images_seen._replace(own=self.images_seen.own + recipe.batch_size)
        self.log_line.add(total, norm.detach())
        return norm.detach()

    def check_finite(self) -> None:
        """ValueError if a step since the last row of the log diverged; see `LogLine.check_finite`."""
        self.log_line.check_finite(self.step, self.scaler.is_enabled())

    def validation_loss(self, batch_size: int = 256, stopping: object = ()) -> float | None:
        """Mean loss of the averaged model on the validation images, with the same noise each time.

        Computed in the precision of the steps. batch_size: images evaluated at a time. None if `stopping`,
        such as the list of signals that came, is true before the last batch.
        """
        if self.validation is None:
            raise ValueError("there are no validation images")
        images, labels = self.validation
        total = 0.0
        with torch.random.fork_rng(), torch.no_grad(), self._precision():
            torch.manual_seed(seed_of(self.recipe.seed, "validation", 0))
            for start in range(0, len(images), batch_size):
                if stopping:
                    return None
                x = self._to_device(images[start : start + batch_size])
                y = None if labels is None else labels[start : start + batch_size].to(self.device)
                total += len(x) * self.ema.loss(x, y, **self._weighting()).item()
        return total / len(images)

    def _precision(self) -> torch.autocast:
        dtype = self.autocast or torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.autocast is not None)

    def loss(
        self, x: torch.Tensor, labels: torch.Tensor | None, t: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The recipe's loss, a scalar, in the precision of the steps; arguments as those of `DDPM.loss`."""
        with self._precision():
            return self.model.loss(x, labels, t=t, noise=noise, network=self.network, **self._weighting())

    def _weighting(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "weighting": recipe.loss_weighting,
            "min_snr_gamma": recipe.min_snr_gamma,
            "vlb_weight": recipe.vlb_weight,
        }

    def _without_sync(self, skip: bool) -> contextlib.AbstractContextManager[None]:
        """A context in which, if `skip`, a backward pass does not add up gradients over the ranks."""
        if skip and isinstance(self.network, DistributedDataParallel):
            return self.network.no_sync()
        return contextlib.nullcontext()

    def _rank_batch(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """This rank's part of the present step's batch: images, labels, timesteps and noise.

        Labels are dropped here rather than in `DDPM.loss`, because all is drawn for the whole batch.
        """
        recipe, device, size = self.recipe, self.device, self.recipe.batch_size
        index = self.batch_indices(self.step)
        torch.manual_seed(seed_of(recipe.seed, "step", self.step))
        t = random_timesteps(size, self.model.schedule.T, device, self.timesteps)
        noise = torch.randn(size, *self.images.shape[1:], device=device)
        labels = None if self.labels is None else self.labels[index].to(device)
        if labels is not None and recipe.label_dropout:
            labels = drop_labels(labels, recipe.label_dropout, self.model.unet.config.null_label)
        flipped = torch.rand(size, device=device) < 0.5 if recipe.horizontal_flip else None
        bounds = [size * rank // self.ranks.world_size for rank in (self.ranks.rank, self.ranks.rank + 1)]
        part = slice(*bounds)
        x = self._to_device(self._pixels(index, part))
        if flipped is not None:
            x = torch.where(flipped[part].reshape(-1, 1, 1, 1), x.flip(-1), x)
        noise = noise[part].contiguous(memory_format=self.format)
        return x, None if labels is None else labels[part], t[part], noise

    def _pixels(self, index: torch.Tensor, part: slice) -> torch.Tensor:
        """A part of the present step's images, uint8; those of a data set come from its workers."""
        if not isinstance(self.images, DatasetImages):
            return self.images[index[part]]
        last = self.recipe.steps
        if self._reader is None or self._reader[:2] != (self.step, last):
            order = (self.batch_indices(step)[part].tolist() for step in range(self.step, last))
            self._reader = self.step, last, self.images.batches(order, self.workers)
        reader = self._reader[2]
        self._reader = self.step + 1, last, reader
        return next(reader)

    def _to_device(self, images: torch.Tensor) -> torch.Tensor:
        return to_float(images.to(self.device)).contiguous(memory_format=self.format)

    def batch_indices(self, step: int) -> torch.Tensor:
        """Indices int64 [batch_size] of the images of a step; each image occurs at most once per epoch."""
        size = self.recipe.batch_size
        epoch, position = divmod(step, len(self.images) // size)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(self.recipe.seed, "epoch", epoch))
            self._order = epoch, torch.randperm(len(self.images), generator=generator, device="cpu")
        return self._order[1][position * size : (position + 1) * size]
