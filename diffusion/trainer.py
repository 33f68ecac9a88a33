"""One training run: Adam, warm-up and decay, gradient clipping, EMA, and a state that resumes exactly.

Everything random in a step is a function of (seed, step), and the order of the images one of (seed, epoch),
so the state of a run is its tensors and its step number: a resumed run goes on as if it had never stopped.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .checkpoint import load_weights, read_safetensors
from .data import to_float
from .ddpm import DDPM
from .files import replacing
from .recipe import Recipe
from .schedule import NoiseSchedule
from .unet import UNet, UNetConfig

# How the models trained here are sampled unless the caller says otherwise. With few steps it matters to start
# at the last timestep, where noise is all there is (Lin et al. 2023, arXiv 2305.08891, section 3.3).
SAMPLER_OPTIONS = {
    "ddpm": {"spacing": "trailing"},
    "ddim": {"spacing": "trailing", "use_clipped_model_output": True},
    "dpm++": {"spacing": "trailing"},
}


class Trainer:
    """A run: the model, its average, the optimiser, and the step they have reached.

    images: uint8 [N, C, H, W]; labels: int64 [N], or None for an unconditional model. validation: another
    such pair, for the validation loss. autocast: run the UNet in bfloat16 where PyTorch finds it safe.
    ValueError if the data do not fit the recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        validation: tuple[torch.Tensor, torch.Tensor | None] | None = None,
        device: str | torch.device = "cpu",
        autocast: bool = False,
    ):
        config = UNetConfig.from_dict(recipe.unet)
        _check_data(config, images, labels, recipe.batch_size)
        self.recipe, self.images, self.labels, self.validation = recipe, images, labels, validation
        self.device, self.autocast = torch.device(device), autocast
        with torch.random.fork_rng():
            torch.manual_seed(_seed(recipe.seed, "weights", 0))
            unet = UNet(config)
        schedule = NoiseSchedule.from_config(recipe.schedule)
        self.model = DDPM(
            unet,
            schedule,
            prediction_type=recipe.prediction_type,
            sampler_options=SAMPLER_OPTIONS,
        ).to(self.device)
        self.ema = self.model.copy()
        self.ema.unet.eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.model.unet.parameters(), lr=recipe.learning_rate)
        self.step = 0
        self.seconds = 0.0
        self.losses: list[torch.Tensor] = []  # of the steps since the last line of the log

    def train_step(self) -> torch.Tensor:
        """One optimiser step; appends its loss to `losses` and returns its gradient's norm, on the device."""
        recipe = self.recipe
        x, labels = self._batch(self.step)
        torch.manual_seed(_seed(recipe.seed, "step", self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(self.step)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            loss = self.model.loss(
                x, labels, label_dropout=recipe.label_dropout, weighting=recipe.loss_weighting
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.unet.parameters(), recipe.gradient_clip)
        self.optimizer.step()
        decay = min(recipe.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.ema.unet.parameters()), list(self.model.unet.parameters()), 1 - decay
            )
        self.step += 1
        self.losses.append(loss.detach())
        return norm.detach()

    def validation_loss(self, batch_size: int = 256) -> float:
        """Mean loss of the averaged weights on the validation images, with the same noise each time."""
        images, labels = self.validation
        total = 0.0
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(_seed(self.recipe.seed, "validation", 0))
            for start in range(0, len(images), batch_size):
                x = to_float(images[start : start + batch_size].to(self.device))
                y = None if labels is None else labels[start : start + batch_size].to(self.device)
                total += len(x) * self.ema.loss(x, y, weighting=self.recipe.loss_weighting).item()
        return total / len(images)

    def _batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        size = self.recipe.batch_size
        epoch, position = divmod(step, len(self.images) // size)
        generator = torch.Generator().manual_seed(_seed(self.recipe.seed, "epoch", epoch))
        order = torch.randperm(len(self.images), generator=generator)
        index = order[position * size : (position + 1) * size]
        labels = None if self.labels is None else self.labels[index].to(self.device)
        return to_float(self.images[index].to(self.device)), labels

    def save(self, path: Path) -> None:
        """Writes the whole state as one safetensors file, or nothing."""
        tensors = {}
        for name, parameter in self.model.unet.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{key}.{name}"] = value
        tensors |= {f"ema.{name}": parameter for name, parameter in self.ema.unet.named_parameters()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        losses = [loss.item() for loss in self.losses]
        about = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "seconds": self.seconds,
            "losses": losses,
        }
        with replacing(path) as (temporary,):
            save_file(tensors, temporary, metadata={"training": json.dumps(about)})

    def load(self, path: Path) -> None:
        """Continues from a state that `save` wrote; ValueError if it is damaged or of another recipe."""
        about = read_state(path)
        recipe = json.loads(json.dumps(asdict(self.recipe)))
        differing = [key for key in recipe if about["recipe"].get(key) != recipe[key]]
        if differing:
            raise ValueError(f"{path} is of another recipe: it differs in {', '.join(differing)}")
        tensors = read_safetensors(path)
        groups = {"model": {}, "ema": {}, "adam": {}}
        for key, tensor in tensors.items():
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = tensor
        load_weights(self.model.unet, groups["model"], path)
        load_weights(self.ema.unet, groups["ema"], path)
        for name, parameter in self.model.unet.named_parameters():
            state = {k: groups["adam"].get(f"{k}.{name}") for k in ("step", "exp_avg", "exp_avg_sq")}
            if about["step"] and any(value is None for value in state.values()):
                raise ValueError(f"{path} is damaged: it lacks the optimiser's state of {name}")
            if about["step"]:
                # Adam keeps its step count on the CPU, and its moments with the parameter.
                self.optimizer.state[parameter] = {
                    k: value if k == "step" else value.to(self.device) for k, value in state.items()
                }
        self.step, self.seconds = about["step"], about["seconds"]
        self.losses = list(torch.tensor(about["losses"], device=self.device))


def read_state(path: Path) -> dict:
    """What a training state says of itself beside its tensors; ValueError if it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["training"])
        return {
            "recipe": dict(about["recipe"]),
            "step": int(about["step"]),
            "seconds": float(about["seconds"]),
            "losses": [float(loss) for loss in about["losses"]],
        }
    except FileNotFoundError as error:
        raise ValueError(f"there is no run to resume: {path} is missing") from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no training state, or damaged: {error}".replace("\n", " ")) from error


def _seed(seed: int, purpose: str, index: int) -> int:
    """A 63-bit seed for one purpose and step of a run, independent of those of all others."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _check_data(
    config: UNetConfig, images: torch.Tensor, labels: torch.Tensor | None, batch_size: int
) -> None:
    if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[1] != config.in_channels:
        raise ValueError(
            f"images must be uint8 [N, {config.in_channels}, H, W], not {images.dtype} {list(images.shape)}"
        )
    if len(images) < batch_size:
        raise ValueError(f"{len(images)} images do not fill one batch of {batch_size}")
    if (labels is None) != (config.num_classes is None):
        raise ValueError(
            "labels are given to an unconditional model"
            if config.num_classes is None
            else "a class-conditional model needs labels"
        )
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype != torch.int64):
        raise ValueError(f"labels must be int64 [{len(images)}], not {labels.dtype} {list(labels.shape)}")
    if labels is not None and not 0 <= labels.min() <= labels.max() < config.num_classes:
        raise ValueError(f"labels must be in 0..{config.num_classes - 1}")
