"""Model folders: a saved model samples the same bits; a damaged one is refused in one line."""

import hashlib
import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import diffusion
from diffusion import DDPM, NoiseSchedule, UNet, UNetConfig
from helpers.models import make_model


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_model(),
        lambda: make_model(10, prediction_type="v_prediction", clip=None, T=100),
        lambda: make_model(
            learned_variance=True, sampler_options={"ddim": {"eta": 0.5}}, metadata={"note": "kept"}
        ),
    ],
)
def test_a_loaded_model_samples_the_same_bits(make, tmp_path):
    model = make()
    model.save(tmp_path / "model")
    loaded = diffusion.load(tmp_path / "model")
    labels = None if model.num_classes is None else [3, 1]
    options = {"num_samples": 2, "steps": 10, "seed": 5}
    assert torch.equal(loaded.sample(labels, **options), model.sample(labels, **options))
    for name in ("prediction_type", "clip", "variance", "sampler_options", "metadata"):
        assert getattr(loaded, name) == getattr(model, name)
    assert torch.equal(loaded.schedule.betas, model.schedule.betas)
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]


def test_weights_have_memory_of_their_own(tmp_path):
    """It begins at a multiple of 64 bytes, on which the last bits of PyTorch's products depend with AVX2."""
    make_model(10, metadata={"note": "so that the tensors begin elsewhere in the file"}).save(tmp_path)
    loaded = diffusion.load(tmp_path)
    assert {parameter.data_ptr() % 64 for parameter in loaded.parameters()} == {0}
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    with open(tmp_path / "model.safetensors", "r+b") as file:
        size = os.path.getsize(file.name)
        file.write(b"\xff" * size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


def test_a_model_may_be_stored_in_half_precision(tmp_path):
    model = make_model()
    model.save(tmp_path, dtype=torch.bfloat16)
    loaded = diffusion.load(tmp_path)
    for name, tensor in loaded.unet.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.unet.state_dict()[name].bfloat16().float())


@pytest.fixture
def folder(tmp_path):
    make_model(10).save(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    edit_config(folder, lambda config: config.pop("weights_sha256"))


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


class Malice:
    """Unpickling this would make a folder."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


DAMAGE = {
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "weights truncated": (lambda f: truncate(f / "model.safetensors", 9000), "truncated or damaged"),
    "weights almost whole": (
        lambda f: truncate(f / "model.safetensors", (f / "model.safetensors").stat().st_size - 1),
        "truncated or damaged",
    ),
    "weights empty": (lambda f: truncate(f / "model.safetensors", 0), "truncated or damaged"),
    "weights are a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "model.safetensors",
    ),
    "a huge header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}"),
        "truncated or damaged",
    ),
    "NaN": (
        lambda f: edit_weights(f, lambda w: w["output_conv.weight"].fill_(float("nan"))),
        "NaN or infinite",
    ),
    "infinity": (
        lambda f: edit_weights(f, lambda w: w["output_conv.bias"].fill_(float("inf"))),
        "NaN or infinite",
    ),
    "float8": (
        lambda f: edit_weights(
            f, lambda w: w.update({"output_conv.bias": w["output_conv.bias"].to(torch.float8_e5m2)})
        ),
        "model.safetensors: output_conv.bias holds float8_e5m2",
    ),
    "whole numbers": (
        lambda f: edit_weights(f, lambda w: w.update({"output_conv.bias": w["output_conv.bias"].long()})),
        "model.safetensors: output_conv.bias holds int64",
    ),
    "beyond float32": (
        lambda f: edit_weights(
            f, lambda w: w.update({"output_conv.bias": w["output_conv.bias"].double() * 1e300})
        ),
        "model.safetensors: output_conv.bias holds values beyond the range of float32",
    ),
    "a digest of nonsense": (
        lambda f: edit_config(f, lambda c: c.update(weights_sha256="abc")),
        "config.json: weights_sha256 must be 64 hexadecimal digits",
    ),
    "no digest": (
        lambda f: edit_config(f, lambda c: c.update(weights_sha256=None)),
        "config.json: weights_sha256 must be 64 hexadecimal digits",
    ),
    "a tensor missing": (
        lambda f: edit_weights(f, lambda w: w.pop("output_conv.bias")),
        "another architecture",
    ),
    "a tensor too many": (
        lambda f: edit_weights(f, lambda w: w.update(extra=torch.zeros(1))),
        "another architecture",
    ),
    "another width": (
        lambda f: edit_config(f, lambda c: c["unet"].update(channels=16)),
        "another architecture",
    ),
    "a width beyond memory": (
        lambda f: edit_config(f, lambda c: c["unet"].update(channels=2**24)),
        "channels must be a whole number in 4..65536, not 16777216",
    ),
    "parameters beyond memory": (
        lambda f: edit_config(f, lambda c: c["unet"].update(channels=2**15)),
        "parameters, more than 17,179,869,184",
    ),
    "giant clip": (lambda f: edit_config(f, lambda c: c.update(clip=10**400)), "clip must be a number in"),
    "giant norm_eps": (
        lambda f: edit_config(f, lambda c: c["unet"].update(norm_eps=10**400)),
        "norm_eps must be a number in",
    ),
    "giant beta": (
        lambda f: edit_config(f, lambda c: c["schedule"].update(beta_start=10**400)),
        "beta_start must be a finite number",
    ),
    "metadata": (
        lambda f: edit_config(f, lambda c: c.update(metadata=3)),
        "metadata must be a dictionary, not 3",
    ),
    "unknown UNet option": (
        lambda f: edit_config(f, lambda c: c["unet"].update(wings=2)),
        "unknown UNet option 'wings'",
    ),
    "a size that cannot be halved": (
        lambda f: edit_config(f, lambda c: c["unet"].update(sample_size=9)),
        "halved",
    ),
    "no schedule": (lambda f: edit_config(f, lambda c: c.pop("schedule")), "schedule"),
    "schedule of nonsense": (
        lambda f: edit_config(f, lambda c: c.update(schedule={"kind": "linear", "T": -4})),
        "config.json",
    ),
    "unknown prediction": (lambda f: edit_config(f, lambda c: c.update(prediction_type="x")), "prediction"),
    "clip is text": (lambda f: edit_config(f, lambda c: c.update(clip="1")), "clip"),
    "unknown variance": (lambda f: edit_config(f, lambda c: c.update(variance="wild")), "variance"),
    "unknown sampler option": (
        lambda f: edit_config(f, lambda c: c.update(sampler_options={"ddim": {"speed": 9}})),
        "unknown option of ddim 'speed'",
    ),
    "another format version": (
        lambda f: edit_config(f, lambda c: c.update(format_version=99)),
        "format version 99",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "a JSON list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "binary JSON": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "no text in UTF-8"),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 100_000), "not valid JSON"),
    "another's JSON": (lambda f: (f / "config.json").write_text("{}"), "not that of a model"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "a pickle": (
        lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(Malice(f / "made"))),
        "truncated or damaged",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_in_one_line(case, folder):
    damage, expected = DAMAGE[case]
    damage(folder)
    with pytest.raises(ValueError, match=expected) as caught:
        diffusion.load(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "made").exists()


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown model 'nonesuch'.*mnist"):
        diffusion.load("nonesuch")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no checkpoint"):
        diffusion.load(tmp_path / "file")
    with pytest.raises(ValueError, match="no device"):
        diffusion.load("mnist", device="abacus")


def test_a_hub_model_that_cannot_be_fetched_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"hf:nobody/nothing|huggingface_hub") as caught:
        diffusion.load("hf:nobody/nothing")
    assert "\n" not in str(caught.value)


def test_saving_over_a_model_keeps_it_until_the_new_one_is_whole(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusion.storage.checkpoint, "save_file", fails)
    with pytest.raises(ValueError, match="No space left"):
        make_model(10, seed=1).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (1e5, torch.float16, "output_conv.bias holds NaN or infinite values in float16"),
        (float("nan"), None, "output_conv.bias holds NaN or infinite values in float32"),
        (float("-inf"), torch.bfloat16, "output_conv.bias holds NaN or infinite values in bfloat16"),
        (1.0, torch.int8, "cannot be stored in dtype torch.int8; choose from: torch.float32"),
        (1.0, torch.float8_e4m3fn, "cannot be stored in dtype torch.float8_e4m3fn"),
        (1.0, torch.complex64, "cannot be stored in dtype torch.complex64"),
    ],
)
def test_a_good_model_is_not_replaced_by_one_that_cannot_be_loaded(value, dtype, said, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    worse = make_model(10, seed=1)
    with torch.no_grad():
        worse.unet.output_conv.bias[0] = value
    with pytest.raises(ValueError, match=said):
        worse.save(folder, dtype=dtype)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_double_weights_beyond_float32_are_not_saved(folder):
    worse = make_model(10, seed=1)
    worse.unet.double().output_conv.bias.data[0] = 1e300
    with pytest.raises(ValueError, match=r"output_conv\.bias holds values beyond the range"):
        worse.save(folder)
    worse.unet.output_conv.bias.data[0] = 3e38
    worse.save(folder)
    assert diffusion.load(folder).unet.output_conv.bias[0] == torch.tensor(3e38)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(diffusion.storage.checkpoint, "RETRY_SECONDS", 0)


def test_the_weights_are_those_of_the_digest(folder, impatient):
    path, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    data = bytearray(path.read_bytes())
    assert config["weights_sha256"] == hashlib.sha256(data).hexdigest()
    data[-2] ^= 1  # the last bit of a mantissa or so: no number becomes infinite
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file .*verify=False") as caught:
        diffusion.load(folder)
    assert "\n" not in str(caught.value)
    changed = diffusion.load(folder, verify=False).unet.state_dict()
    expected = load_file(path)
    assert all(torch.equal(changed[name], expected[name]) for name in expected)
    edit_config(folder, lambda config: config.pop("weights_sha256"))  # as older releases wrote it
    assert torch.equal(diffusion.load(folder).unet.output_conv.weight, expected["output_conv.weight"])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("other", [{"channels": 3}, {"prediction_type": "v_prediction", "seed": 1}])
def test_a_kill_between_the_two_files_leaves_no_mixture(other, folder, monkeypatch, impatient):
    replace, count = os.replace, []

    def killed(source, target):
        if count:
            raise Killed
        count.append(target)
        replace(source, target)

    before = (folder / "config.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            make_model(10, **other).save(folder)
    assert (folder / "config.json").read_bytes() == before
    assert count == [folder / "model.safetensors"]
    with pytest.raises(ValueError, match="saving them was interrupted"):
        diffusion.load(folder)
    make_model(10, **other).save(folder)
    assert diffusion.load(folder).unet.config.in_channels == other.get("channels", 2)


@pytest.mark.parametrize("other", [{"channels": 3}, {"prediction_type": "v_prediction", "seed": 1}])
def test_a_model_that_is_replaced_while_it_is_read(other, folder, monkeypatch, impatient):
    """A training run may replace a model while it is being loaded."""
    read, count, new = diffusion.storage.checkpoint.read_safetensors, [], make_model(10, **other)

    def late(*arguments):
        count.append(arguments)
        if len(count) == 1:
            new.save(folder)
        return read(*arguments)

    monkeypatch.setattr(diffusion.storage.checkpoint, "read_safetensors", late)
    found = diffusion.load(folder)
    assert found.prediction_type == new.prediction_type
    assert torch.equal(found.unet.output_conv.weight, new.unet.output_conv.weight)
    assert len(count) == 2


def test_a_folder_whose_name_is_no_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"mod\xff\xe8le")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes names of UTF-8 only")
    model = make_model(10)
    model.save(folder, note=str(folder))
    found = diffusion.load(folder)
    assert torch.equal(found.unet.output_conv.weight, model.unet.output_conv.weight)
    assert found.metadata == {"note": str(folder)}
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        diffusion.load(folder)


def test_metadata_are_json_values_or_numbers(tmp_path):
    model = make_model()
    model.save(tmp_path, score=np.float32(0.5), steps=np.int64(3), loss=torch.tensor(0.25), names=["cat"])
    expected = {"score": 0.5, "steps": 3, "loss": 0.25, "names": ["cat"]}
    assert diffusion.load(tmp_path).metadata == expected
    before = (tmp_path / "config.json").read_bytes()
    for value in (torch.ones(1), {1, 2}, object(), float("nan"), np.float32("inf"), b"x", [[np.ones(2)]]):
        with pytest.raises(ValueError, match=f"cannot write {tmp_path}: the metadata are no JSON values"):
            model.save(tmp_path, foo=value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_what_has_no_weights_is_not_saved(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = diffusion.load(folder)
    model.unet.to("meta")
    with pytest.raises(ValueError, match="of the UNet is on the meta device"):
        model.save(folder)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ddim": {"spacing": 10**30}}, "unknown spacing"),
        ({"ddim": {"spacing": None}}, "unknown spacing"),
        ({"ddim": {"eta": "much"}}, "eta must be"),
        ({"ddpm": {"variance": []}}, "unknown variance"),
        ({"dpm++": {"sde": 1}}, "sde must be true or false"),
        ({"dpm++": {"clip": -1}}, "clip"),
        ({"ddim": {"guidance_interval": [0.5]}}, "guidance_interval"),
        ({"ddim": {"use_clipped_model_output": "yes"}}, "use_clipped_model_output must be true or false"),
    ],
)
def test_options_of_samplers_are_checked_before_they_are_used(options, expected, folder):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"sampler_options": options}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=expected) as error:
        diffusion.load(folder)
    assert "sampler_options" in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_targets_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(ValueError, match="cannot write"):
            make_model().save(target)
    assert os.listdir(tmp_path) == ["file"]


def test_a_model_can_be_built_from_its_parts():
    unet = UNet(UNetConfig(sample_size=8, in_channels=1, out_channels=1, channels=8, channel_mult=(1,),
                           num_res_blocks=1, attention_levels=(), norm_groups=4))  # fmt: skip
    x = DDPM(unet, NoiseSchedule.linear(10)).sample(num_samples=2)
    assert x.shape == (2, 1, 8, 8)
    assert x.abs().max() <= 1


def test_a_model_is_not_saved_in_a_folder_without_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the name of its folder is empty"):
        make_model().save("")
    with pytest.raises(ValueError, match="the name of its folder is empty"):
        diffusion.to_diffusers(make_model(), "")
    assert not os.listdir(tmp_path)
