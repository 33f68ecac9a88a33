"""Random small networks of diffusers' block types, accelerated, equal themselves as they came."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffusion
from diffusion.planner import weights as planner_weights
from helpers.native import requires_native
from helpers.thinning import exhaustive_but

diffusers = pytest.importorskip("diffusers")
pytestmark = requires_native

ERROR = 1e-5  # allowed error of float32, relative to the largest output, as in test_accelerate.py

DOWN = ["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D"]
UP = ["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D"]
CROSS_DOWN = ["DownBlock2D", "CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"]
CROSS_UP = ["UpBlock2D", "CrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"]
MIDS = ["UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D"]
WIDTH = 12  # of the encoder's states
DEFAULT = (0, 3, 4)  # seeds: both kinds of network, and each mode


@pytest.fixture(autouse=True)
def fast_kernels(monkeypatch):
    """Plans the small networks of these tests as large ones are planned."""
    monkeypatch.setattr(planner_weights, "SMALL_NETWORK", 0)


class Case:
    """A network, the arguments of a call, and the numbers from which both were made."""

    def __init__(self, kind: type[nn.Module], options: dict[str, Any], arguments: dict[str, Any]):
        self.kind, self.options, self.arguments = kind, options, arguments

    def __repr__(self) -> str:
        shapes = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in self.arguments.items()}
        return f"{self.kind.__name__} {self.options} of {shapes}"

    def network(self) -> nn.Module | None:
        """The network, or None where diffusers has none of these options."""
        torch.manual_seed(0)
        try:
            network = self.kind(**self.options).eval()
        except (ValueError, TypeError, AttributeError, NotImplementedError, ZeroDivisionError):
            return None
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim == 1:  # as initialised, weights of norms are 1 and biases 0
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return network

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return {name: cast(value) for name, value in self.arguments.items()}

    @torch.no_grad()
    def run(self, network: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        inputs = self.inputs(dtype)
        return network(**inputs)[0] if inputs.get("return_dict") is False else network(**inputs).sample


def common(draw: random.Random, levels: int) -> dict[str, Any]:
    groups = draw.choice([1, 2, 4, 8])
    return {
        "block_out_channels": tuple(draw.choice([8, 16, 24, 32]) for _ in range(levels)),
        "layers_per_block": draw.randint(1, 2),
        "norm_num_groups": groups,
        "norm_eps": draw.choice([1e-6, 1e-5, 1e-3]),
        "act_fn": draw.choice(["silu", "silu", "gelu", "relu", "mish"]),
        "resnet_time_scale_shift": draw.choice(["default", "scale_shift"]),
        "attention_head_dim": draw.choice([1, 2, 4, 8]),
        "mid_block_scale_factor": draw.choice([1.0, 1.0, 2**0.5]),
        "downsample_padding": draw.randint(0, 1),
        "flip_sin_to_cos": draw.choice([False, True]),
        "freq_shift": draw.randint(0, 1),
        "dropout": draw.choice([0.0, 0.3]),
        "center_input_sample": draw.choice([False, True]),
        "in_channels": draw.randint(1, 4),
        "out_channels": draw.randint(1, 4),
    }


def labels_of(draw: random.Random, options: dict[str, Any], batch: int, *kinds: str) -> dict[str, Any]:
    """Class labels, by a table or by an embedding; the options are extended."""
    kind = draw.choice([None, None, *kinds])
    if kind is None:
        return {}
    options |= {"num_class_embeds": 5} if kind == "table" else {"class_embed_type": "timestep"}
    return {"class_labels": torch.arange(batch) % 5}


def unconditional(draw: random.Random) -> Case:
    levels, batch = draw.randint(1, 3), draw.randint(1, 5)
    pairs = [draw.choice(list(zip(DOWN, UP, strict=True))) for _ in range(levels)]
    if draw.choice([False, True]):  # blocks in another order on the way up
        ups = tuple(draw.choice(UP[:3]) for _ in range(levels))
    else:
        ups = tuple(up for _, up in reversed(pairs))
    options = common(draw, levels) | {
        "down_block_types": tuple(down for down, _ in pairs),
        "up_block_types": ups,
        "downsample_type": draw.choice(["conv", "resnet"]),
        "upsample_type": draw.choice(["conv", "resnet"]),
        "add_attention": draw.choice([False, True]),
        "attn_norm_num_groups": draw.choice([None, 2]),
        "time_embedding_type": draw.choice(["positional", "positional", "fourier"]),
    }
    labels = labels_of(draw, options, batch, "table")
    size = tuple(2 ** (levels - 1) * draw.randint(1, 5) for _ in range(2))
    sample = torch.randn(batch, options["in_channels"], *size, generator=torch.Generator().manual_seed(1))
    timestep = torch.arange(batch) * 100 + 7
    return_dict = draw.choice([False, True])
    given = {"sample": sample, "timestep": timestep, "return_dict": return_dict, **labels}
    return Case(diffusers.UNet2DModel, options, given)


def conditional(draw: random.Random) -> Case:
    levels, batch = draw.randint(1, 3), draw.randint(1, 4)
    options = common(draw, levels) | {
        "down_block_types": tuple(draw.choice(CROSS_DOWN) for _ in range(levels)),
        "up_block_types": tuple(draw.choice(CROSS_UP) for _ in range(levels)),
        "mid_block_type": draw.choice([*MIDS, None]),
        "cross_attention_dim": WIDTH,
        "transformer_layers_per_block": draw.randint(1, 2),
        "only_cross_attention": draw.choice([False, False, True]),
        "dual_cross_attention": draw.choice([False, False, True]),
        "use_linear_projection": draw.choice([False, True]),
        "upcast_attention": draw.choice([False, True]),
        "resnet_skip_time_act": draw.choice([False, False, True]),
        "resnet_out_scale_factor": draw.choice([1.0, 1.0, 2.0]),
        "conv_in_kernel": draw.choice([3, 3, 1, 5]),
        "conv_out_kernel": draw.choice([3, 3, 1, 5]),
        "time_embedding_act_fn": draw.choice([None, None, "gelu"]),
    }
    labels = labels_of(draw, options, batch, "table", "timestep")
    size = tuple(draw.randint(1, 11) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    text = draw.randint(1, 9)
    given = {
        "sample": torch.randn(batch, options["in_channels"], *size, generator=generator),
        "timestep": torch.tensor(437),
        "encoder_hidden_states": torch.randn(batch, text, WIDTH, generator=generator),
        "return_dict": draw.choice([False, True]),
        **labels,
    }
    if draw.choice([False, True]):
        mask = torch.ones(batch, text, dtype=torch.bool)
        mask[-1, text // 2 + 1 :] = False
        given["encoder_attention_mask"] = mask
    return Case(diffusers.UNet2DConditionModel, options, given)


def drawn(seed: int) -> tuple[nn.Module, Tensor, Case]:
    """A network that diffusers runs, its output in float32, and the case."""
    for attempt in range(100):
        draw = random.Random(f"{seed} {attempt}")
        case = unconditional(draw) if seed % 2 else conditional(draw)
        network = case.network()
        if network is None:
            continue
        try:
            peer = case.run(network)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            continue
        if peer.isfinite().all():
            return network, peer, case
    raise AssertionError("diffusers runs none of these networks")


@pytest.mark.parametrize("seed", exhaustive_but(range(60), DEFAULT))
def test_random_networks(seed):
    """Odd seeds are UNet2DModels, even ones UNet2DConditionModels; planned exact, in float16, or fast."""
    network, peer, case = drawn(seed)
    expected = case.run(copy.deepcopy(network).double(), torch.float64)
    precision, dtype = [("exact", torch.float32), ("exact", torch.float16), ("fast", torch.bfloat16)][
        seed // 2 % 3
    ]
    if dtype != torch.float32:
        peer = case.run(copy.deepcopy(network).to(dtype), dtype)
    if not peer.isfinite().all():
        pytest.skip(f"it overflows in {dtype}")
    given = dtype if precision == "exact" else torch.float32
    network.to(given)
    diffusion.accelerate(network, precision=precision)
    for _ in range(2):  # the buffers hold other values at the second call
        actual = case.run(network, given)
        assert f"planned, {precision}" in network.report(), f"{case}\n{network.report()}"
        assert "Error" not in network.report(), f"{case}\n{network.report()}"
        assert actual.dtype == given
        if dtype == torch.float32:
            allowed = 2 * (peer - expected).abs().max() + ERROR * expected.abs().max()
            assert (actual - expected).abs().max() <= allowed, case
        else:
            error, allowed, size = (
                y.double().square().mean().sqrt() for y in (actual - expected, peer - expected, expected)
            )
            assert error <= 2 * allowed + 1e-3 * size, case
