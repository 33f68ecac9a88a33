"""Imported models compute what the originals do: diffusers itself, and stored outputs of OpenAI's code."""

import json
from pathlib import Path
from typing import ClassVar

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import diffusion
from diffusion import importers
from diffusion.cli import main
from diffusion.importers import Checkpoint, Imported
from diffusion.importers import diffusers as diffusers_format
from diffusion.importers.diffusers_unet import convert_weights, unet_config
from diffusion.models.conv_stack import ConvStack, ConvStackConfig
from diffusion.models.unet import UNet
from diffusion.utils.validation import known_names
from helpers.thinning import exhaustive_but
from helpers.unet2d import SMALL, original

# google/ddpm-cifar10-32, as its config.json has it.
CIFAR10 = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
ATTENTION_FIRST = {
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
}
UNETS = {
    "cifar10": CIFAR10,
    "small": SMALL,
    "mnist": SMALL | {"sample_size": 28, "in_channels": 1, "out_channels": 1, "layers_per_block": 3},
    "scale_shift": SMALL | {"resnet_time_scale_shift": "scale_shift"},
    "scale_shift_mid_groups": SMALL | {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "resnet_sampling": SMALL | ATTENTION_FIRST | {"downsample_type": "resnet", "upsample_type": "resnet"},
    "resnet_sampling_partly": {
        **SMALL,
        "block_out_channels": [16, 32, 32],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "resnet_blocks": SMALL
    | {
        "down_block_types": ["ResnetDownsampleBlock2D", "DownBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", "UpBlock2D"],
    },
    "attention_everywhere": SMALL
    | {"down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2},
    "sines_first": SMALL | {"flip_sin_to_cos": False, "freq_shift": 1},
    "one_head": SMALL | {"attention_head_dim": None},
    "wide_heads": SMALL | {"attention_head_dim": 16},
    "classes": SMALL | {"num_class_embeds": 10},
    "groups_and_eps": SMALL | {"norm_num_groups": 4, "norm_eps": 1e-3},
    "asymmetric": SMALL | {"downsample_padding": 0},
    "odd_widths": SMALL | {"block_out_channels": [24, 40]},
    "oblong": SMALL | {"sample_size": [12, 20]},
    "no_mid_attention": SMALL | {"add_attention": False},
    "embedding": SMALL | {"time_embedding_dim": 24},
    "learned_variance": SMALL | {"out_channels": 6},
}


def assert_same_outputs(unet: UNet, model: diffusers.UNet2DModel, batch: int = 2):
    config = unet.config
    x = torch.randn(
        batch, config.in_channels, *config.image_shape, generator=torch.Generator().manual_seed(1)
    )
    labels = torch.arange(batch) % config.num_classes if config.num_classes else None
    with torch.no_grad():
        for t in (torch.arange(batch), 999 - 7 * torch.arange(batch)):
            expected = model(x, t, class_labels=labels).sample
            out = unet.eval()(x, t, labels)
            assert expected.std() > 0.1
            assert (out - expected).abs().max() <= 1e-5


def imported(model: diffusers.UNet2DModel, tensors: dict | None = None) -> UNet:
    ours = unet_config(json.loads(model.to_json_string()))
    unet = UNet(ours)
    unet.load_state_dict(convert_weights(ours, tensors or model.state_dict()))
    return unet


@pytest.mark.parametrize("name", exhaustive_but(UNETS, default=UNETS.keys() - {"cifar10"}))
def test_unet2dmodel(name):
    model = original(UNETS[name])
    assert_same_outputs(imported(model), model)


def test_unet2dmodel_defaults():
    """An empty configuration has the defaults of diffusers."""
    given = {"sample_size": 8, "_class_name": "UNet2DModel"}
    with torch.device("meta"):
        spelled_out = json.loads(diffusers.UNet2DModel(sample_size=8).to_json_string())
    assert unet_config(given) == unet_config(spelled_out)


def test_old_attention_names():
    """query, key, value and proj_attn, as in the files of 2022."""
    model = original(SMALL)
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in model.state_dict().items():
        for current, old in new.items():
            name = name.replace(f"attentions.0.{current}.", f"attentions.0.{old}.")
        tensors[name] = tensor
    assert any("query" in name for name in tensors)
    assert_same_outputs(imported(model, tensors), model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_fn": "elu"}, "act_fn 'elu' cannot be imported, only 'silu', 'swish', 'gelu', 'mish', 'relu'"),
        ({"center_input_sample": 1}, "center_input_sample must be true or false"),
        ({"class_embed_type": "projection"}, "class_embed_type 'projection'"),
        ({"time_embedding_type": "random"}, "time_embedding_type 'random'"),
        ({"time_embedding_type": "learned"}, "learned_timesteps must be a number of rows"),
        ({"mid_block_scale_factor": 0}, "mid_block_scale_factor must be a number in"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type 'UNetMidBlock2DCrossAttn'"),
        ({"num_class_embeds": 2**31}, "num_class_embeds must be a whole number"),
        ({"out_channels": 1}, "in_channels 3 and out_channels 1 cannot be sampled"),
        ({"in_channels": 6}, "in_channels 6 and out_channels 3 cannot be sampled"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "down_block_types 'SkipDownBlock2D'"),
        ({"up_block_types": ["AttnSkipUpBlock2D", "UpBlock2D"]}, "up_block_types 'AttnSkipUpBlock2D'"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types must name 2"),
        ({"down_block_types": [["x"], "y"]}, "config"),
        ({"downsample_type": "fir"}, "downsample_type 'fir'"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift 'spatial'"),
        ({"downsample_padding": 2}, "downsample_padding 2"),
        ({"attention_head_dim": 33}, "attention heads of width 33"),
        ({"block_out_channels": "wide"}, "block_out_channels"),
        ({"sample_size": None}, "sample_size"),
        ({"sample_size": 15}, "cannot be halved"),
        ({"norm_num_groups": None}, "norm_groups"),
        ({"block_out_channels": [16, 10**30]}, "block_out_channels must be whole numbers in 1..65536"),
        ({"block_out_channels": [16, True]}, "block_out_channels must be whole numbers in 1..65536"),
        ({"layers_per_block": 10**18}, "num_res_blocks must be a whole number in 1..64"),
        ({"norm_eps": 1e308}, "norm_eps must be a number in"),
        ({"act_fn": ["silu"]}, "act_fn .'silu'. cannot be imported"),
        ({"downsample_padding": True}, "downsample_padding True cannot be imported, only 0, 1"),
        ({"down_block_types": [[], {}]}, r"down_block_types \[\] cannot be imported, only 'DownBlock2D'"),
        ({"encoder_hid_dim": 3}, "'encoder_hid_dim' is not known"),
        ({"_class_name": "UNet2DConditionModel"}, "'UNet2DConditionModel' cannot be imported"),
    ],
)
def test_what_unets_cannot_be(options, message, tmp_path):
    original(SMALL).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL | options))
    with pytest.raises(ValueError, match=message) as error:
        diffusers_format.load(Checkpoint(tmp_path), schedule="linear")
    assert "\n" not in str(error.value)
    assert "config.json" in str(error.value)


SCHEDULERS = {
    "linear": diffusers.DDPMScheduler(),
    "google": diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample=True),
    "cosine": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    "sigmoid": diffusers.DDPMScheduler(num_train_timesteps=50, beta_schedule="sigmoid", clip_sample=False),
    "scaled": diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "zero_snr": diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "trained": diffusers.DDPMScheduler(trained_betas=[0.1, 0.2, 0.4], num_train_timesteps=3),
    "dpm": diffusers.DPMSolverMultistepScheduler(prediction_type="sample"),
    "clip": diffusers.DDPMScheduler(clip_sample_range=2.5, variance_type="fixed_small_log"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    scheduler = SCHEDULERS[name]
    schedule, conventions, _ = diffusers_format.read_scheduler(json.loads(scheduler.to_json_string()))
    alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    assert scheduler.config.num_train_timesteps == schedule.T
    torch.testing.assert_close(schedule.alphas_cumprod, alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert conventions["prediction_type"] == scheduler.config.prediction_type
    clips = scheduler.config.get("clip_sample", False)
    assert conventions["clip"] == (scheduler.config.clip_sample_range if clips else None)
    variance = (scheduler.config.get("variance_type") or "fixed_small").removesuffix("_log")
    assert conventions["variance"] == variance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"_class_name": "UnCLIPScheduler"}, "'UnCLIPScheduler' cannot be imported"),
        ({"_class_name": None}, "_class_name None"),
        ({"beta_schedule": "laplace"}, "beta_schedule 'laplace'"),
        ({"prediction_type": "flow"}, "prediction_type 'flow'"),
        ({"variance_type": "fixed_large_log"}, "variance_type 'fixed_large_log'"),
        ({"variance_type": "learned"}, "variance_type 'learned'"),
        ({"clip_sample_range": "wide"}, "clip_sample_range must be a number in"),
        ({"clip_sample_range": 10**400}, "clip_sample_range must be a number in"),
        ({"num_train_timesteps": 2**62}, "T must be a whole number in 1..1000000"),
        ({"beta_start": 10**400}, "beta_start must be a finite number"),
        ({"trained_betas": [0.1, "x"]}, "betas must be a list of finite numbers"),
        ({"beta_schedule": ["linear"]}, "beta_schedule .'linear'. cannot be imported"),
        ({"num_train_timesteps": "many"}, "T must be"),
        ({"beta_end": 7.0}, "betas must be"),
        (
            {"variance_type": "learned_range"},
            "'learned_range' does not go with a UNet of 3 channels in and 3 out",
        ),
    ],
)
def test_what_schedulers_cannot_be(options, message, tmp_path):
    save_pipeline(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    with pytest.raises(ValueError, match=message) as error:
        diffusers_format.load(Checkpoint(tmp_path))
    assert "\n" not in str(error.value)


def test_old_scheduler_options():
    config = {"_class_name": "DDPMScheduler", "predict_epsilon": False, "timestep_values": None}
    assert diffusers_format.read_scheduler(config)[1]["prediction_type"] == "sample"


def save_pipeline(folder: Path, **options) -> diffusers.UNet2DModel:
    model = original(SMALL)
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler(variance_type="fixed_large")).save_pretrained(
        folder, **options
    )
    return model


@pytest.mark.parametrize("safe", [True, False])
def test_pipeline(safe, tmp_path):
    model = save_pipeline(tmp_path, safe_serialization=safe)
    assert diffusers_format.recognises(Checkpoint(tmp_path))
    unet, schedule, conventions, *_ = diffusers_format.load(Checkpoint(tmp_path))
    assert_same_outputs(unet, model)
    assert schedule.T == 1000
    sampler = {"name": "ddpm", "steps": 1000, "spacing": "leading", "noise_in_last_step": True}
    assert conventions.pop("sampler") == sampler
    assert conventions == {"prediction_type": "epsilon", "variance": "fixed_large", "clip": 1.0}


def test_flat_pipeline(tmp_path):
    """All files are in one folder, as in google/ddpm-cifar10-32."""
    model = original(SMALL)
    model.save_pretrained(tmp_path)
    diffusers.DDPMScheduler().save_pretrained(tmp_path)
    assert diffusers_format.recognises(Checkpoint(tmp_path))
    assert_same_outputs(diffusers_format.load(Checkpoint(tmp_path))[0], model)


def test_unet_alone(tmp_path):
    model = original(SMALL)
    model.save_pretrained(tmp_path)
    assert_same_outputs(diffusers_format.load(Checkpoint(tmp_path), schedule="linear").unet, model)
    with pytest.raises(ValueError, match=r"has no scheduler_config\.json, so its noise schedule is unknown"):
        diffusers_format.load(Checkpoint(tmp_path))


def test_recognises(tmp_path):
    assert not diffusers_format.recognises(Checkpoint(tmp_path))
    assert not diffusers_format.recognises(Checkpoint(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text('{"format": "fused-diffusion"}')
    assert not diffusers_format.recognises(Checkpoint(tmp_path))


class Code:
    """Stands for a malicious checkpoint: its code runs when it is unpickled."""

    ran = False

    def __reduce__(self):
        return (setattr, (Code, "ran", True))


def damage_folder(path: Path, how: str) -> None:
    whole = path.read_bytes()
    tensors = original(SMALL).state_dict()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbage":
        path.write_bytes(b"\x80\x02 no pickle\n" * 9)
    elif how == "missing":
        path.unlink()
    elif how == "code":
        torch.save({"conv_in.weight": Code()}, path)
    elif how == "list":
        torch.save([1, 2, 3], path)
    else:
        name = "conv_in.weight"
        if how == "nan":
            tensors[name][0] = float("nan")
        elif how == "renamed":
            tensors["conv_first.weight"] = tensors.pop(name)
        elif how == "extra":
            tensors["more.weight"] = tensors[name]
        elif how == "reshaped":
            tensors[name] = tensors[name][:, :1]
        torch.save(tensors, path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "is damaged"),
        ("empty", "is no checkpoint"),
        ("garbage", "is damaged"),
        ("missing", "has no weights, such as diffusion_pytorch_model.safetensors, diffusion_pytorch_model.b"),
        ("code", "holds more than tensors"),
        ("list", "holds no state dict"),
        ("nan", "holds NaN"),
        ("renamed", "of another architecture than its configuration: no conv_in.weight"),
        ("extra", "1 tensors too many, such as more.weight"),
        ("reshaped", r"input_conv.weight is \[16, 1, 3, 3\], not \[16, 3, 3, 3\]"),
    ],
)
def test_damaged_bin(how, message, tmp_path):
    save_pipeline(tmp_path, safe_serialization=False)
    damage_folder(tmp_path / "unet" / "diffusion_pytorch_model.bin", how)
    with pytest.raises(ValueError, match=message) as error:
        diffusers_format.load(Checkpoint(tmp_path))
    assert "\n" not in str(error.value)
    assert not Code.ran


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_safetensors(keep, tmp_path):
    save_pipeline(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated or damaged") as error:
        diffusers_format.load(Checkpoint(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", '{"sample_size": 1e999}'])
def test_damaged_json(text, tmp_path):
    save_pipeline(tmp_path)
    (tmp_path / "unet" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json") as error:
        diffusers_format.load(Checkpoint(tmp_path))
    assert "\n" not in str(error.value)


class Doubling:
    """An importer of made-up files: text that says by how much the bundled model's weights are multiplied."""

    NAME = "doubling"
    HUB_FILES = ("*.doubling",)
    FLAGS: ClassVar[dict[str, str]] = {"factor": "the factor of the weights"}

    @staticmethod
    def recognises(checkpoint):
        return checkpoint.path.suffix == ".doubling"

    @staticmethod
    def load(checkpoint, /, **flags):
        model = diffusion.load("mnist")
        factor = flags.pop("factor", None)
        known_names("flag", flags, ["factor"])
        for weight in model.unet.parameters():
            weight.data *= factor or 2
        conventions = {"prediction_type": model.prediction_type}
        return Imported(model.unet, model.schedule, conventions, {} if factor else {"factor": 2})


def test_an_importer_is_one_entry(tmp_path, monkeypatch):
    path = tmp_path / "model.doubling"
    path.write_text("")
    with pytest.raises(ValueError, match=r"neither a file of torch.save nor safetensors"):
        diffusion.load(path)
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, other)
    with pytest.raises(ValueError, match=r"known format, which are diffusers, "):
        diffusion.load(other)
    monkeypatch.setattr(importers, "REGISTRY", (Doubling, *importers.REGISTRY))
    bias = diffusion.load("mnist").unet.output_conv.bias
    with pytest.warns(UserWarning, match="assumed: factor=2"):
        assert torch.equal(diffusion.load(path).unet.output_conv.bias, 2 * bias)
    main(["import", str(path), "--flag", "factor=3", "--out", str(tmp_path / "tripled")])
    assert torch.equal(diffusion.load(tmp_path / "tripled").unet.output_conv.bias, 3 * bias)
    with pytest.raises(ValueError, match="unknown flag 'fraction'"):
        diffusion.load(path, flags={"fraction": 3})
    with pytest.raises(ValueError, match="unknown format 'halving'; choose from: doubling, diffusers"):
        diffusion.load(path, flags={"format": "halving"})
    with pytest.warns(UserWarning, match="assumed: factor=2"):
        assert diffusion.load(other, flags={"format": "doubling"}).num_classes == 10
    assert importers.importer_of(other, "improved_diffusion") is importers.improved_diffusion
    assert importers.importer_of(other, "mindiffusion") is importers.mindiffusion
    with pytest.raises(ValueError, match="mnist takes no flag factor"):
        diffusion.load("mnist", flags={"factor": 3})


def test_a_folder_stands_for_the_one_checkpoint_in_it(tmp_path):
    network = ConvStack(ConvStackConfig(8, 1, (4,)))
    tensors = {name.replace("layers.", "conv."): value for name, value in network.state_dict().items()}
    save_file({"weight": torch.zeros(3)}, tmp_path / "numbers.safetensors")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "damaged.pt").write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        diffusion.load(tmp_path)
    torch.save(tensors, tmp_path / "ddpm.pth")
    with pytest.warns(UserWarning, match="assumed: "):
        model = diffusion.load(tmp_path, flags={"size": 8})
    assert torch.equal(model.unet.layers[0][0].weight, network.layers[0][0].weight)
    main(["import", str(tmp_path), "--size", "8", "--certify", "--out", str(tmp_path / "out")])
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert list(certificate["source"]["sha256"]) == ["ddpm.pth"]
    torch.save(tensors, tmp_path / "later.pth")
    with pytest.raises(ValueError, match=r"several checkpoints; .*: ddpm\.pth, later\.pth"):
        diffusion.load(tmp_path, flags={"size": 8})
