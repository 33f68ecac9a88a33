"""Checkpoints of three small projects: the networks and their loops give what the original code gave.

The stored outputs are of juraam/stable-diffusion-from-scratch, TeaPearce/Conditional_Diffusion_MNIST and
cloneofsimo/minDiffusion, run on the weights that helpers.foreign computes.
"""

import copy
import math
import warnings

import pytest
import torch
from safetensors.torch import save_file

import diffusion
from diffusion import importers
from diffusion.cli import main
from diffusion.importers import buffers
from helpers import foreign
from helpers.thinning import exhaustive_but
from helpers.tolerance import assert_close

BUFFERS = ("alpha_t", "oneover_sqrta", "sqrt_beta_t", "alphabar_t", "sqrtab", "sqrtmab", "mab_over_sqrtmab")


def checkpoint(name):
    """The state dict of a stored case, with the buffers that the project computes in its constructor."""
    facts, _ = foreign.read(name)
    betas = torch.linspace(1e-4, facts.get("beta_end", 0.02), facts["T"] + 1)
    bars = torch.cumprod(1 - betas, dim=0)
    values = {
        "beta_schedule": betas,
        "alpha_t_schedule": 1 - betas,
        "bar_alpha_t_schedule": bars,
        "sqrt_bar_alpha_t_schedule": bars.sqrt(),
        "sqrt_minus_bar_alpha_t_schedule": (1 - bars).sqrt(),
        "alpha_t": 1 - betas,
        "oneover_sqrta": 1 / (1 - betas).sqrt(),
        "sqrt_beta_t": betas.sqrt(),
        "alphabar_t": bars,
        "sqrtab": bars.sqrt(),
        "sqrtmab": (1 - bars).sqrt(),
        "mab_over_sqrtmab": betas / (1 - bars).sqrt(),
    }
    tensors = foreign.state_dict(facts["shapes"])
    for key, shape in facts["computed"].items():
        if key.endswith(".pe"):
            dim = shape[1]
            frequencies = [10000 ** (-2 * (i // 2) / dim) for i in range(dim)]
            waves = [
                [math.cos(t * f) if i % 2 else math.sin(t * f) for i, f in enumerate(frequencies)]
                for t in range(shape[0])
            ]
            values[key] = torch.tensor(waves)
        tensors[key] = values[key]
        assert list(tensors[key].shape) == shape
    return tensors


def save(path, tensors):
    torch.save(tensors, path)
    return path


def load(path, flags=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the flags that are assumed
        return diffusion.load(path, flags=flags)


def draws(facts):
    """The noise of the stored trajectories."""
    return lambda k: foreign.noise(tuple(facts["shape"]), k)


@pytest.mark.parametrize("name", foreign.NAMES)
@torch.no_grad()
def test_forward(name, tmp_path):
    """In float64 the project's, but for the rounding of the stored outputs; in float32 no farther off.

    So it does not matter which processor computed them, or runs this.
    """
    facts, stored = foreign.read(name)
    unet = importers.read(save(tmp_path / "model.pth", checkpoint(name)), flags=facts["flags"]).unet.eval()
    exact = copy.deepcopy(unet).double()
    x = foreign.noise(tuple(facts["shape"]), 0)
    labels = (
        {"": ()} if facts["labels"] is None else {".null": (), ".label": (torch.tensor(facts["labels"]),)}
    )
    for t in facts["times"]:
        times = torch.full((len(x),), t)
        for ending, given in labels.items():
            theirs, expected = stored[f"forward.{t}{ending}"], exact(x.double(), times, *given)
            assert (theirs - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert_close(unet(x, times, *given), theirs, expected)


@pytest.mark.parametrize("name", foreign.NAMES)
def test_trajectory(name, tmp_path):
    """The model's own sampler is the project's, from the imported file and from the folder it is saved to."""
    facts, expected = foreign.read(name)
    model = load(save(tmp_path / "model.pth", checkpoint(name)), facts["flags"])
    guidance = {} if facts["labels"] is None else {"guidance_scale": facts["guidance_scale"]}
    arguments = {
        "labels": facts["labels"],
        "num_samples": facts["shape"][0],
        "noise": draws(facts),
        **guidance,
    }
    images = model.sample(**arguments)
    assert (images - expected["trajectory"]).abs().max() <= 1e-4
    assert model.value_range == tuple(facts["value_range"])
    model.save(tmp_path / "saved")
    again = diffusion.load(tmp_path / "saved")
    torch.testing.assert_close(again.sample(**arguments), images, rtol=0, atol=0)
    torch.testing.assert_close(model.copy().sample(**arguments), images, rtol=0, atol=0)
    double = model.sample(dtype="float64", **arguments)
    assert (double - expected["trajectory"]).abs().max() <= 1e-4
    fast = model.sample(precision="fast", **arguments)
    assert (fast - images).norm() <= 0.2 * images.norm()


@pytest.mark.parametrize("name", exhaustive_but(foreign.NAMES, default=list(foreign.NAMES)[::3]))
def test_training(name, tmp_path):
    facts, _ = foreign.read(name)
    model = load(save(tmp_path / "model.pth", checkpoint(name)), facts["flags"]).train()
    low, high = facts["value_range"]
    x = (foreign.uniform(facts["shape"], 1) + 1) / 2 * (high - low) + low
    labels = None if facts["labels"] is None else torch.tensor(facts["labels"])
    loss = model.loss(x, labels, t=torch.arange(1, 1 + len(x)), label_dropout=0.0 if labels is None else 0.5)
    loss.backward()
    assert 0 < loss.item() < math.inf
    # Without residuals no block of the project takes the label.
    unused = "unet.label_" if "no_residual" in name else "-"
    gradients = [p.grad for name, p in model.named_parameters() if not name.startswith(unused)]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_the_loss_diffuses_images_in_their_own_range(tmp_path):
    """The projects' loss: the squared error of the noise in x_t = sqrt(ab) x + sqrt(1 - ab) noise."""
    name = "conditional_mnist"
    facts, _ = foreign.read(name)
    model = load(save(tmp_path / "model.pth", checkpoint(name)))
    x, noise = (foreign.uniform(facts["shape"], 1) + 1) / 2, foreign.noise(tuple(facts["shape"]), 3)
    t, labels = torch.tensor([2, 4]), torch.tensor([2, 0])
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.03, 5, dtype=torch.float64), dim=0)[t].view(2, 1, 1, 1)
    with torch.no_grad():
        x_t = (bars.sqrt() * x + (1 - bars).sqrt() * noise).float()
        expected = (model.unet(x_t, t, labels) - noise).square().mean()
        torch.testing.assert_close(model.loss(x, labels, t=t, noise=noise), expected)


@pytest.mark.thinned
@pytest.mark.parametrize("name", foreign.NAMES)
@pytest.mark.parametrize(
    "wrapping", ["module.", "ema.", "network alone", "safetensors", "state_dict", "half"]
)
def test_other_layouts(name, wrapping, tmp_path):
    """A prefix of all names, the network's state dict alone, and files of other kinds hold the same model."""
    facts, _ = foreign.read(name)
    tensors, flags, path = checkpoint(name), dict(facts["flags"]), tmp_path / "model.pth"
    inner = {key.rpartition("_model.")[2]: value for key, value in tensors.items() if "_model." in key}
    if wrapping == "network alone":
        flags |= {"T": facts["T"], "beta_end": facts.get("beta_end", 0.02)}
        save(path, inner)
    elif wrapping in ("module.", "ema."):
        save(path, {wrapping + key: value for key, value in tensors.items()})
    elif wrapping == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    elif wrapping == "half":
        save(
            path,
            {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()},
        )
    else:
        save(path, {"state_dict": tensors, "epoch": 3})
    model = importers.read(path, flags=flags)
    assert facts["T"] + 1 == model.schedule.T
    original = importers.read(save(tmp_path / "original.pth", checkpoint(name)), flags=facts["flags"])
    for key, value in model.unet.state_dict().items():
        tolerance = 1e-3 if wrapping == "half" else 0
        torch.testing.assert_close(value, original.unet.state_dict()[key], rtol=tolerance, atol=tolerance)
    if wrapping != "half":
        torch.testing.assert_close(model.schedule.betas, original.schedule.betas, rtol=1e-5, atol=0)


def test_a_schedule_that_is_not_linear(tmp_path):
    """Betas that are on no line are taken from the buffer, whose square roots the project adds noise by."""
    tensors = checkpoint("naive_unet")
    betas = torch.tensor([0.01, 0.02, 0.3, 0.1, 0.2])
    tensors |= {
        "sqrt_beta_t": betas.sqrt(),
        "alpha_t": 1 - betas,
        "alphabar_t": torch.cumprod(1 - betas, dim=0),
    }
    schedule = importers.read(save(tmp_path / "model.pth", tensors)).schedule
    torch.testing.assert_close(schedule.betas, betas.double(), rtol=1e-6, atol=0)
    assert schedule.to_config()["kind"] == "betas"


def test_assumed_flags(tmp_path):
    """Assumed flags are named; a flag that is given is not."""
    assumed = {
        name: importers.read(save(tmp_path / "model.pth", checkpoint(name))).assumed
        for name in ("from_scratch_mnist_conditional", "conditional_mnist", "superminddpm")
    }
    assert assumed == {
        "from_scratch_mnist_conditional": {"size": 28, "value_range": "0,1", "has_residuals": True, "w": 0.2},
        "conditional_mnist": {"size": 28},
        "superminddpm": {"size": 28},
    }
    path = save(tmp_path / "model.pth", checkpoint("from_scratch_cifar_unconditional"))
    imported = importers.read(path, flags={"size": "16x32", "value_range": [-2, 2], "T": 4})
    assert imported.assumed == {"has_residuals": True}
    assert imported.unet.config.image_shape == (16, 32)
    assert imported.conventions["value_range"] == (-2, 2)


def test_each_file_is_of_one_project(tmp_path):
    found = {}
    for name in foreign.NAMES:
        file = importers.Checkpoint(save(tmp_path / "model.pth", checkpoint(name)))
        found[name] = next(one.NAME for one in importers.REGISTRY if one.recognises(file))
    names = {
        "from_scratch": "stable-diffusion-from-scratch",
        "conditional": "Conditional_Diffusion_MNIST",
        "naive": "minDiffusion",
        "superminddpm": "minDiffusion",
    }
    assert found == {
        name: names[next(key for key in names if name.startswith(key))] for name in foreign.NAMES
    }


MNIST = "from_scratch_mnist_conditional"


@pytest.mark.parametrize(
    ("name", "change", "flags", "message"),
    [
        (MNIST, {"eps_model.out.2.bias": None}, {}, "no out.2.bias"),
        (MNIST, {"eps_model.more": torch.ones(1)}, {}, "1 tensors too many, such as more"),
        (MNIST, {"eps_model.first_conv.bias": torch.ones(3)}, {}, r"input_conv.bias is \[3\], not \[8\]"),
        (MNIST, {"bar_alpha_t_schedule": torch.ones(6)}, {}, "bar_alpha_t_schedule contradicts the betas"),
        (
            MNIST,
            {"beta_schedule": torch.ones(2, 2)},
            {},
            r"beta_schedule must hold T \+ 1 numbers, not \[2, 2\]",
        ),
        (MNIST, {"beta_schedule": torch.full((6,), math.nan)}, {}, "beta"),
        (MNIST, {}, {"T": 6}, "holds its schedule of 5 steps; leave out T"),
        (MNIST, {"beta_schedule": None}, {"T": 9}, "has a schedule of 9 steps, but knows the times 0..5"),
        (MNIST, {}, {"size": 5}, "images of 5x5 cannot be halved 1 times"),
        (MNIST, {}, {"size": "a"}, "size must be a whole number"),
        (MNIST, {}, {"value_range": "0"}, "flag value_range must be two numbers, such as 0,1, not '0'"),
        (MNIST, {}, {"has_residuals": "no"}, "flag has_residuals must be"),
        (MNIST, {}, {"colour": 1}, "unknown flag 'colour'"),
        (
            "from_scratch_mnist_unconditional",
            {},
            {"w": 1},
            "has no labels to guide towards; leave out the flag w",
        ),
        ("conditional_mnist", {"nn_model.out.3.weight": None}, {}, "no out.3.weight"),
        (
            "conditional_mnist",
            {"alphabar_t": torch.ones(3)},
            {},
            "alphabar_t contradicts the betas beside it",
        ),
        ("conditional_mnist", {"alpha_t": torch.full((6,), math.nan)}, {}, "alpha_t contradicts the betas"),
        (MNIST, {"beta_schedule": torch.ones(1).expand(2**31)}, {}, "beta_schedule must hold T"),
        ("conditional_mnist", {}, {"size": 32}, "must be multiples of 28"),
        ("naive_unet", {"eps_model.init_conv.main.1.running_mean": torch.ones(8)}, {}, "batch normalisation"),
        ("naive_unet", {"eps_model.out.weight": torch.ones(3, 16, 1, 1)}, {}, "output.weight is"),
        ("superminddpm", {"eps_model.conv.0.0.weight": torch.ones(8, 1, 3, 3)}, {}, "layers.0.0.weight is"),
    ],
)
def test_files_that_contradict_themselves(name, change, flags, message, tmp_path):
    tensors = checkpoint(name) | change
    path = save(tmp_path / "model.pth", {k: v for k, v in tensors.items() if v is not None})
    with pytest.raises(ValueError, match=message) as caught:
        importers.read(path, flags=flags)
    assert "\n" not in str(caught.value)


def test_half_precision_buffers_are_near_enough():
    betas = torch.linspace(1e-4, 0.02, 1001)
    stored = {
        "sqrt_beta_t": betas.sqrt().half(),
        "alphabar_t": torch.cumprod(1 - betas, dim=0).half(),
    }
    found = buffers.stored_betas(stored, "it")
    torch.testing.assert_close(found, betas.double(), rtol=2e-3, atol=0)


def test_the_command_line_imports_and_samples(tmp_path, capsys):
    path = save(tmp_path / "model.pth", checkpoint(MNIST))
    main(["import", str(path), "--out", str(tmp_path / "model"), "--size", "6"])
    printed = capsys.readouterr()
    assert "value_range=0,1" in printed.out + printed.err
    grid = tmp_path / "grid.png"
    main(["sample", "--model", str(tmp_path / "model"), "--labels", "1,2", "--out", str(grid)])
    assert grid.stat().st_size > 0
