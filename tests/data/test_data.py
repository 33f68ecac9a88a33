"""CIFAR-10 in torchvision's layout, made here; and a pickle that is not the original's."""

import hashlib
import os
import pickle

import numpy as np
import pytest
import torch

from diffusion.data import load_cifar10, load_dataset
from helpers.training import DATA, torchvision_works

pytestmark = pytest.mark.skipif(not torchvision_works(), reason="the data sets are read by torchvision")


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Five batches of four images and one of two for testing; torchvision is told their digests."""
    from torchvision.datasets import CIFAR10

    folder, generator = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    expected = {}

    def write(name: str, content: dict) -> tuple[str, str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return name, hashlib.md5(data).hexdigest()

    def batch(name: str, count: int) -> tuple[str, str]:
        pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        expected[name] = pixels.reshape(count, 3, 32, 32)
        return write(name, {"data": pixels, "labels": [(3 * i) % 10 for i in range(count)]})

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{k}", 4) for k in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", 2)])
    name, digest = write("batches.meta", {"label_names": [str(k) for k in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": digest})
    return tmp_path, expected


def test_cifar10_is_read(cifar10):
    folder, expected = cifar10
    images, labels = load_cifar10(folder, "train")
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    np.testing.assert_array_equal(images, np.concatenate([expected[f"data_batch_{k}"] for k in range(1, 6)]))
    assert labels.tolist() == [0, 3, 6, 9] * 5
    found = load_dataset("cifar10", split="test", data_dir=folder)
    np.testing.assert_array_equal(found.images, expected["test_batch"])
    assert found.classes[3] == "cat"
    assert "cifar10" in found.name


def test_a_changed_file_is_refused_and_never_unpickled(cifar10, tmp_path):
    folder, _ = cifar10
    victim, trace = folder / "cifar-10-batches-py" / "data_batch_3", tmp_path / "harm"
    victim.write_bytes(pickle.dumps(Harmful(trace)))
    with pytest.raises(ValueError, match="cannot read CIFAR10") as caught:
        load_cifar10(folder, "train")
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    pickle.loads(victim.read_bytes())
    assert trace.exists()  # unpickling would have run the code


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*cifar-10-batches-py"):
        load_cifar10(tmp_path, "train")
    with pytest.raises(ValueError, match="unknown split"):
        load_cifar10(tmp_path, "validation")


def test_mnist_by_name():
    found = load_dataset("mnist", data_dir=DATA)
    assert found.images.shape == (256, 1, 28, 28)
    assert found.classes == tuple("0123456789")
