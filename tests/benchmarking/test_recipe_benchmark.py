"""`python -m benchmarks.recipes`: its numbers against exact predictions, formulas and counts; refusals."""

import io
import json
import math
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffusion import DDPM, NoiseSchedule, UNet, UNetConfig, load
from helpers.models import make_model
from helpers.paths import ROOT

sys.path.append(str(ROOT))  # last, so that the package is the one that is installed

from benchmarks import recipes
from benchmarks.flops import flops_of_unet
from diffusion.data import load_dataset
from diffusion.evaluation.features import Features
from diffusion.storage.images import to_uint8
from diffusion.utils.frechet import frechet_distance, moments


class Exact(torch.nn.Module):
    """Puts out what `prediction_type` asks for, for a guess of x0 that is wrong by `error` everywhere."""

    config = SimpleNamespace(num_classes=None)

    def __init__(self, schedule: NoiseSchedule, prediction_type: str, x0: torch.Tensor, error: float):
        super().__init__()
        self.schedule, self.prediction_type, self.guess = schedule, prediction_type, x0 + error

    def forward(self, x, t, labels=None):
        steps = torch.arange(self.schedule.T, dtype=torch.float64)
        table = 0.5 * torch.log((1 - self.schedule.alphas_cumprod) / self.schedule.alphas_cumprod)
        low = int(t[0])
        level = table[low] + (t[0].double() - steps[low]) * (table[low + 1] - table[low])
        alpha = torch.rsqrt(1 + torch.exp(2 * level)).item()
        sigma = math.sqrt(1 - alpha**2)
        epsilon = (x - alpha * self.guess) / sigma
        return {
            "epsilon": epsilon,
            "sample": self.guess,
            "v_prediction": alpha * epsilon - sigma * self.guess,
        }[self.prediction_type]


def pixels(count: int, channels: int = 3, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "schedule", [NoiseSchedule.cosine(), NoiseSchedule.linear()], ids=["cosine", "linear"]
)
def test_models_of_all_kinds_give_the_same_errors_for_the_same_guess(schedule, prediction_type):
    """x0 wrong by 1/8 is an error of 1/64, and in v by the formula 1/64 / sigma^2."""
    images = pixels(3)
    model = DDPM(make_model(channels=3).unet, schedule, prediction_type=prediction_type)
    model.unet = Exact(schedule, prediction_type, images / 127.5 - 1, 1 / 8)
    rows = recipes.held_out_errors(model, images, None)
    assert [row["level"] for row in rows] == list(recipes.LEVELS)
    for row in rows:
        sigma = 1 / math.sqrt(1 + math.exp(-2 * row["level"]))
        assert row["x0"] == pytest.approx(1 / 64, rel=1e-3)
        assert row["v"] == pytest.approx(1 / 64 / sigma**2, rel=1e-3)


def test_timesteps_between_timesteps():
    schedule = NoiseSchedule.cosine()
    levels = 0.5 * torch.log((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)
    assert recipes.timestep_at(schedule, levels[0].item()) == 0
    assert recipes.timestep_at(schedule, levels[417].item()) == pytest.approx(417)
    assert recipes.timestep_at(schedule, levels[417:419].mean().item()) == pytest.approx(417.5)
    assert recipes.timestep_at(schedule, levels[0].item() - 1e-3) is None
    assert recipes.timestep_at(schedule, levels[-1].item() + 1e-3) is None
    assert recipes.timestep_at(NoiseSchedule.cosine().rescale_zero_terminal_snr(), 3.0) is not None


def test_a_level_that_a_schedule_lacks_has_no_error():
    model = make_model(channels=3, T=1000)
    model.schedule = NoiseSchedule.linear(1000, beta_start=1e-2, beta_end=2e-2)  # ln(sigma/alpha) from -2.3
    rows = recipes.held_out_errors(model, pixels(2), None)
    assert [row["level"] for row in rows if row["x0"] is None] == [-4.0, -3.3, -2.6]
    assert rows[2]["v"] is None


def test_a_model_of_classes_is_given_the_labels():
    model, images = make_model(num_classes=2, channels=3), pixels(4)
    zeros, ones = torch.zeros(4).long(), torch.ones(4).long()
    first, second = (recipes.held_out_errors(model, images, labels) for labels in (zeros, ones))
    assert first != second
    model.unet.label_embedding.weight.data[1] = model.unet.label_embedding.weight.data[0]
    assert recipes.held_out_errors(model, images, ones) == first


def test_multiplications_are_counted():
    """One more convolution takes 2 * inputs * 9 * outputs * pixels more."""
    model = make_model(channels=3)
    before, convolution = flops_of_unet(model.unet), model.unet.input_conv
    model.unet.input_conv = torch.nn.Sequential(
        convolution, torch.nn.Conv2d(convolution.out_channels, 8, 3, padding=1)
    )
    model.unet.input_conv.weight = convolution.weight
    added = 2 * convolution.out_channels * 9 * 8 * 64
    assert flops_of_unet(model.unet) - before == added
    assert before > 2 * 9 * 8 * 64 * (3 + 3)


def test_attention_is_counted():
    """Two products of all pairs of pixels, and projections, which a network without attention lacks."""
    found = []
    for levels in ((), (1,)):
        config = UNetConfig(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            channels=8,
            channel_mult=(1, 2),
            norm_groups=4,
            num_res_blocks=1,
            attention_levels=levels,
            mid_attention=False,
        )
        model = DDPM(UNet(config), NoiseSchedule.linear())
        found.append(flops_of_unet(model.unet))
    pixels, channels, count = 16, 16, 3  # one block on the way down and two on the way up
    added = count * (2 * 2 * pixels**2 * channels + 2 * 4 * channels**2 * pixels)
    assert found[1] - found[0] == added


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two runs, one with a further average; labelled images in a zip; a classifier of 12 x 12 images."""
    for name, folders in (("first", ["", "ema-0.5"]), ("second", [""])):
        for k, folder in enumerate(folders):
            model = make_model(num_classes=2, channels=1, prediction_type="v_prediction", seed=k)
            about = {"step": 30, "batch_size": 4, "seconds": 2.5, "ema_decay": 0.9 - 0.4 * k}
            model.save(tmp_path / name / folder, training=about)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for k, image in enumerate(pixels(12, 1)):
            data = io.BytesIO()
            Image.fromarray(image[0].numpy()).save(data, "PNG")
            archive.writestr(f"{'ab'[k % 2]}/{k}.png", data.getvalue())
    return tmp_path


def first_pixels(name):
    """Features without a network: eight pixels."""
    return Features("pixels", "0" * 64, None, lambda x: (x.flatten(1)[:, :8].float(), x.flatten(1)[:, :2]))


def test_the_command_writes_a_row_for_each_average(runs, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "load_features", first_pixels)
    zipped = str(runs / "images.zip")
    words = [str(runs / "first"), str(runs / "second"), "--data", zipped, "--reference", zipped]
    words += ["--features", "any", "--num", "6", "--steps", "2", "--json", str(runs / "table.json")]
    recipes.main(words)
    result = json.loads((runs / "table.json").read_text())
    rows = result["rows"]
    assert [(row["run"], row["ema_decay"]) for row in rows] == [
        ("first", 0.9),
        ("first", 0.5),
        ("second", 0.9),
    ]
    for row in rows:
        assert (row["images_seen"], row["seconds"]) == (120, 2.5)
        assert row["training_pflop"] == pytest.approx(3 * row["gflop_per_image"] * 120 / 1e6)
        assert row["mean_v_error"] == pytest.approx(sum(e["v"] for e in row["errors"]) / len(row["errors"]))
    assert rows[0]["errors"] == rows[2]["errors"]  # the same weights and the same noise
    assert rows[0]["errors"] != rows[1]["errors"]
    x = load(runs / "first").sample(
        labels=[0, 1, 0, 1, 0, 1], guidance_scale=1.0, sampler="dpm++", steps=2, seed=0, precision="fast"
    )
    features, theirs = first_pixels(""), load_dataset(zipped).images
    expected = frechet_distance(*moments(features.of(to_uint8(x))[0]), *moments(features.of(theirs)[0]))
    assert rows[0]["distance"] == pytest.approx(expected, rel=1e-6)
    table = capsys.readouterr().out
    lines = [line for line in table.splitlines() if line.startswith("| first | 0.9 ")]
    assert len(lines) == 2
    assert f"{rows[0]['distance']:,.2f}" in lines[0]
    assert f"{rows[0]['errors'][3]['v']:,.4f}" in lines[1]
    assert len({line.count("|") for line in table.split("\n\n")[0].splitlines()}) == 1


@pytest.mark.parametrize(
    "training",
    ["long", [1, 2], None, {"step": 10**400, "batch_size": 2, "seconds": "abc", "ema_decay": True}],
)
def test_metadata_that_do_not_tell_are_left_blank(runs, capsys, training):
    make_model(num_classes=2, channels=1, prediction_type="v_prediction").save(
        runs / "odd", training=training
    )
    zipped = str(runs / "images.zip")
    words = ["--data", zipped, "--reference", zipped, "--features", "any", "--num", "0", "--images", "2"]
    recipes.main([str(runs / "odd"), *words])
    assert "| odd |  |  |  | 0.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--num", "1"], "--num at least 2"),
        (["--features", "none"], "none"),
        (["--data", "missing.zip"], "missing.zip"),
        (["--json", "nowhere/x/y.json"], "nowhere"),
    ],
)
def test_what_is_wrong_is_one_line(runs, change, expected, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    (runs / "nowhere").write_text("a file")
    words = ["first", "--data", "images.zip", "--reference", "images.zip", "--features", "classifier"]
    with pytest.raises(SystemExit) as end:
        recipes.main([*words, *change])
    assert end.value.code == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]


def test_images_of_another_size_are_refused(runs, capsys):
    with zipfile.ZipFile(runs / "large.zip", "w") as archive:
        for k in range(3):
            data = io.BytesIO()
            Image.fromarray(pixels(1, 1, 12)[0, 0].numpy()).save(data, "PNG")
            archive.writestr(f"a/{k}.png", data.getvalue())
    words = [str(runs / "first"), "--data", str(runs / "large.zip"), "--reference", str(runs / "images.zip")]
    with pytest.raises(SystemExit) as end:
        recipes.main([*words, "--features", "classifier", "--num", "0"])
    assert end.value.code == 2
    assert "makes other images than" in capsys.readouterr().err
