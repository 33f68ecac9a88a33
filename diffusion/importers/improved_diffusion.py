"""Reads the .pt checkpoints of OpenAI's improved-diffusion.

Its UNet has the names of guided-diffusion's, so a file does not tell which of the two it is from, and is read
as guided-diffusion's unless the flag `format` names this module. They differ in defaults of flags.
"""

from typing import Any

from . import guided_diffusion
from .checkpoint_file import Checkpoint
from .imported import Imported

NAME = "improved-diffusion"
HUB_FILES: tuple[str, ...] = ()  # read from a local .pt file only
FLAGS = guided_diffusion.FLAGS


def recognises(checkpoint: Checkpoint) -> bool:
    """False, because no file tells it."""
    return False


def load(checkpoint: Checkpoint, /, **flags: Any) -> Imported:
    """`guided_diffusion.load_unet` with the defaults of improved-diffusion: timesteps are rescaled.

    Its options of attention that came with guided-diffusion are not among the assumed flags.
    """
    defaults = guided_diffusion.DEFAULTS | {"rescale_timesteps": True}
    imported = guided_diffusion.load_unet(checkpoint, flags, defaults)
    later = ("num_head_channels", "use_new_attention_order")
    assumed = {flag: value for flag, value in (imported.assumed or {}).items() if flag not in later}
    return imported._replace(assumed=assumed)
