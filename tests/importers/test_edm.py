"""Checkpoints of NVlabs/edm against outputs of the project's code, which `helpers.edm` describes."""

import json
import math
import pickle

import pytest
import torch
from PIL import Image

import diffusion
from diffusion.cli import main
from diffusion.exporters.program import to_exported_program
from diffusion.importers import Checkpoint, edm
from diffusion.models.registry import config_from_dict, config_to_dict
from helpers.edm import expected, state_dict
from helpers.thinning import exhaustive_but

CASES = {
    "ddpmpp": {},
    "ddpmpp_cond": {},
    "ncsnpp": {},
    "ncsnpp_skip": {"sigma_data": 0.7},
    "adm": {},
    "vp": {"precond": "vp"},
    "ve": {"precond": "ve"},
    "iddpm": {},
}
LABELS = torch.tensor([2, 0])
pytestmark = pytest.mark.filterwarnings("ignore:.*does not say how it was trained")


@pytest.fixture
def saved(tmp_path):
    """A function that writes the state dict of a case, and returns its path and flags."""

    def save(case, change=None):
        tensors = state_dict(case)
        if change is not None:
            tensors = change(tensors)
        torch.save(tensors, tmp_path / "weights.pt")
        return tmp_path / "weights.pt", CASES[case]

    return save


def load(saved, case):
    path, flags = saved(case)
    return diffusion.load(path, flags=flags)


def close(found, wanted, bound=1e-4):
    """Within `bound` of the largest value: untrained networks of VP and VE leave images in the hundreds."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=bound * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("case", CASES)
def test_the_denoised_images_and_the_trajectory_of_the_original(saved, case):
    model, recorded = load(saved, case), expected(case)
    x, labels = recorded["x"], None if model.num_classes is None else LABELS
    for name, wanted in recorded.items():
        if name.startswith("denoised."):
            sigma = float(name.removeprefix("denoised."))
            with torch.no_grad():
                found = model.unet(x * sigma, torch.full((2,), sigma), labels)
            close(found, wanted, 1e-5)
        elif name.startswith("heun"):
            steps = int(name.removeprefix("heun"))
            own = {} if steps == 18 else {"steps": steps}  # 18 steps are the model's own
            close(model.sample(labels, num_samples=2, noise=lambda k: x, **own), wanted)
        elif name == "churn8":
            options = {"s_churn": 6, "s_min": 0.05, "s_max": 50, "s_noise": 1.003, "steps": 8}
            noises = {2 * i: z for i, z in enumerate(recorded["noise"])} | {0: x}
            close(model.sample(labels, num_samples=2, noise=noises.__getitem__, **options), wanted)


@pytest.mark.parametrize(
    "case", exhaustive_but(["ddpmpp_cond", "ncsnpp_skip", "adm", "iddpm"], default=["ncsnpp_skip", "iddpm"])
)
def test_float64_agrees_with_float32(saved, case):
    model, recorded = load(saved, case), expected(case)
    x, labels = recorded["x"], None if model.num_classes is None else LABELS
    sigma = torch.full((2,), 1.0)
    with torch.no_grad():
        found = model.copy().double().unet(x.double(), sigma.double(), labels)
    assert found.dtype == torch.float64
    close(found.float(), recorded["denoised.1"], 1e-5)
    steps = 18 if case == "iddpm" else 10
    images = model.sample(labels, num_samples=2, steps=steps, noise=lambda k: x, dtype="float64")
    close(images, recorded[f"heun{steps}"])


def test_bfloat16_keeps_the_frequencies_and_levels(saved):
    for case in ("ncsnpp", "iddpm"):
        network, x = load(saved, case).unet, expected(case)["x"]
        exact = {k: v for k, v in network.state_dict().items() if ".fixed_" in k}
        assert exact
        labels = None if network.config.num_classes is None else LABELS
        with torch.no_grad():
            rounded = network.bfloat16()(x, torch.ones(2), labels)
        assert all(torch.equal(network.state_dict()[k], v) for k, v in exact.items())
        close(rounded, expected(case)["denoised.1"], 0.05)


def test_a_mask_without_further_arguments(saved):
    """Heun's steps, of two evaluations, are not repeated."""
    model, image = load(saved, "ddpmpp_cond"), torch.rand(2, 3, 8, 8) * 2 - 1
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    options = {"image": image, "mask": mask, "steps": 6}
    found = model.sample(LABELS, **options)
    assert torch.equal(found, model.sample(LABELS, **options, resamples=1))
    assert torch.equal(found[..., 4:, :], image[..., 4:, :])
    assert not torch.equal(found[..., :4, :], image[..., :4, :])


@pytest.mark.parametrize("case", exhaustive_but(CASES, default=list(CASES)[::3]))
def test_a_saved_model_is_the_same(saved, tmp_path, case):
    model = load(saved, case)
    model.save(tmp_path / "model")
    again = diffusion.load(tmp_path / "model")
    assert again.unet.config == model.unet.config
    assert again.schedule == model.schedule
    assert config_from_dict(json.loads(json.dumps(config_to_dict(model.unet.config)))) == model.unet.config
    labels = None if model.num_classes is None else [1]
    options = {"labels": labels, "num_samples": 1, "steps": 2, "seed": 3}
    assert torch.equal(again.sample(**options), model.sample(**options))


def test_images_depend_on_their_seed_number_and_label_alone(saved):
    model = load(saved, "ddpmpp_cond")
    options = {"steps": 4, "seed": 5, "guidance_scale": 1.5, "s_churn": 2.0}
    together = model.sample([0, 3, 1, 2, 2], batch_size=5, **options)
    for part in ([3], [1, 4]):
        labels = [[0, 3, 1, 2, 2][i] for i in part]
        torch.testing.assert_close(
            model.sample(labels, sample_ids=part, **options), together[part], rtol=0, atol=1e-4
        )
    close(model.sample([0, 3, 1, 2, 2], batch_size=2, **options), together)


def test_guidance_mixes_the_denoised_images_with_and_without_a_label(saved):
    model = load(saved, "ddpmpp_cond")
    x, seen = expected("ddpmpp_cond")["x"], []
    options = {"steps": 1, "noise": lambda k: x, "callback": lambda i, x, x0: seen.append(x0)}
    model.sample(LABELS.tolist(), guidance_scale=3.0, **options)
    with torch.no_grad():
        cond = model.unet(80 * x, torch.full((2,), 80.0), LABELS)
        uncond = model.unet(80 * x, torch.full((2,), 80.0), None)
        null = model.unet(80 * x, torch.full((2,), 80.0), torch.full((2,), 4))
    assert torch.equal(null, uncond)
    assert not torch.equal(cond, uncond)
    close(seen[0], uncond + 3 * (cond - uncond), 1e-5)


def test_the_initial_noise_has_the_first_level(saved):
    model, seen = load(saved, "ddpmpp"), []
    model.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    model.sample(num_samples=4, steps=1, seed=1)
    noise = diffusion.kernels.philox_normal((4, 3, 8, 8), seed=1, sample_ids=[0, 1, 2, 3], stream=0)
    torch.testing.assert_close(seen[0], 80 * noise)


WRAPPERS = {
    "ema": lambda t: {"ema": t, "step": 3},
    "state_dict": lambda t: {"state_dict": t},
    "module.": lambda t: {f"module.{k}": v for k, v in t.items()},
    "inner network": lambda t: {k.removeprefix("model."): v for k, v in t.items()},
    "float16": lambda t: {k: v.half() for k, v in t.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_prefixes_and_float16(saved, wrapper):
    model, recorded = diffusion.load(saved("ncsnpp", WRAPPERS[wrapper])[0]), expected("ncsnpp")
    with torch.no_grad():
        found = model.unet(recorded["x"], torch.ones(2))
    close(found, recorded["denoised.1"], 5e-2 if wrapper == "float16" else 1e-5)


def test_what_the_tensors_cannot_tell_is_printed(saved, tmp_path, capsys):
    path, folder = saved("ddpmpp")[0], str(tmp_path / "model")
    main(["import", str(path), "--out", folder])
    assert "precond=edm sigma_data=0.5" in capsys.readouterr().out
    main(["import", str(path), "--out", str(tmp_path / "vp"), "--flag", "precond=vp"])
    assert "assumed" not in capsys.readouterr().out
    assert diffusion.load(tmp_path / "vp").schedule.sigma_max == pytest.approx(152.167, rel=1e-5)
    main(["sample", "--model", folder, "--num", "2", "--out", str(tmp_path / "a.png")])
    assert "heun, 18 steps" in capsys.readouterr().out
    main(["sample", "--model", folder, "--num", "1", "--steps", "3", "--out", str(tmp_path / "a.gif")])
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 5  # one for each evaluation


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def replaced(name, function):
    return lambda tensors: tensors | {name: function(tensors[name])}


@pytest.mark.parametrize(
    ("change", "flags", "error"),
    [
        (without("model.enc.8x8_block0.norm0.weight"), {}, "tensors missing"),
        (without("model.map_layer0.weight"), {"format": "edm"}, "no map_layer0.weight"),
        (replaced("model.map_layer1.weight", lambda t: t[:-1]), {}, "map_layer1|embed_1"),
        (lambda tensors: tensors | {"model.more": torch.ones(2)}, {}, "1 unknown"),
        (replaced("model.map_layer1.weight", lambda t: t * math.nan), {}, "NaN"),
        (replaced("model.enc.4x4_down.conv0.resample_filter", lambda t: t * 2), {}, "resample_filter"),
        (replaced("model.map_label.weight", lambda t: t[0]), {}, "no map_label.weight"),
        (without("model.enc.4x4_down.conv0.resample_filter"), {}, "lacks buffers"),
        (lambda tensors: tensors, {"precond": "flow"}, "unknown flag precond 'flow'"),
        (lambda tensors: tensors, {"precond": "iddpm"}, "3 output channels for 3 of the images"),
        (lambda tensors: tensors, {"sigma_data": 0}, "sigma_data must be"),
        (lambda tensors: tensors, {"image_size": 8}, "unknown flag 'image_size'"),
    ],
)
def test_what_is_refused(saved, change, flags, error):
    path, _ = saved("ddpmpp_cond", change)
    with pytest.raises(ValueError, match=error) as raised:
        diffusion.load(path, flags=flags)
    assert "\n" not in str(raised.value)


def test_a_pickle_of_the_project_is_refused_with_a_way_out(tmp_path):
    class Reconstructor:
        def __reduce__(self):
            return exec, ("raise AssertionError('code was run')",)

    path = tmp_path / "network-snapshot-000001.pkl"
    path.write_bytes(pickle.dumps({"ema": Reconstructor(), "from": "torch_utils.persistence"}))
    with pytest.raises(ValueError, match=r"holds code.*torch\.save\(net\.state_dict\(\)") as raised:
        diffusion.load(path)
    assert "\n" not in str(raised.value)


def test_other_files_are_not_recognised(tmp_path):
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "other.pt")
    (tmp_path / "text.pkl").write_text("no pickle")
    for name in ("other.pt", "text.pkl", "missing.pt", "."):
        assert not edm.recognises(Checkpoint(tmp_path / name))


def test_its_program_takes_noise_levels(saved):
    program, recorded = to_exported_program(load(saved, "ncsnpp")), expected("ncsnpp")
    sigma = torch.full((2,), 0.01)
    close(program.module()(recorded["x"] * 0.01, sigma), recorded["denoised.0.01"], 1e-5)


def test_the_process_has_no_timesteps(saved):
    model = load(saved, "ddpmpp")
    with pytest.raises(ValueError, match="continuous noise levels"):
        model.sample(sampler="ddim", steps=5)


def test_the_loss_is_that_of_the_paper(saved):
    model, x0 = load(saved, "ddpmpp_cond"), torch.rand(2, 3, 8, 8) * 2 - 1
    sigma, noise = torch.tensor([0.3, 4.0]), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        found = model.loss(x0, LABELS, t=sigma, noise=noise)
        image = model.copy().double().unet((x0 + sigma[:, None, None, None] * noise).double(), sigma, LABELS)
    weight = (sigma.double() ** 2 + 0.25) / (sigma.double() * 0.5) ** 2
    errors = (image - x0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found.double(), (weight * errors).mean(), rtol=1e-5, atol=0)
    torch.manual_seed(0)
    assert model.loss(x0, LABELS, label_dropout=0.5).isfinite()  # random levels and noise
    with pytest.raises(ValueError, match="loss weighting"):
        model.loss(x0, LABELS, weighting="min_snr")
    with pytest.raises(ValueError, match="preconditioning 'vp'"):
        load(saved, "vp").loss(x0)
