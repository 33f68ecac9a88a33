"""The interface of importers: the functions of an importer, and the model that it returns."""

from typing import Any, NamedTuple, Protocol

from ..models.network import Network
from ..process.noise_levels import NoiseLevels
from ..process.schedule import NoiseSchedule
from .checkpoint_file import Checkpoint


class Imported(NamedTuple):
    """A model that was read from a checkpoint.

    unet: the network, in float32 on the CPU. schedule: the noise schedule of its training. conventions:
    further arguments of `DDPM`, such as "prediction_type", "variance" and "clip". assumed: the flags that the
    checkpoint does not tell and the caller did not give, with the values that were taken for them. note: a
    line about what this package does otherwise than the original; "" for nothing.
    """

    unet: Network
    schedule: NoiseSchedule | NoiseLevels
    conventions: dict[str, Any]
    assumed: dict[str, Any] | None = None
    note: str = ""

    def assumed_text(self) -> str:
        """The assumed flags in the form that `--flag` takes, such as "learn_sigma=True"; "" for none."""
        return " ".join(f"{flag}={value}" for flag, value in (self.assumed or {}).items())


class Importer(Protocol):
    """A module of this folder that reads the checkpoints of one project, listed in `importers.REGISTRY`.

    NAME: the name of the project, for messages and for the flag `format`. HUB_FILES: patterns of the names of
    its files on the hub; none, if its checkpoints are read from local files only. FLAGS: what a checkpoint
    does not tell, by name, each with a line of help.
    """

    NAME: str
    HUB_FILES: tuple[str, ...]
    FLAGS: dict[str, str]

    def recognises(self, checkpoint: Checkpoint, /) -> bool:
        """Whether a file or folder looks like this project's checkpoint; False if it cannot be told."""
        ...

    def load(self, checkpoint: Checkpoint, /, **flags: Any) -> Imported:
        """Reads a checkpoint.

        flags: facts that the checkpoint does not tell, by name, as Python values. ValueError, in one line: a
        file that is missing or damaged, a flag that is unknown, or an option that cannot be represented.
        """
        ...
