"""Components beside the UNet in pipelines of diffusers, and damaged folders."""

import json
from pathlib import Path

import diffusers
import pytest

from diffusion.cli import main
from helpers.diffusers_folders import LINEAR, NAME, assert_is, load, save_pipeline, scaled
from helpers.unet2d import SMALL, original

# Components that make something else of the UNet's output, or feed it.
COMPONENTS = {
    "vqvae": ["diffusers", "VQModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "mel": ["diffusers", "Mel"],
    "bert": ["latent_diffusion", "LDMBertModel"],
    "movq": None,
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_components_of_pipelines(name, tmp_path):
    save_pipeline(tmp_path, original(SMALL))
    path = tmp_path / "model_index.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {name: COMPONENTS[name], "vqgan": [None, None]})
    )
    if COMPONENTS[name] is None:
        load(tmp_path)
        return
    with pytest.raises(ValueError, match=rf"model_index\.json: .* the component {name} \(") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_components_without_an_index(tmp_path):
    """With an index, also where the UNet's own folder, or its file, is given."""
    save_pipeline(tmp_path, original(SMALL))
    (tmp_path / "vqvae").mkdir()
    (tmp_path / "vqvae" / "config.json").write_text('{"_class_name": "VQModel"}')
    index = json.loads((tmp_path / "model_index.json").read_text()) | {"vqvae": COMPONENTS["vqvae"]}
    unet = tmp_path / "unet"
    for text in (json.dumps(index), None):
        (tmp_path / "model_index.json").unlink()
        if text is not None:
            (tmp_path / "model_index.json").write_text(text)
        paths = (tmp_path, unet, unet / f"{NAME}.safetensors") if text else (tmp_path,)
        for path in paths:
            with pytest.raises(ValueError, match="a pipeline with the component vqvae") as error:
                load(path, schedule="linear")
            assert "\n" not in str(error.value)


def test_models_side_by_side(tmp_path):
    """Other models in the same folder are no components of each other."""
    model = original(SMALL)
    model.save_pretrained(tmp_path / "unet")
    save_pipeline(tmp_path / "flat", scaled(model))
    scaled(model, 0.25).save_pretrained(tmp_path / "vae")
    assert_is(load(tmp_path / "unet", **LINEAR), model)
    assert_is(load(tmp_path / "flat"), scaled(model))
    assert_is(load(tmp_path / "vae", **LINEAR), scaled(model, 0.25))


def test_the_index_of_a_flat_pipeline_is_read_too(tmp_path):
    original(SMALL).save_pretrained(tmp_path)
    diffusers.DDPMScheduler().save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"vqvae": COMPONENTS["vqvae"]}))
    with pytest.raises(ValueError, match="a pipeline with the component vqvae"):
        load(tmp_path)


def damage(folder: Path, how: str) -> None:
    """Damages a sharded pipeline."""
    unet = folder / "unet"
    index = unet / f"{NAME}.safetensors.index.json"
    shards = sorted(unet.glob("*.safetensors"))
    places = json.loads(index.read_text())["weight_map"]
    first = next(iter(places))
    if how == "truncated":
        shards[0].write_bytes(shards[0].read_bytes()[:-9])
    elif how == "missing":
        shards[1].unlink()
    elif how == "index":
        index.write_text(index.read_text()[:-40])
    elif how == "list":
        index.write_text('{"weight_map": ["a"]}')
    elif how == "outside":
        index.write_text(json.dumps({"weight_map": places | {first: "../../secret.safetensors"}}))
    elif how == "elsewhere":
        other = next(path.name for path in shards if path.name != places[first])
        index.write_text(json.dumps({"weight_map": places | {first: other}}))
    elif how == "pickle":
        shards[0].write_bytes(b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.")
    elif how == "config":
        config = json.loads((unet / "config.json").read_text())
        (unet / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    elif how == "pipeline":
        (folder / "model_index.json").write_text("{")
    elif how == "scheduler":
        (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name"')


@pytest.mark.parametrize(
    ("how", "file"),
    [
        ("truncated", "-00001-of-"),
        ("missing", "-00002-of-"),
        ("index", "index.json"),
        ("list", "index.json"),
        ("outside", "index.json"),
        ("elsewhere", "index.json"),
        ("pickle", "-00001-of-"),
        ("config", "index.json"),
        ("pipeline", "model_index.json"),
        ("scheduler", "scheduler_config.json"),
    ],
)
def test_damaged_folders(how, file, tmp_path, capsys):
    """One line that names the file, exit status 2, and nothing is written."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_pipeline(source, original(SMALL), max_shard_size="20KB")
    damage(source, how)
    with pytest.raises(SystemExit, match="2"):
        main(["import", str(source), "--out", str(out)])
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert file in printed.err
    assert printed.out == ""
    assert not out.exists()
