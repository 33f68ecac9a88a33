"""Checkpoints of guided-diffusion and improved-diffusion compute and sample what OpenAI's code does."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import diffusion
from diffusion.cli import main
from diffusion.importers import Checkpoint, guided_diffusion, improved_diffusion, read
from helpers.made_up_weights import images, weights, with_biases
from helpers.paths import FIXTURES
from helpers.thinning import exhaustive_but

# Outputs of OpenAI's own code (guided-diffusion at 22e0df8, improved-diffusion at 1bc7bbb for the case of
# that name) in float32 on a CPU, where `helpers.made_up_weights` makes the weights, inputs and noise: every
# step-th number of the flattened output for timesteps 7 and 983, and of the images that p_sample_loop
# ("ddpm") or ddim_sample_loop ("ddim") returns for a timestep_respacing. "modules" lists the names of the
# original's modules by the shape of their weights.
EXPECTED = json.loads((FIXTURES / "guided_diffusion.json").read_text())
# Flags of the cases that the tensors do not tell.
NEEDED = ("image_size", "num_heads", "num_head_channels", "use_new_attention_order", "diffusion_steps")
NEEDED += ("rescale_timesteps", "noise_schedule")


def save_guided(name: str, folder: Path, **changes: torch.Tensor | None) -> Path:
    """changes: tensors in place of those of the case, by name with "__" for "."; None removes one."""
    tensors = weights(with_biases(EXPECTED[name]["modules"], without=("label_emb",)))
    tensors |= {key.replace("__", "."): tensor for key, tensor in changes.items() if tensor is not None}
    removed = [key.replace("__", ".") for key, tensor in changes.items() if tensor is None]
    torch.save({key: tensor for key, tensor in tensors.items() if key not in removed}, folder / "model.pt")
    return folder / "model.pt"


def sample(model: diffusion.DDPM, case: dict[str, Any], **arguments: Any) -> torch.Tensor:
    """Every step-th number of the images that the model samples with the noise of the case."""
    config = model.unet.config
    shape = (2, config.in_channels, *config.image_shape)
    x = model.sample(case["labels"], num_samples=2, noise=lambda k: images(shape, 2000 + k), **arguments)
    return x.flatten()[:: case["step"]]


@pytest.mark.parametrize("name", EXPECTED)
def test_network(name, tmp_path):
    case = EXPECTED[name]
    unet, schedule, conventions, *_ = guided_diffusion.load(
        Checkpoint(save_guided(name, tmp_path)), **case["flags"]
    )
    config = unet.config
    x = images((2, 3, *config.image_shape), 1000)
    labels = None if case["labels"] is None else torch.tensor(case["labels"])
    with torch.no_grad():
        out = unet.eval()(x, torch.tensor([7, 983]), labels)
    expected = torch.tensor(case["values"])
    assert expected.std() > 0.3
    assert (out.flatten()[:: case["step"]] - expected).abs().max() <= 1e-5
    assert case["flags"].get("diffusion_steps", 1000) == schedule.T
    learned = case["flags"]["learn_sigma"]
    assert conventions["variance"] == ("learned_range" if learned else "fixed_large")
    assert config.learned_variance == learned
    if labels is not None:
        with pytest.raises(ValueError, match="without a null label"):
            unet(x, torch.tensor([7, 983]))


@pytest.mark.parametrize("name", EXPECTED)
def test_architecture_is_read_off_the_tensors(name, tmp_path):
    case, path = EXPECTED[name], save_guided(name, tmp_path)
    flags = {flag: value for flag, value in case["flags"].items() if flag in NEEDED}
    told = guided_diffusion.load(Checkpoint(path), **flags).unet.config
    assert told == guided_diffusion.load(Checkpoint(path), **case["flags"]).unet.config


@pytest.mark.thinned
@pytest.mark.parametrize("how", ["arguments", "flags", "saved"])
@pytest.mark.parametrize("name", exhaustive_but(EXPECTED, default=list(EXPECTED)[::2]))
def test_samples_are_those_of_the_original_loops(name, how, tmp_path):
    case, path = EXPECTED[name], save_guided(name, tmp_path)
    for title, expected in case["trajectories"].items():
        sampler, respacing = title.split()
        flags, arguments = dict(case["flags"]), {}
        if title in ("ddpm 7", "ddim ddim10") and how != "flags":
            arguments = {"sampler": sampler, "steps": int(respacing.removeprefix("ddim"))}
        else:
            flags |= {"timestep_respacing": respacing, "use_ddim": sampler == "ddim"}
        with pytest.warns(UserWarning, match="assumed:"):
            model = diffusion.load(path, flags=flags)
        if how == "saved":
            model.save(tmp_path / "model")
            model = diffusion.load(tmp_path / "model")
        assert (sample(model, case, **arguments) - torch.tensor(expected)).abs().max() <= 1e-4, title


@pytest.mark.parametrize(
    ("respacing", "sampler"),
    [
        ("", {"name": "ddpm", "steps": 1000, "spacing": "respaced"}),
        (250, {"name": "ddpm", "steps": 250, "spacing": "respaced"}),
        ("ddim25", {"name": "ddpm", "steps": 25, "spacing": "stride"}),
        ((10, 15, 20), {"name": "ddpm", "steps": 45, "spacing": "10,15,20"}),
    ],
)
def test_sampler_of_a_timestep_respacing(respacing, sampler, tmp_path):
    path, flags = save_guided("pooling", tmp_path), EXPECTED["pooling"]["flags"]
    conventions = guided_diffusion.load(Checkpoint(path), **flags, timestep_respacing=respacing).conventions
    assert conventions["sampler"] == sampler
    assert conventions["clip"] == 1.0
    options = {"timestep_respacing": respacing, "use_ddim": True, "clip_denoised": False}
    conventions = guided_diffusion.load(Checkpoint(path), **flags, **options).conventions
    assert conventions["sampler"] == sampler | {"name": "ddim"}
    assert conventions["clip"] is None


def test_conventions(tmp_path):
    path, flags = save_guided("pooling", tmp_path), EXPECTED["pooling"]["flags"]
    options = {"predict_xstart": True, "sigma_small": True, "use_fp16": True, "diffusion_steps": 250}
    _, schedule, conventions, *_ = guided_diffusion.load(Checkpoint(path), **flags, **options)
    assert (conventions["prediction_type"], conventions["variance"]) == ("sample", "fixed_small")
    assert conventions["sampler_options"]["ddim"] == {"spacing": "stride", "use_clipped_model_output": True}
    # Dhariwal & Nichol's code: the betas of 1000 steps, times 1000 / steps.
    torch.testing.assert_close(schedule.betas, torch.linspace(4e-4, 0.08, 250, dtype=torch.float64))


def test_format_chooses_the_defaults(tmp_path):
    """No tensor tells rescale_timesteps, nor the project, unless it has blocks that change the resolution."""
    case, path = EXPECTED["improved"], save_guided("improved", tmp_path)
    flags = {key: value for key, value in case["flags"].items() if key != "rescale_timesteps"}
    guided = read(path, flags=flags)
    assert guided.assumed["format"] == "guided-diffusion"
    assert guided.assumed["rescale_timesteps"] is False
    assert guided.unet.config.timestep_scale == 1
    assert "format" not in read(path, flags=flags | {"format": "guided-diffusion"}).assumed
    improved = read(path, flags=flags | {"format": "improved-diffusion"})
    assert improved.assumed["rescale_timesteps"] is True
    assert "format" not in improved.assumed
    assert improved.unet.config.timestep_scale == 0.25
    adm = read(save_guided("adm", tmp_path), flags=EXPECTED["adm"]["flags"])
    assert "format" not in adm.assumed


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ({}, 32),  # of the default resolutions 16 and 8, the second is below the coarsest level
        ({"attention_resolutions": "4"}, 8),
        ({"attention_resolutions": 32}, 64),
        ({"attention_resolutions": "8", "image_size": 16}, 16),
    ],
)
def test_image_size_that_attention_suggests(flags, size, tmp_path):
    """The case has attention where the resolution is halved once."""
    imported = guided_diffusion.load(Checkpoint(save_guided("legacy_attention", tmp_path)), **flags)
    assert imported.unet.config.sample_size == size
    assert ("image_size" in imported.assumed) == ("image_size" not in flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"imagesize": 3}, "unknown flag 'imagesize'; choose from: image_size, "),
        ({"image_size": "64"}, "flag image_size must be a whole number of at most 64 bits, not '64'"),
        ({"class_cond": "False"}, "flag class_cond must be true or false"),
        ({"num_channels": True}, "flag num_channels must be a whole number"),
        ({"class_cond": True}, "has class_cond False, but the flag is True"),
        ({"channel_mult": "1,x"}, "channel_mult must be numbers"),
        ({"channel_mult": "1,2"}, r"has channel_mult \(1, 1\), but the flag is '1,2'"),
        ({"image_size": 9}, "cannot be halved"),
        ({"attention_resolutions": "a"}, "attention_resolutions must be numbers"),
        ({"attention_resolutions": 8}, "has attention_resolutions '4', but the flag is '8'"),
        ({"attention_resolutions": 4.5}, "flag attention_resolutions must be text or a list of numbers"),
        ({"noise_schedule": "warped"}, "noise_schedule 'warped'"),
        ({"noise_schedule": ["linear"]}, "unknown noise_schedule"),
        ({"diffusion_steps": 0}, "flag diffusion_steps must be a whole number in 1..1000000, not 0"),
        ({"diffusion_steps": 10**400}, "flag diffusion_steps must be a whole number"),
        ({"diffusion_steps": 2**40}, "flag diffusion_steps must be a whole number in 1..1000000"),
        ({"num_heads": 2**40}, "num_heads must be a whole number in 1..65536"),
        ({"num_res_blocks": 10**18}, "has num_res_blocks 1, but the flag is 1000000000000000000"),
        ({"channel_mult": "1,inf"}, "channel_mult must be a list of finite numbers, not inf"),
        ({"channel_mult": (1, 10**400)}, "channel_mult must be a list of finite numbers"),
        ({"attention_resolutions": "1e400"}, "attention_resolutions must be a list of finite numbers"),
        ({"dropout": math.nan}, "flag dropout must be a finite number, not nan"),
        ({"num_heads_upsample": 4, "num_head_channels": -1}, "num_heads_upsample"),
        ({"num_head_channels": 48}, "heads of width 48"),
        ({"num_res_blocks": 2}, "has num_res_blocks 1, but the flag is 2"),
        ({"resblock_updown": True}, "has resblock_updown False, but the flag is True"),
        ({"learn_sigma": True}, "has learn_sigma False, but the flag is True"),
        ({"timestep_respacing": "fast"}, "flag timestep_respacing must be like '250', 'ddim25'"),
        ({"timestep_respacing": "ddim5,6"}, "flag timestep_respacing must be like '250', 'ddim25'"),
        ({"timestep_respacing": 1001}, "flag timestep_respacing must be a whole number in 1..1000"),
    ],
)
def test_wrong_flags(flags, message, tmp_path):
    path = save_guided("pooling", tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        guided_diffusion.load(Checkpoint(path), **(EXPECTED["pooling"]["flags"] | flags))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_blocks__0__0__weight": torch.ones(32, 6, 3, 3)}, "holds a super-resolution model"),
        ({"input_blocks__0__0__weight": torch.ones(32, 4, 3, 3)}, "takes 4 channels and predicts 3"),
        ({"out__2__weight": torch.ones(4, 32, 3, 3)}, "takes 3 channels and predicts 4"),
        ({"out__2__weight": torch.ones(())}, "no out.2.weight of 1 dimension"),
        ({"input_blocks__1__0__emb_layers__1__weight": None}, "no input_blocks.1.0.emb_layers.1.weight"),
        (
            {"middle_block__0__in_layers__0__weight": None},
            "holds no UNet of guided-diffusion: no middle_block",
        ),
        ({"middle_block__2__in_layers__0__weight": None}, "no middle_block.2.in_layers.0.weight"),
        ({"input_blocks__9__0__in_layers__0__weight": torch.ones(1)}, "do not make 7 levels"),
        ({"extra": torch.ones(1)}, "1 tensors too many, such as extra"),
    ],
)
def test_tensors_of_other_models(changes, message, tmp_path):
    path = save_guided("pooling", tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        guided_diffusion.load(Checkpoint(path), **EXPECTED["pooling"]["flags"])
    assert "\n" not in str(error.value)


def test_classifiers_are_refused(tmp_path):
    tensors = torch.load(save_guided("pooling", tmp_path))
    torch.save({k: v for k, v in tensors.items() if not k.startswith("output_blocks")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt holds a classifier of guided-diffusion"):
        diffusion.load(tmp_path / "model.pt")


def test_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"model.pt is missing"):
        guided_diffusion.load(Checkpoint(tmp_path / "model.pt"))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.pt")
    for importer in (guided_diffusion, improved_diffusion):
        with pytest.raises(ValueError, match="holds no UNet of guided-diffusion"):
            importer.load(Checkpoint(tmp_path / "model.pt"))


def test_flags_that_nobody_gave_are_named(tmp_path, capsys):
    path, flags = save_guided("pooling", tmp_path), EXPECTED["pooling"]["flags"]
    with pytest.warns(UserWarning, match=r"assumed: .*\bnoise_schedule=linear\b.* rescale_timesteps=False"):
        model = diffusion.load(path, flags=flags)
    given = [word for flag, value in flags.items() for word in ("--flag", f"{flag}={value}")]
    main(["import", str(path), "--out", str(tmp_path / "model"), *given])
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("assumed flags, which --flag NAME=VALUE changes: ")
    assumed = dict(word.split("=") for word in first.partition(": ")[2].split())
    assert assumed["noise_schedule"] == "linear"
    assert assumed.keys().isdisjoint(flags)
    assert "T = 1000" in second
    for name, weight in diffusion.load(tmp_path / "model").unet.state_dict().items():
        assert torch.equal(weight, model.unet.state_dict()[name])
