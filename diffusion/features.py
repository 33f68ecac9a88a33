"""What images are compared in: the features of Inception, by torch-fidelity, or of a classifier."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .classifier import Classifier, classify, load_classifier
from .reading import open_regular, sha256

BATCH = 64


@dataclass(frozen=True)
class Features:
    """name: of the network. sha256: of its weights' file. shape: [C, H, W] that it takes, or None for any.

    extract: images uint8 [B, C, H, W] to (features [B, F], logits [B, K]).
    """

    name: str
    sha256: str
    shape: tuple[int, int, int] | None
    extract: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    @property
    def is_inception(self) -> bool:
        """Whether distances in these features are what FID and KID mean."""
        return self.name.startswith("inception")

    def of(self, images: torch.Tensor, progress: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and logits of all images uint8 [N, C, H, W]; ValueError if they do not fit the network."""
        if self.shape is not None and tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"{self.name} takes images {list(self.shape)}, not {list(images.shape[1:])}")
        parts = []
        with tqdm(total=len(images), unit=" images", desc=self.name, disable=not progress) as bar:
            for part in images.split(BATCH):
                parts.append(self.extract(part))
                bar.update(len(part))
        features, logits = (torch.cat(values) for values in zip(*parts, strict=True))
        return features, logits


def load_features(name: str | os.PathLike) -> Features:
    """ "inception", "classifier" (the digit classifier that is bundled), or a classifier's folder.

    ValueError if it is none of these or, for Inception, if torch-fidelity or its weights are not to be had.
    """
    if str(name) == "inception":
        return _inception()
    judge, _ = load_classifier(None if str(name) == "classifier" else name)
    return Features(judge.folder.name, sha256(judge.folder / "model.safetensors"), judge.shape, _of(judge))


def _of(judge: Classifier) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    def extract(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            features = classify(judge, images)[0]
            return features, judge.output(features)

    return extract


def _inception() -> Features:
    """torch-fidelity's Inception v3 of FID's original weights, in its own cache."""
    fidelity = import_fidelity()
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(fidelity.URL_INCEPTION_V3).name
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            prefix = path.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(fidelity.URL_INCEPTION_V3, str(path), prefix, progress=True)
        except Exception as error:  # whatever a download raises
            raise ValueError(
                f"Inception's weights cannot be fetched ({error}); put {fidelity.URL_INCEPTION_V3} at "
                f"{path}, or compare in other features: --features classifier, or a folder of a classifier"
            ) from error
    try:
        with open_regular(path) as file:  # torch-fidelity would unpickle anything
            torch.load(file, map_location="cpu", weights_only=True)
        network = fidelity.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        ).eval()
    except Exception as error:  # unpickling refuses in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} does not hold Inception's weights: {reason}") from error

    def extract(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return network(images.expand(-1, 3, -1, -1))

    return Features("inception-v3-compat", sha256(path), None, extract)


def import_fidelity():
    """torch-fidelity's modules, as far as they are needed; ValueError that says how to install it."""
    try:
        from torch_fidelity import feature_extractor_inceptionv3, metric_prc  # noqa: F401 (since 0.4)
    except Exception as error:  # ImportError, or what torchvision raises beside another torch
        raise ValueError(
            f'this needs torch-fidelity ({error}); pip install "fused-diffusion[evaluate]"'
        ) from error
    return feature_extractor_inceptionv3
