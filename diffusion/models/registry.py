"""The networks that a model may have, by the name that config.json gives them.

A new network is a file here with a subclass of `network.Network`, and its entry in `NETWORKS`.
"""

from typing import Any

import torch

from ..utils.validation import choice, typed
from .context_unet import ContextUNet
from .conv_stack import ConvStack
from .diagonal_unet import DiagonalUNet
from .edm import EDMUNet
from .lucidrains import LucidrainsUNet
from .naive_unet import NaiveUNet
from .network import Network, NetworkConfig
from .unet import UNet

NETWORKS: dict[str, type[Network]] = {
    "unet": UNet,
    "context_unet": ContextUNet,
    "conv_stack": ConvStack,
    "diagonal_unet": DiagonalUNet,
    "lucidrains": LucidrainsUNet,
    "edm": EDMUNet,
    "naive_unet": NaiveUNet,
}
ARCHITECTURE = "architecture"  # the key of the name; a configuration without it is that of "unet"


def build(config: NetworkConfig) -> Network:
    """A network of this configuration, with initial weights, on PyTorch's default device."""
    network: type[Any] = NETWORKS[architecture(config)]
    return network(config)


def build_on_meta(config: NetworkConfig) -> Network:
    """A network of this configuration without values, so that it takes no memory before weights fit it."""
    with torch.inference_mode(False), torch.device("meta"):
        return build(config)


def architecture(config: NetworkConfig) -> str:
    """The name, in `NETWORKS`, of the network that a configuration describes."""
    return next(name for name, network in NETWORKS.items() if network.Config is type(config))


def config_to_dict(config: NetworkConfig) -> dict[str, Any]:
    """A configuration with the name of its network, as JSON can hold it."""
    name = architecture(config)
    return ({} if name == "unet" else {ARCHITECTURE: name}) | config.to_dict()


def config_from_dict(values: dict[str, Any]) -> NetworkConfig:
    """The inverse of `config_to_dict`; ValueError for an unknown network, field or value."""
    values = dict(typed("a network's configuration", values, dict))
    name = choice("architecture", values.pop(ARCHITECTURE, "unet"), NETWORKS)
    return NETWORKS[name].Config.from_dict(values)
