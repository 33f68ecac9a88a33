"""A model in one line."""

from torch import nn

from ..process.noise_levels import NoiseLevels
from ..process.schedule import NoiseSchedule
from ..utils.words import counted
from .structure import config_of

UNITS = ((1e9, " G"), (1e6, " M"), (1e3, " k"))


def described(name: str, unet: nn.Module, prediction_type: str, schedule: NoiseSchedule | NoiseLevels) -> str:
    """Such as "DDPM(28x28x1, 10 classes, v_prediction, cosine T=1000, 1.4 M parameters, cpu)".

    The size is height, width and channels. A network without a configuration is named by its class.
    """
    try:
        config = config_of(unet)
    except ValueError:
        return f"{name}({type(unet).__name__}, {prediction_type}, {schedule.name})"
    size = "x".join(map(str, (*config.image_shape, config.in_channels)))
    classes = "no classes" if config.num_classes is None else counted(config.num_classes, "class")
    parameters = list(unet.parameters())
    count = in_short(sum(parameter.numel() for parameter in parameters))
    device = parameters[0].device
    return f"{name}({size}, {classes}, {prediction_type}, {schedule.name}, {count} parameters, {device})"


def in_short(count: int) -> str:
    """A number to two digits, such as 1.4 M, or to all digits before the point; below 1,000 as it is."""
    for size, unit in UNITS:
        if count >= size:
            return f"{count / size:.{0 if count >= 10 * size else 1}f}{unit}"
    return str(count)
