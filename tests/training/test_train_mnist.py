"""Training on MNIST, by the command."""

import pytest
import torch

import diffusion
from diffusion.cli import main
from diffusion.data import load_mnist
from diffusion.training.recipe import load_recipe
from helpers.training import (
    DATA,
    torchvision_works,
)


@pytest.mark.skipif(torchvision_works(), reason="torchvision can be imported here")
def test_without_torchvision_the_way_out_is_told(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--data-dir", str(DATA), "--out", "run"])
    assert caught.value.code == 2
    assert "fused-diffusion[train]" in capsys.readouterr().err


@pytest.mark.skipif(not torchvision_works(), reason="the data set is read by torchvision")
class TestMnist:
    def test_digits_are_read(self):
        images, labels = load_mnist(DATA, "train")
        assert images.shape == (256, 1, 28, 28)
        assert images.dtype == torch.uint8
        assert set(labels.tolist()) == set(range(10))

    def test_the_command_trains_and_resumes(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("diffusion.training.trainer.Trainer.validation_loss", lambda self, **options: 0.5)
        words = ["train", "--data", "mnist", "--data-dir", str(DATA), "--out", str(tmp_path / "run")]
        words += ["--steps", "4", "--batch-size", "4", "--save-every", "2"]
        monkeypatch.setattr("diffusion.training.run.save_samples", lambda *arguments: True)
        main(words)
        output = capsys.readouterr()
        assert "4 steps in" in output.out
        assert "images/s" in output.err
        assert "loss" in output.err
        model = diffusion.load(tmp_path / "run")
        assert model.unet.config.to_dict().items() >= load_recipe("mnist").unet.items()
        with pytest.raises(SystemExit):
            main(words)
        assert "resume" in capsys.readouterr().err
        main([*words, "--resume"])  # has nothing left to do

    def test_a_recipes_data_are_those_of_its_name(self, tmp_path, capsys):
        for words, data in (([], "mnist"), (["--recipe", "cifar10-unconditional"], "cifar10")):
            with pytest.raises(SystemExit):
                main(["train", *words, "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")])
            assert f"cannot read {data} in".lower() in capsys.readouterr().err.lower()

    def test_an_unconditional_model(self, tmp_path, monkeypatch):
        monkeypatch.setattr("diffusion.training.trainer.Trainer.validation_loss", lambda self, **options: 0.5)
        monkeypatch.setattr("diffusion.training.run.save_samples", lambda *arguments: True)
        out = tmp_path / "run"
        main(["train", "--data-dir", str(DATA), "--out", str(out), "--steps", "2", "--unconditional"])
        assert diffusion.load(out).num_classes is None

    @pytest.mark.parametrize("damage", ["truncated", "missing", "garbage"])
    def test_damaged_files_are_refused(self, damage, tmp_path):
        folder = tmp_path / "MNIST" / "raw"
        folder.mkdir(parents=True)
        for path in (DATA / "MNIST" / "raw").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        victim = folder / "train-images-idx3-ubyte"
        if damage == "truncated":
            victim.write_bytes(victim.read_bytes()[:1000])
        elif damage == "garbage":
            victim.write_bytes(b"\x01" * 1000)
        else:
            victim.unlink()
        with pytest.raises(ValueError, match="cannot read MNIST") as caught:
            load_mnist(tmp_path, "train")
        assert "\n" not in str(caught.value)

    def test_unknown_split_and_missing_folder(self, tmp_path):
        with pytest.raises(ValueError, match="split"):
            load_mnist(DATA, "validation")
        with pytest.raises(ValueError, match="there is no"):
            load_mnist(tmp_path, "train")
