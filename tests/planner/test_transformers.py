"""Networks with transformers, as planned, equal themselves as they came: Stable Diffusion and its kind."""

import copy

import pytest
import torch
from torch import Tensor, nn

import diffusion
from diffusion.kernels.ops.attention.library import attention_
from diffusion.kernels.ops.layer_norm.library import layer_norm_
from diffusion.planner import weights as planner_weights
from helpers.diffusers_unets import conditional, of_conditional
from helpers.native import requires_native
from helpers.thinning import exhaustive_but
from helpers.tolerance import assert_close

diffusers = pytest.importorskip("diffusers")
attention_processor = pytest.importorskip("diffusers.models.attention_processor")
pytestmark = requires_native

ONE_LEVEL = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
SDXL = {  # two blocks to a transformer, and the text's vector and sizes beside the timestep
    "transformer_layers_per_block": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 12 + 6 * 8,
}


@pytest.fixture(autouse=True)
def fast_kernels(monkeypatch):
    """Plans the small networks of these tests as large ones are planned."""
    monkeypatch.setattr(planner_weights, "SMALL_NETWORK", 0)


def of_sdxl(batch: int) -> dict:
    added = {"text_embeds": torch.linspace(-1, 1, 12 * batch).view(batch, 12)}
    added["time_ids"] = torch.tensor([8.0, 8, 0, 0, 8, 8]).repeat(batch, 1)
    return of_conditional(batch) | {"added_cond_kwargs": added}


def of_mask(batch: int, positions: int, of: str) -> dict[str, Tensor]:
    """Inputs with a mask that hides more positions of each image than of the one before."""
    hidden = torch.arange(positions) >= positions - 1 - torch.arange(batch)[:, None]
    return of_conditional(batch) | {of: (~hidden).float()}


def with_labels(batch: int, labels: Tensor) -> dict[str, Tensor]:
    return of_conditional(batch) | {"class_labels": labels}


def processed(processor: nn.Module) -> nn.Module:
    network = conditional()
    network.set_attn_processor(processor)
    return network


NETWORKS = {
    "conditional": (conditional, lambda: of_conditional(2)),
    "text of 77 positions": (conditional, lambda: of_conditional(1, positions=77)),
    "images that are not square": (conditional, lambda: of_conditional(3, (4, 10), 1)),
    "odd sizes": (lambda: conditional(**ONE_LEVEL), lambda: of_conditional(5, (7, 5), 13)),
    "sdxl": (lambda: conditional(**SDXL), lambda: of_sdxl(2)),
    "mask of the text": (conditional, lambda: of_mask(3, 7, "encoder_attention_mask")),
    "mask of the image": (
        lambda: conditional(**ONE_LEVEL),
        lambda: of_mask(2, 64, "attention_mask"),
    ),
    "class labels": (
        lambda: conditional(num_class_embeds=5),
        lambda: with_labels(2, torch.tensor([4, 0])),
    ),
    "labels joined with the time": (
        lambda: conditional(num_class_embeds=5, class_embeddings_concat=True),
        lambda: with_labels(2, torch.tensor([4, 0])),
    ),
    "vectors as labels": (
        lambda: conditional(class_embed_type="projection", projection_class_embeddings_input_dim=6),
        lambda: with_labels(2, torch.ones(2, 6)),
    ),
    "scale and shift": (
        lambda: conditional(resnet_time_scale_shift="scale_shift", time_embedding_act_fn="gelu"),
        lambda: of_conditional(2),
    ),
    "slow attention": (
        lambda: processed(attention_processor.AttnProcessor()),
        lambda: of_conditional(2),
    ),
    "sliced attention": (
        lambda: processed(attention_processor.SlicedAttnProcessor(2)),
        lambda: of_conditional(2),
    ),
}


def exact(network: nn.Module, given: dict) -> Tensor:
    def double(value: Tensor) -> Tensor:
        return value.double() if value.is_floating_point() else value

    given = torch.utils._pytree.tree_map_only(Tensor, double, given)
    return copy.deepcopy(network).double()(**given).sample


# Of which another test, or another network, has one of the kind.
OTHERS = ("conditional", "class labels", "slow attention", "images that are not square", "vectors as labels")


@torch.no_grad()
@pytest.mark.parametrize("name", exhaustive_but(NETWORKS, default=NETWORKS.keys() - OTHERS))
def test_outputs_are_the_networks(name):
    make, inputs = NETWORKS[name]
    network, given = make(), inputs()
    expected = exact(network, given)
    actual = diffusion.accelerate(network)(**given).sample
    assert "planned, exact" in network.report()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.thinned
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name",
    exhaustive_but(
        ["conditional", "sdxl", "mask of the text", "scale and shift"], default=["conditional", "sdxl"]
    ),
)
def test_networks_in_sixteen_bits(name, dtype):
    """A module of 16 bits; and for bfloat16 one of float32 that is planned to be fast."""

    def rounded(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    make, inputs = NETWORKS[name]
    network, given = make(), inputs()
    expected = exact(network, given)
    short = torch.utils._pytree.tree_map_only(Tensor, rounded, given)
    peer = copy.deepcopy(network).to(dtype)(**short).sample
    allowed = 2 * (peer - expected).square().mean().sqrt()
    results = [diffusion.accelerate(copy.deepcopy(network).to(dtype))(**short).sample]
    assert results[0].dtype == dtype
    if dtype == torch.bfloat16:
        results.append(diffusion.accelerate(network, precision="fast")(**given).sample)
        assert "planned, fast" in network.report()
    for actual in results:
        assert (actual - expected).square().mean().sqrt() <= allowed


@torch.no_grad()
def test_all_of_a_transformer_is_fused():
    """Two attentions in each of four transformers, norms and GEGLU; and linear maps of vectors."""
    network = diffusion.accelerate(conditional())
    network(**of_conditional(2))
    layout = network.forward._thread_local.last.plan.layout
    functions = [function for function, _ in layout.calls]
    assert (functions.count(attention_), functions.count(layer_norm_)) == (8, 12)
    names = [node.options["call"].function.__name__ for node in layout.unfused]
    assert sorted(names) == ["cat", "cat", "cos", "float", "mul", "sin"]  # of the timestep


@torch.no_grad()
def test_outputs_of_both_kinds():
    network, given = diffusion.accelerate(conditional()), of_conditional(1)
    (first,) = network(*given.values(), return_dict=False)
    assert "planned" in network.report()
    assert torch.equal(first, network(**given).sample)


@torch.no_grad()
def test_fused_lora_weights_are_noticed():
    """LoRA weights that are fused change a weight in place, by a product of low rank."""
    network, given = diffusion.accelerate(conditional()), of_conditional(2)
    before = network(**given).sample
    for name, module in network.named_modules():
        if name.endswith(("to_q", "to_v", "proj_in")):
            rows, columns = module.weight.flatten(1).shape
            product = torch.linspace(-1, 1, rows)[:, None] * torch.linspace(1, 0.5, columns)
            module.weight += product.view_as(module.weight) / 4
    actual = network(**given).sample
    expected = exact(diffusion.restore(network), given)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (actual - before).abs().max() > 1e-3


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    network, given = diffusion.accelerate(conditional()), of_conditional(3)
    together = network(**given).sample
    for i in range(3):
        alone = network(given["sample"][i : i + 1], 437, given["encoder_hidden_states"][i : i + 1]).sample
        assert torch.equal(alone[0], together[i])


@torch.no_grad()
def test_a_pipeline_with_guidance_makes_the_same_images(monkeypatch):
    """Classifier-free guidance as in diffusers' pipelines: both halves in one batch, and DDIM's steps.

    Guidance multiplies the networks' rounding, so this one is planned as the small network that it is.
    """
    monkeypatch.undo()
    network, scheduler = conditional(), diffusers.DDIMScheduler()

    def images(network: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x, text = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 4, 8, 8), (2, 7, 24)))
        both = torch.cat([torch.zeros_like(text), text])
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(torch.cat([x, x]), t)
            without, conditioned = network(given, t, encoder_hidden_states=both).sample.chunk(2)
            x = scheduler.step(without + 3 * (conditioned - without), t, x).prev_sample
        return x

    expected, peer = images(copy.deepcopy(network).double(), torch.float64), images(network)
    actual = images(diffusion.accelerate(network))
    assert "planned" in network.report()
    assert_close(actual, peer, expected)
