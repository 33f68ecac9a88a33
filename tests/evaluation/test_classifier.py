"""The residual classifier of small photographs: its values, training, storage and use by `evaluate`."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffusion.classifier import Classifier, classify, crop, load_classifier, train_classifier
from diffusion.classifier import __main__ as classifier_command
from diffusion.classifier.network import ClassifierConfig
from diffusion.classifier.training import MUON_RATE, _muon_and_adamw
from diffusion.cli import main
from diffusion.data import load_dataset
from diffusion.storage.images import save_npz, to_float
from helpers.models import make_model

SIZE = 12
CONFIG = ClassifierConfig(channels=3, size=SIZE, classes=2, width=4, features=16, architecture="residual")


def photographs(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise that is brighter at the top (0) or the bottom (1), uint8 [count, 3, SIZE, SIZE], and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    slope = torch.linspace(60, -60, SIZE)[:, None].expand(SIZE, SIZE)
    signs = (1 - 2 * labels).float()[:, None, None, None]
    noise = 40 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return (128 + signs * slope + noise).clamp(0, 255).to(torch.uint8), labels


def randomised() -> Classifier:
    """The network with random moments and weights of its normalisations."""
    generator = torch.Generator().manual_seed(3)
    classifier = Classifier(CONFIG)
    for name, value in classifier.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            value.copy_(torch.rand(value.shape, generator=generator) + (0.5 if "bias" not in name else -0.5))
    return classifier.eval()


def test_the_residual_network_is_its_formula():
    """The formula is in float64, of functional calls alone."""
    classifier = randomised()
    weights = [value.double() for name, value in classifier.state_dict().items() if "tracked" not in name]
    images, _ = photographs(3)
    x = to_float(images).double()

    def block(x: torch.Tensor, stride: int) -> torch.Tensor:
        kernel, weight, bias, mean, var = (weights.pop(0) for _ in range(5))
        x = F.conv2d(x, kernel, stride=stride, padding=1)
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt() * weight.view(shape) + bias.view(shape)
        return x.clamp(min=0)

    x = block(x, 1)
    for _ in range(3):
        x = block(x, 2)
        x = x + block(x, 1)
    features = x.mean((2, 3))
    logits = features @ weights[0].T + weights[1]
    found, _ = classify(classifier, images)
    torch.testing.assert_close(found.double(), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(classifier(to_float(images)).double(), logits, rtol=1e-4, atol=1e-5)


def test_the_default_for_photographs_is_small_enough_to_ship():
    classifier = Classifier(ClassifierConfig(3, 32, 10, 16, 256, "residual"))
    assert 1e6 < sum(parameter.numel() for parameter in classifier.parameters()) < 1.5e6


@pytest.mark.parametrize("config", [CONFIG, ClassifierConfig(1, 28, 7, 5, 20, "residual")], ids=str)
def test_parameters_are_counted_without_building(config):
    assert config.num_parameters == sum(p.numel() for p in Classifier(config).parameters())
    with pytest.raises(ValueError, match=r"such a classifier has [\d,]+ parameters"):
        ClassifierConfig(3, 32, 10, 16, 65536, "residual")


def test_crop_moves_and_mirrors():
    """Every result is a window of NumPy's reflected image, or of its mirror image; most windows occur."""
    images, _ = photographs(200)
    torch.manual_seed(0)
    found = crop(images, 2)
    assert found.dtype == torch.float32
    seen = set()
    for image, moved in zip(images.numpy(), found, strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect") / np.float32(127.5) - np.float32(1)
        windows = {
            (down, right, mirrored): padded[:, down : down + SIZE, right : right + SIZE][:, :, ::mirrored]
            for down in range(5)
            for right in range(5)
            for mirrored in (1, -1)
        }
        matches = [key for key, window in windows.items() if np.allclose(window, moved.numpy(), atol=1e-6)]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 40


def test_kernels_move_by_muon_and_all_else_by_adamw():
    """Two steps against PyTorch's optimizers over copies, the kernels as matrices [outputs, inputs * 9]."""
    torch.manual_seed(0)
    classifier = Classifier(CONFIG)
    names = [name for name, value in classifier.named_parameters() if value.ndim == 4][1:]
    assert len(names) == 6
    copies = {name: value.detach().clone() for name, value in classifier.named_parameters()}
    matrices = {name: copies[name].flatten(1).requires_grad_() for name in names}
    others = {name: value.requires_grad_() for name, value in copies.items() if name not in names}
    expected = [
        torch.optim.Muon(matrices.values(), lr=MUON_RATE, weight_decay=0.01),
        torch.optim.AdamW(others.values(), lr=4e-3, weight_decay=0.02),
    ]
    found = _muon_and_adamw(classifier, 4e-3)
    for _ in range(2):
        for name, value in classifier.named_parameters():
            value.grad = torch.randn_like(value)
            if name in matrices:
                matrices[name].grad = value.grad.flatten(1).clone()
            else:
                others[name].grad = value.grad.clone()
        for optimizer in (*found, *expected):
            optimizer.step()
    for name, value in classifier.named_parameters():
        other = matrices[name].view_as(value) if name in matrices else others[name]
        assert torch.equal(value, other), name
    moved = next(iter(matrices.values())).view_as(copies[names[0]]) - copies[names[0]]
    assert moved.abs().max() == 0  # the copies share memory with the matrices, as the kernels do


def test_training_is_reproducible():
    images, labels = photographs(128)
    first, second = (
        train_classifier(images, labels, config=CONFIG, epochs=1, batch_size=64, seed=7) for _ in range(2)
    )
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_fewer_images_than_a_batch_are_one():
    images, labels = photographs(30)
    first, second = (
        train_classifier(images, labels, config=CONFIG, epochs=1, batch_size=size) for size in (None, 30)
    )
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The classifier that the command trains on two zips of photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    for name, count, seed in (("train", 256, 0), ("test", 64, 1)):
        images, labels = photographs(count, seed)
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for k, (image, label) in enumerate(zip(images, labels, strict=True)):
                data = io.BytesIO()
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(data, "PNG")
                archive.writestr(f"{'ab'[label]}/{k}.png", data.getvalue())
    words = ["--data", str(folder / "train.zip"), "--test-data", str(folder / "test.zip")]
    words += ["--width", "4", "--features", "16", "--epochs", "16", "--sample-size", "20"]
    classifier_command.main([*words, "--out", str(folder / "judge")])
    return folder


def test_the_command_trains_a_residual_network_of_colours(trained):
    classifier, reference = load_classifier(trained / "judge")
    assert classifier.config == CONFIG
    test = load_dataset(trained / "test.zip")
    accuracy = (classify(classifier, test.images)[1] == test.labels).double().mean().item()
    assert reference.test_accuracy == accuracy
    assert accuracy > 0.9
    config = json.loads((trained / "judge" / "config.json").read_text())
    assert config["training"]["parameters"] == sum(p.numel() for p in classifier.parameters())


def test_it_judges_images_and_models(trained, capsys):
    """`--features FOLDER`: images lie 0 from themselves. `--classifier FOLDER`: accuracy of each class."""
    images = str(trained / "test.zip")
    words = ["--reference", images, "--samples", images, "--features", str(trained / "judge")]
    main(["evaluate", *words, "--metrics", "fid", "--out", str(trained / "distance.json")])
    result = json.loads((trained / "distance.json").read_text())["metrics"]
    assert result == {"frechet_distance_in_judge_features": pytest.approx(0, abs=1e-6)}

    model = make_model(num_classes=2, channels=3)
    config = model.unet.config.to_dict() | {"sample_size": SIZE}
    unet = type(model.unet)(type(model.unet.config).from_dict(config))
    unet.load_state_dict(model.unet.state_dict())
    model.unet = unet
    model.save(trained / "model")
    words = ["--model", str(trained / "model"), "--classifier", str(trained / "judge"), "--num", "20"]
    main(["evaluate", *words, "--steps", "2", "--out", str(trained / "accuracy.json")])
    by_class = json.loads((trained / "accuracy.json").read_text())["class_accuracy"]["by_class"]
    assert [entry["asked"] for entry in by_class] == [0, 1]
    assert "distance" in capsys.readouterr().out


def test_images_of_another_size_are_told(trained, tmp_path, capsys):
    save_npz(torch.zeros(3, 3, 8, 8), tmp_path / "a.npz")
    path = str(tmp_path / "a.npz")
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--samples", path, "--reference", path, "--features", str(trained / "judge")])
    assert end.value.code == 2
    assert "judge takes images [3, 12, 12], not [3, 8, 8]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--architecture", "wide"], "unknown architecture 'wide'; choose from: plain, residual"),
        (["--features", "18"], "features must be a multiple of 4, not 18"),
        (["--epochs", "0"], "epochs must be"),
    ],
)
def test_options_that_do_not_fit(trained, words, expected, tmp_path, capsys):
    data = ["--data", str(trained / "train.zip"), "--test-data", str(trained / "test.zip")]
    with pytest.raises(SystemExit) as end:
        classifier_command.main(
            [*data, "--out", str(tmp_path / "c"), "--sample-size", "20", "--architecture", "residual", *words]
        )
    assert end.value.code == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_config_of_another_architecture_is_refused(trained, tmp_path):
    for path in (trained / "judge").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    for architecture in ("wide", 3, "plain"):
        config["network"]["architecture"] = architecture
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="no usable classifier") as error:
            load_classifier(tmp_path)
        assert "\n" not in str(error.value)
