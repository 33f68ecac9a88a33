"""State dicts in the layout of NVlabs/edm, with weights that are a function of the tensors' names."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

# For each case, "CASE/layout" in the metadata has the names and shapes of net.state_dict() of a network of
# NVlabs/edm at commit 008a4e5. The tensors are float32 outputs of that network with the weights of
# `state_dict`, on a CPU: "CASE/x" are standard normal images, "CASE/denoised.S" is net(x * S, S, labels), and
# "CASE/heunN" is edm_sampler(net, x, labels, num_steps=N), with class labels 2 and 0 where the network takes
# some. "CASE/churn8" is the same with S_churn=6, S_min=0.05, S_max=50, S_noise=1.003, and with the noise
# "CASE/noise" for its calls of randn_like. Buffers, such as "CASE/u", are those of the network.
FILE = Path(__file__).parents[1] / "data" / "edm.safetensors"


def expected(case: str) -> dict[str, torch.Tensor]:
    """The recorded tensors of a case."""
    with safe_open(FILE, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{case}/")]  # noqa: SIM118 (no mapping)
        return {name.removeprefix(f"{case}/"): file.get_tensor(name) for name in names}


def state_dict(case: str) -> dict[str, torch.Tensor]:
    """The state dict of a case."""
    with safe_open(FILE, framework="pt") as file:
        layout = json.loads(file.metadata()[f"{case}/layout"])
    recorded = expected(case)
    return {name: weight(name, tuple(shape), recorded) for name, shape in layout.items()}


def weight(name: str, shape: tuple[int, ...], buffers: dict[str, torch.Tensor]) -> torch.Tensor:
    """A weight of this name: normal, with a deviation that keeps the size of what it multiplies."""
    if name == "u":
        return buffers["u"]
    if name.endswith(".resample_filter"):
        return buffers["resample_filter"]
    # The legacy generator, since its stream is the same in every version of NumPy.
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name and name.endswith(".weight"):
        values = 1 + 0.1 * values
    elif len(shape) == 1:
        values = values * (16 if name.endswith(".freqs") else 0.1)
    else:
        values = values / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))
