"""Checkpoints of denoising-diffusion-pytorch give what its own code gave.

tests/fixtures/lucidrains holds random networks of several releases, with numbers that float16 holds exactly,
and what the releases computed on a CPU: a network's outputs, and the images of `GaussianDiffusion.sample` by
all steps and by 3 steps of DDIM, with noise[0] as the initial noise and noise[k] as that of step k.
"""

import json
import math
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffusion
from diffusion import importers
from diffusion.cli import main
from diffusion.models.lucidrains import LucidrainsUNet
from helpers.paths import FIXTURES
from helpers.thinning import exhaustive_but

GROUPS = {"resnet_block_groups": 2}
CASES = {
    "default": {"image_size": "4x8"},
    "self_condition": {"image_size": 4},
    "release_1_6": {"image_size": 4, **GROUPS},
    "release_0_31": {"image_size": 4, "objective": "pred_noise", "version": "0.31.1", **GROUPS},
    "classes": {"image_size": 4, "attn_heads": 2},
    "learned_variance": {"image_size": 4},
}


def stored(name):
    path = FIXTURES / "lucidrains" / f"{name}.safetensors"
    values = {key: tensor.float() for key, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        version = file.metadata()["version"]
    state = {key.removeprefix("state."): t for key, t in values.items() if key.startswith("state.")}
    return state, {k: t for k, t in values.items() if not k.startswith("state.")}, version


def milestone(state, version, ema=None):
    """As `Trainer.save` writes it: the moving average beside the weights, which here are others."""
    average = {f"ema_model.{k}": t for k, t in (ema or state).items()}
    online = {f"online_model.{k}": t * 1.5 for k, t in state.items()}
    counters = {"initted": torch.tensor(True), "step": torch.tensor(3)}
    contents = {"step": 3, "model": {k: t * 1.5 for k, t in state.items()}, "opt": {"state": {}}}
    contents |= {"ema": counters | online | average, "scaler": None}
    return contents | ({"version": version} if version[0] != "0" else {})


def load(contents, path, **flags):
    torch.save(contents, path)
    return load_file_with(path, **flags)


def load_file_with(path, **flags):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = diffusion.load(path, flags=flags)
    assert any("assumed: " in str(warning.message) for warning in caught)
    return model


def case(name, path):
    state, values, version = stored(name)
    return load(milestone(state, version), path, **CASES[name]), values


@pytest.mark.parametrize("name", CASES)
def test_network_and_images_are_the_originals(name, tmp_path):
    model, values = case(name, tmp_path / "model-3.pt")
    labels = torch.tensor([0, 2]) if name == "classes" else None
    t, x, noise = torch.tensor([0, 7]), values["x"], values["noise"]
    with torch.no_grad():
        previous = {"x0_prev": noise[3]} if name == "self_condition" else {}
        close(model.unet(x, t, labels, **previous), values["forward"], 1e-5)
        if labels is not None:
            close(model.unet(x, t), values["forward_null"], 1e-5)
    asked = {"labels": labels} if labels is not None else {"num_samples": 2}
    close(model.sample(**asked, noise=lambda k: noise[k]), values["ddpm"], 1e-4)
    assert model.value_range == (0.0, 1.0)
    if "ddim3" in values:
        images = model.sample(**asked, sampler="ddim", steps=3, noise=lambda k: noise[k])
        close(images, values["ddim3"], 1e-4)


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["default", "self_condition", "classes"])
def test_saved_copied_and_narrowed(name, tmp_path):
    model, values = case(name, tmp_path / "model-3.pt")
    noise, asked = values["noise"], {"num_samples": 2}
    if name == "classes":
        asked = {"labels": [0, 2]}
    model.save(tmp_path / "ours")
    again = diffusion.load(tmp_path / "ours")
    assert isinstance(again.unet, LucidrainsUNet)
    assert (again.guidance_rescale, again.guidance_parallel) == (
        model.guidance_rescale,
        model.guidance_parallel,
    )
    for same in (again, model.copy()):
        close(same.sample(**asked, noise=lambda k: noise[k]), values["ddpm"], 1e-4)
    close(model.sample(**asked, noise=lambda k: noise[k], dtype="float64"), values["ddpm"], 1e-4)
    narrow = model.sample(**asked, noise=lambda k: noise[k], dtype="bfloat16")
    assert (narrow - values["ddpm"]).square().mean().sqrt() < 0.15
    by_callback = []
    model.sample(**asked, noise=lambda k: noise[k], callback=lambda i, x, x0: by_callback.append(x0))
    close((by_callback[-1] + 1) / 2, values["ddpm"], 1e-4)
    # Buffers are kept from one call to the next, and the second must not begin with the x_0 of the first.
    close(model.sample(**asked, noise=lambda k: noise[k]), values["ddpm"], 1e-4)


@pytest.mark.parametrize(
    "name",
    exhaustive_but(
        ["default", "self_condition", "classes", "learned_variance"],
        default=["self_condition"],
    ),
)
def test_it_trains(name, tmp_path):
    model, values = case(name, tmp_path / "model-3.pt")
    images = values["ddpm"]
    labels = torch.tensor([0, 2]) if name == "classes" else None
    optimizer = torch.optim.Adam(model.unet.parameters(), lr=1e-3)
    losses = []
    for step in range(30):
        torch.manual_seed(step % 3)
        loss = model.loss(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_self_conditioned_loss_gives_the_first_prediction(tmp_path):
    model, values = case("self_condition", tmp_path / "model-3.pt")
    calls = []

    def network(x, t, labels, x0_prev=None):
        calls.append(x0_prev)
        return model.unet(x, t, labels, x0_prev=x0_prev)

    t, noise = torch.tensor([1, 5]), values["noise"][4]
    alphas = model.schedule.alphas_cumprod[t].reshape(2, 1, 1, 1)
    for seed in range(8):
        torch.manual_seed(seed)
        model.loss(values["ddpm"], t=t, noise=noise, network=network)
    given = [x0 for x0 in calls if x0 is not None]
    assert 0 < len(given) < 8
    assert len(calls) == 8 + len(given)
    x = alphas.sqrt() * (2 * values["ddpm"] - 1) + (1 - alphas).sqrt() * noise
    with torch.no_grad():
        expected = (x - (1 - alphas).sqrt() * model.unet(x.float(), t)) / alphas.sqrt()
    torch.testing.assert_close(given[0], expected.float(), rtol=1e-4, atol=1e-4)


def test_weights_of_a_milestone(tmp_path):
    state, _, version = stored("default")
    contents = milestone(state, version, ema={k: t * 1.25 for k, t in state.items()})
    for ema, factor in ((True, 1.25), (False, 1.5)):
        # betas of 1.25 and 1.5 times the original's are those of no schedule.
        for part in ("model", "ema"):
            betas = {k: state[k.split(".")[-1]] for k in contents[part] if k.split(".")[-1] in BUFFERS}
            contents[part] = contents[part] | betas
        model = load(contents, tmp_path / "model-3.pt", image_size=(4, 8), ema=ema)
        bias = model.unet.output_conv.bias
        torch.testing.assert_close(bias, state["model.final_conv.bias"] * factor)


BUFFERS = ("betas", "alphas_cumprod", "loss_weight")


def test_milestones_of_a_folder(tmp_path):
    state, _, version = stored("default")
    for number in (2, 10, 9):
        contents = milestone(state, version)
        contents["ema"]["ema_model.model.final_conv.bias"] = torch.full((3,), float(number))
        torch.save(contents, tmp_path / f"model-{number}.pt")
    (tmp_path / "sample-1.png").touch()
    assert load_file_with(tmp_path, image_size=(4, 8)).unet.output_conv.bias[0] == 10
    assert load_file_with(tmp_path, image_size=(4, 8), milestone=2).unet.output_conv.bias[0] == 2
    with pytest.raises(ValueError, match=r"model-3\.pt is missing"):
        diffusion.load(tmp_path, flags={"image_size": 4, "milestone": 3})


def test_a_milestone_without_average(tmp_path):
    state, values, version = stored("default")
    torch.save({"step": 3, "model": state, "version": version}, tmp_path / "model-1.pt")
    imported = importers.read(tmp_path / "model-1.pt", flags={"image_size": (4, 8)})
    assert imported.assumed["ema"] is False
    assert "version" not in imported.assumed
    with torch.no_grad():
        close(imported.unet(values["x"], torch.tensor([0, 7])), values["forward"], 1e-5)
    with pytest.raises(ValueError, match="holds no moving average"):
        diffusion.load(tmp_path / "model-1.pt", flags={"image_size": 4, "ema": True})


@pytest.mark.parametrize("wrapper", ["none", "state_dict", "ema", "module", "denoise_fn", "safetensors"])
def test_state_dicts_in_other_wrappers(wrapper, tmp_path):
    state, values, _ = stored("default")
    path = tmp_path / "weights.pt"
    if wrapper == "state_dict":
        state = {"state_dict": state}
    elif wrapper == "ema":
        state = {f"ema_model.{k}": t for k, t in state.items()} | {"initted": torch.tensor(True)}
    elif wrapper == "module":
        state = {f"module.{k}": t for k, t in state.items()}
    elif wrapper == "denoise_fn":
        state = {k.replace("model.", "denoise_fn."): t for k, t in state.items()}
    if wrapper == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
        model = load_file_with(path, image_size=(4, 8))
    else:
        model = load(state, path, image_size=[4, 8])
    noise = values["noise"]
    close(model.sample(num_samples=2, noise=lambda k: noise[k]), values["ddpm"], 1e-4)


def test_unet_alone(tmp_path):
    state, values, _ = stored("default")
    unet = {k.removeprefix("model."): t for k, t in state.items() if k.startswith("model.")}
    torch.save(unet, tmp_path / "unet.pt")
    imported = importers.read(
        tmp_path / "unet.pt", flags={"image_size": (4, 8), "timesteps": 10, "sampling_timesteps": 3}
    )
    assert imported.assumed["beta_schedule"] == "sigmoid"
    assert imported.assumed["objective"] == "pred_v"
    model = diffusion.DDPM(imported.unet, imported.schedule, **imported.conventions)
    torch.testing.assert_close(model.schedule.betas.float(), state["betas"], rtol=1e-6, atol=1e-9)
    noise = values["noise"]
    close(model.sample(num_samples=2, noise=lambda k: noise[k]), values["ddim3"], 1e-4)


SNR_WEIGHTS = {
    "pred_noise": lambda snr, clipped: clipped / snr,
    "pred_x0": lambda snr, clipped: clipped,
    "pred_v": lambda snr, clipped: clipped / (snr + 1),
}


@pytest.mark.thinned
@pytest.mark.parametrize("gamma", [math.inf, 5.0, 0.5])
@pytest.mark.parametrize("objective", SNR_WEIGHTS)
def test_objective_is_read_off_the_loss_weights(objective, gamma, tmp_path):
    state, _, version = stored("default")
    for T in (20, 1000):
        schedule = diffusion.NoiseSchedule.cosine(T)
        snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
        state["betas"], state["alphas_cumprod"] = schedule.betas.float(), schedule.alphas_cumprod.float()
        state["loss_weight"] = SNR_WEIGHTS[objective](snr, snr.clamp(max=gamma)).float()
        model = load(milestone(state, version), tmp_path / "model-1.pt", image_size=(4, 8))
        expected = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}[objective]
        assert model.prediction_type == expected
        assert model.schedule.to_config()["kind"] == "cosine"


@pytest.mark.parametrize(
    ("name", "changes", "flags", "message"),
    [
        ("default", {}, {}, "give the flag image_size"),
        ("default", {}, {"image_size": 5}, "multiples of 2"),
        ("default", {}, {"image_size": 4, "imagesize": 4}, "unknown flag 'imagesize'"),
        ("default", {}, {"image_size": 4, "timesteps": 1000}, "has timesteps 10, not 1000"),
        ("default", {}, {"image_size": 4, "objective": "pred_x0"}, "has objective pred_v, not pred_x0"),
        ("default", {}, {"image_size": 4, "attn_heads": 4}, r"has attn_heads \(2, 2\), not 4"),
        ("default", {}, {"image_size": 4, "version": "1.0"}, "has version 2.3.4, not 1.0"),
        ("default", {}, {"image_size": 4, "sampling_timesteps": 11}, "in 1..10"),
        ("default", {}, {"image_size": 4, "ema": "no"}, "flag ema must be"),
        ("release_1_6", {}, {"image_size": 4, "resnet_block_groups": 3}, "cannot be divided into 3"),
        ("release_1_6", {}, {"image_size": 4, "attn_heads": 5, **GROUPS}, "cannot be divided into 5 heads"),
        ("classes", {}, {"image_size": 4, "use_cfg_plus_plus": True}, "unknown flag"),
        (
            "default",
            {"model.final_conv.weight": torch.zeros(8, 4, 1, 1)},
            {"image_size": 4},
            "8 channels of 3",
        ),
        ("default", {"model.init_conv.weight": torch.zeros(4, 3, 7)}, {"image_size": 4}, "data of 1 dim"),
        ("default", {"model.downs.1.2.mem_kv": torch.zeros(3)}, {"image_size": 4}, "has a tensor .3."),
        ("default", {"model.more": torch.zeros(3)}, {"image_size": 4}, "1 unknown .'more'."),
        ("default", {"betas": torch.full((10,), 2.0)}, {"image_size": 4}, "betas must be in"),
        ("default", {"betas": torch.zeros(2, 5)}, {"image_size": 4}, "not one number per timestep"),
        ("default", {"model.final_conv.bias": torch.full((3,), math.nan)}, {"image_size": 4}, "NaN"),
    ],
)
def test_what_cannot_be_read(name, changes, flags, message, tmp_path):
    state, _, version = stored(name)
    torch.save(milestone(state | changes, version), tmp_path / "model-3.pt")
    with pytest.raises(ValueError, match=message) as error:
        diffusion.load(tmp_path / "model-3.pt", flags=flags)
    assert "\n" not in str(error.value)


def test_continuous_time_is_refused(tmp_path):
    state, _, _ = stored("default")
    unet = {k: t for k, t in state.items() if k.startswith("model.")}
    unet["model.time_mlp.0.weights"] = torch.randn(8)
    unet["model.time_mlp.1.weight"] = torch.randn(16, 17)
    torch.save(unet, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="continuous-time and elucidated processes"):
        diffusion.load(tmp_path / "weights.pt", flags={"image_size": 4})
    model = load(unet, tmp_path / "weights.pt", image_size=4, timesteps=10)
    assert model.unet.config.fourier_channels == 16


def test_older_layouts_are_refused(tmp_path):
    torch.save({"downs.0.0.block1.block.0.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "model-3.pt")
    with pytest.raises(ValueError, match=r"before 0\.12, which is not read"):
        diffusion.load(tmp_path / "model-3.pt")


def test_commands(tmp_path, capsys):
    state, _, version = stored("default")
    torch.save(milestone(state, version), tmp_path / "model-3.pt")
    main(["import", str(tmp_path / "model-3.pt"), "--size", "4x8", "--out", str(tmp_path / "ours")])
    assert "sampling_timesteps=10" in capsys.readouterr().out
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["unet"]["architecture"] == "lucidrains"
    assert config["sampler"] == {"name": "ddpm", "steps": 10}
    main(["sample", "--model", str(tmp_path / "ours"), "--num", "2", "--out", str(tmp_path / "images.png")])
    assert (tmp_path / "images.png").is_file()
