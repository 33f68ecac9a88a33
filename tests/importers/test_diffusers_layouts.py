"""Folders and files of diffusers, in each of their layouts."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import diffusion
from diffusion.cli import main
from helpers.diffusers_folders import (
    LINEAR,
    NAME,
    assert_is,
    load,
    outputs,
    save_checkpoint,
    save_pipeline,
    scaled,
)
from helpers.unet2d import SMALL, original


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
@pytest.mark.parametrize("shard", [None, "20KB"], ids=["whole", "sharded"])
def test_weights(safe, variant, shard, tmp_path):
    """Whole or in shards, of no variant or of one, which diffusers' own save_pretrained wrote."""
    model = original(SMALL)
    options = {} if shard is None else {"max_shard_size": shard}
    save_pipeline(tmp_path, model)
    for path in (tmp_path / "unet").glob(f"{NAME}*"):
        path.unlink()
    model.save_pretrained(tmp_path / "unet", safe_serialization=safe, variant=variant, **options)
    names = [path.name for path in (tmp_path / "unet").iterdir()]
    assert any("index" in name for name in names) == (shard is not None)
    assert len(names) == 2 or shard is not None
    if variant is None:
        found = load(tmp_path)
    else:
        with pytest.warns(UserWarning, match=f"assumed: variant={variant}"):
            found = load(tmp_path)
        assert_is(load(tmp_path, variant=variant), model)
    assert_is(found, model)


def test_the_weights_without_a_variant_are_preferred(tmp_path):
    model = original(SMALL)
    save_pipeline(tmp_path, model)
    scaled(model).save_pretrained(tmp_path / "unet", variant="non_ema")
    assert_is(load(tmp_path), model)
    assert_is(load(tmp_path, variant="non_ema"), scaled(model))
    (tmp_path / "unet" / f"{NAME}.safetensors").unlink()
    scaled(model, 0.25).save_pretrained(tmp_path / "unet", variant="fp16")
    with pytest.raises(ValueError, match="has weights in several variants, fp16, non_ema"):
        load(tmp_path)
    with pytest.raises(ValueError, match="unknown variant 'bf16'; choose from: fp16, non_ema"):
        load(tmp_path, variant="bf16")
    assert_is(load(tmp_path, variant="fp16"), scaled(model, 0.25))


def test_half_precision(tmp_path):
    model = original(SMALL).half().float()
    save_pipeline(tmp_path, model)
    (tmp_path / "unet" / f"{NAME}.safetensors").unlink()
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "unet" / f"{NAME}.fp16.safetensors")
    assert_is(load(tmp_path, variant="fp16"), model)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize(
    ("name", "wrapper"),
    [
        (f"{NAME}.bin", None),
        ("model.safetensors", None),
        ("pytorch_model.bin", None),
        ("pytorch_model.bin", "state_dict"),
        ("pytorch_model.bin", "model"),
    ],
)
def test_names_and_wrappers(name, prefix, wrapper, tmp_path):
    """As DistributedDataParallel, torch.compile and accelerate leave them."""
    model = original(SMALL)
    save_pipeline(tmp_path, model)
    (tmp_path / "unet" / f"{NAME}.safetensors").unlink()
    tensors = {f"{prefix}{key}": tensor for key, tensor in model.state_dict().items()}
    path = tmp_path / "unet" / name
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors if wrapper is None else {wrapper: tensors, "step": 3, "lr": 0.1}, path)
    assert_is(load(tmp_path), model)


def test_shards_with_a_prefix(tmp_path):
    model = original(SMALL)
    save_pipeline(tmp_path, model, max_shard_size="20KB")
    index = tmp_path / "unet" / f"{NAME}.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    for file in set(places.values()):
        path = tmp_path / "unet" / file
        save_file({f"module.{name}": tensor for name, tensor in load_file(path).items()}, path)
    index.write_text(json.dumps({"weight_map": {f"module.{name}": file for name, file in places.items()}}))
    assert_is(load(tmp_path), model)


def test_no_index_of_the_pipeline(tmp_path):
    model = original(SMALL)
    save_pipeline(tmp_path, model)
    (tmp_path / "model_index.json").unlink()
    assert_is(load(tmp_path), model)


def test_a_file_of_weights(tmp_path):
    """Its config.json and scheduler_config.json are beside it."""
    model = original(SMALL)
    model.save_pretrained(tmp_path)
    diffusers.DDPMScheduler(clip_sample_range=2.0).save_pretrained(tmp_path)
    found = load(tmp_path / f"{NAME}.safetensors")
    assert_is(found, model)
    assert found.clip == 2.0


SCHEDULES = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_by_name(name, tmp_path):
    original(SMALL).save_pretrained(tmp_path)
    betas = diffusers.DDPMScheduler(**SCHEDULES[name]).betas.double()
    found = load(tmp_path, **(LINEAR | {"schedule": name})).schedule
    expected = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(found.alphas_cumprod, expected, rtol=1e-4, atol=1e-6)


def test_schedules_from_files(tmp_path):
    original(SMALL).save_pretrained(tmp_path / "unet")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50, prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / "scheduler_config.json").read_text())
    for given in (str(tmp_path / "mine"), str(tmp_path / "mine" / "scheduler_config.json"), config):
        found = load(tmp_path / "unet", schedule=given)
        assert (found.schedule.T, found.prediction_type) == (50, "v_prediction")


def test_a_configuration_without_its_class(tmp_path):
    """`scheduler.config` of diffusers has none, so that it could be any scheduler's."""
    original(SMALL).save_pretrained(tmp_path / "unet")
    (tmp_path / "own").mkdir()
    path = tmp_path / "own" / "scheduler_config.json"
    path.write_text(json.dumps(dict(diffusers.DDIMScheduler().config)))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / path.name).write_text(path.read_text())
    for flags, named in (({"schedule": str(path)}, path), ({}, tmp_path / "scheduler" / path.name)):
        with pytest.raises(ValueError, match="needs its _class_name, ") as error:
            load(tmp_path, **flags)
        assert str(error.value).startswith(f"{named}: ")


def test_a_schedule_for_a_learned_variance(tmp_path):
    original(SMALL | {"out_channels": 6}).save_pretrained(tmp_path)
    found = load(tmp_path, **LINEAR)
    assert found.variance == "learned_range"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"schedule": "quadratic"}, "unknown schedule 'quadratic'.* schedules by name: linear, "),
        ({"schedule": 3}, "flag schedule must be a name"),
        (
            {"schedule": {"_class_name": "DDPMScheduler", "beta_schedule": "cubic"}},
            "schedule: beta_schedule 'cubic'",
        ),
        ({"num_train_timesteps": 5}, "num_train_timesteps belongs to a schedule that is given by its name"),
        ({"schedule": "linear", "num_train_timesteps": 0}, "schedule: T must be"),
        ({"schedule": "linear", "prediction_type": "flow"}, "schedule: prediction_type 'flow'"),
        ({"schedule": "linear", "class_cond": True}, "unknown flag 'class_cond'; choose from: schedule, "),
        ({"schedule": "linear", "weights": "unet_ema"}, "has no unet_ema/"),
        ({"schedule": "linear", "size": "32x"}, "size must be a whole number in 1..65536, or a list of 2"),
        ({"schedule": "linear", "size": [0, 8]}, "size must be a whole number"),
        ({"schedule": "linear", "size": 15}, "15x15 cannot be halved"),
        ({"schedule": "linear", "null_label": 1}, "null label 1 cannot be declared: the model has no table"),
        ({"schedule": "linear", "num_classes": 4}, "num_classes 4 cannot be declared"),
    ],
)
def test_flags_that_cannot_be(flags, message, tmp_path):
    original(SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, **flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("size", "shape"), [(32, (32, 32)), ("32", (32, 32)), ("32x48", (32, 48)), ([8, 12], (8, 12))]
)
def test_a_size_of_null(size, shape, tmp_path):
    model = original(SMALL | {"sample_size": None})
    save_pipeline(tmp_path, model)
    with pytest.raises(ValueError, match=r"sample_size must be given.*--size"):
        load(tmp_path)
    found = load(tmp_path, size=size)
    assert found.unet.config.image_shape == shape
    assert_is(found, model)


@pytest.mark.parametrize("null", [10, 0, 4])
def test_a_null_label(null, tmp_path):
    """A row of the table stands for no label, wherever it is; the labels after it move down."""
    model = original(SMALL | {"num_class_embeds": 11})
    save_pipeline(tmp_path, model)
    found = load(tmp_path, null_label=null)
    assert (found.num_classes, found.unet.config.null_label) == (10, 10)
    theirs = [label for label in range(11) if label != null]
    expected = outputs(model, torch.tensor([theirs[2], theirs[9]]))
    assert (outputs(found.unet, torch.tensor([2, 9])) - expected).abs().max() <= 1e-5
    expected = outputs(model, torch.tensor([null, null]))
    assert (outputs(found.unet) - expected).abs().max() <= 1e-5
    found.sample([3], guidance_scale=2.0, steps=2)
    plain = load(tmp_path)
    assert (plain.num_classes, plain.unet.config.null_label) == (11, None)


@pytest.mark.parametrize("null", [11, -1, "10"])
def test_null_labels_that_cannot_be(null, tmp_path):
    save_pipeline(tmp_path, original(SMALL | {"num_class_embeds": 11}))
    with pytest.raises(ValueError, match=r"config\.json: the null label must be a whole number in 0\.\.10"):
        load(tmp_path, null_label=null)


def test_the_number_of_labels_that_are_embedded_as_timesteps(tmp_path):
    save_pipeline(tmp_path, original(SMALL | {"class_embed_type": "timestep"}))
    with pytest.warns(UserWarning, match="assumed: num_classes=1000"):
        assert load(tmp_path).num_classes == 1000
    assert load(tmp_path, num_classes=7).num_classes == 7


def test_timesteps_that_the_network_did_not_learn(tmp_path):
    save_pipeline(tmp_path, original(SMALL | {"time_embedding_type": "learned", "num_train_timesteps": 100}))
    with pytest.raises(ValueError, match="has learned 100 timesteps, fewer than the 1000 of the schedule"):
        load(tmp_path)


def test_the_command(tmp_path, capsys):
    model = original(SMALL | {"sample_size": None, "num_class_embeds": 3})
    save_checkpoint(tmp_path / "a", model, scaled(model))
    arguments = ["import", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    options = ["--schedule", "cosine", "--size", "16x16", "--null-label", "2"]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "--size" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    main([*arguments, *options])
    assert "weights=unet_ema" in capsys.readouterr().out
    found = diffusion.load(tmp_path / "b")
    assert (found.num_classes, found.unet.config.null_label) == (2, 2)
    expected = outputs(scaled(model), torch.tensor([2, 2]))
    assert (outputs(found.unet) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_vectors_as_labels(tmp_path):
    """class_embed_type identity: samples are those of a loop over diffusers' own network and scheduler."""
    model = original(SMALL | {"class_embed_type": "identity"})
    save_pipeline(tmp_path, model)
    found = load(tmp_path)
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(3, 64, generator=generator)
    noise = torch.randn(5, 3, 3, 16, 16, generator=generator)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    x = noise[0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, class_labels=vectors).sample, t, x).prev_sample
    options = {"sampler": "ddim", "steps": 4, "noise": lambda k: noise[k], "clip": None}
    for backend in ("auto", "reference"):
        samples = found.sample(vectors, backend=backend, **options)
        assert (samples - x).abs().max() <= 1e-4 * x.abs().max()
    for labels in (None, [1, 2], vectors[:, :5], vectors.long()):
        with pytest.raises(ValueError, match=r"labels must be vectors \[N, 64\], a tensor of floats"):
            found.sample(labels)
