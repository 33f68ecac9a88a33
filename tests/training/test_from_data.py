"""`diffusion.train`: tensors, arrays, folders, and data sets of PyTorch and of Hugging Face."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

import diffusion
from diffusion.data.datasets import DatasetImages, read_dataset, survey_dataset
from diffusion.storage.image_types import as_tensor
from diffusion.training.fitting import split
from helpers.training import PLAIN, make_trainer

OPTIONS = {"steps": 3, "batch_size": 4, "warmup_steps": 0, "more_ema_decays": (), "ema_decay": 0.5}
UNET = PLAIN.unet | {"in_channels": 3, "out_channels": 3, "num_classes": 2}
QUIET = {"progress": False, "device": "cpu", "autocast": None}


def some_pixels(count=24, size=(8, 8, 3)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *size), np.uint8)


LABELS = [k % 2 for k in range(24)]
RECIPE = diffusion.Recipe(unet=UNET, **OPTIONS)


class Pairs(Dataset):
    """Images of PIL with labels, as torchvision's data sets have them."""

    classes = ("cat", "dog")

    def __init__(self, pixels=None):
        self.pixels = some_pixels() if pixels is None else pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return Image.fromarray(self.pixels[index]), LABELS[index]


@pytest.fixture(scope="module", autouse=True)
def no_grids():
    """Grids take longer than the runs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion.training.run.save_samples", lambda *arguments: True)
        yield


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The model of the images as a tensor."""
    images = torch.from_numpy(some_pixels()).permute(0, 3, 1, 2)
    out = tmp_path_factory.mktemp("tensor") / "run"
    return diffusion.train(images, out, torch.tensor(LABELS), recipe=RECIPE, **QUIET)


def assert_same(model, expected):
    weights = expected.unet.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.unet.state_dict().items())


def test_the_model_is_that_of_a_trainer_and_its_folder(expected, tmp_path):
    """Of 24 images one is held out, and 23 are trained on in the order of the seed."""
    kept, held_out = split(24, 1, seed=0)
    images, labels = torch.from_numpy(some_pixels()).permute(0, 3, 1, 2), torch.tensor(LABELS)
    trainer = diffusion.Trainer(RECIPE, images[kept].numpy(), labels[kept].tolist())
    for _ in range(3):
        trainer.train_step()
    assert_same(trainer.ema, expected)
    assert len(held_out) == 1


@pytest.mark.parametrize("kind", ["array", "list of labels", "pairs", "subset", "streamed", "by workers"])
def test_every_kind_of_data_gives_the_same_model(kind, expected, tmp_path):
    out, options = tmp_path / "run", {"recipe": RECIPE, **QUIET}
    if kind == "array":
        model = diffusion.train(some_pixels(), out, np.array(LABELS), **options)
    elif kind == "list of labels":
        model = diffusion.train(some_pixels().transpose(0, 3, 1, 2), out, LABELS, **options)
    elif kind == "pairs":
        model = diffusion.train(Pairs(), out, stream=False, **options)
    elif kind == "subset":
        model = diffusion.train(Subset(Pairs(), range(24)), out, stream=True, **options)
    else:
        workers = 2 if kind == "by workers" else 0
        model = diffusion.train(Pairs(), out, stream=True, workers=workers, **options)
        assert diffusion.load(out).class_names == ("cat", "dog")
    assert_same(model, expected)
    assert_same(diffusion.load(out), expected)


def test_data_of_hugging_face(expected, tmp_path):
    """Columns of encoded images, with the names of the classes; a part that is streamed."""
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(pixels) for pixels in some_pixels()]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    data = datasets.Dataset.from_dict({"image": images, "label": LABELS}, features=features)
    for stream in (False, True):
        model = diffusion.train(data, tmp_path / f"run-{stream}", recipe=RECIPE, stream=stream, **QUIET)
        assert_same(model, expected)
        assert model.class_names == ("cat", "dog")
    with pytest.raises(ValueError, match=r"give one split of the data set, such as data\['train'\]"):
        diffusion.train(datasets.DatasetDict(train=data), tmp_path / "a", recipe=RECIPE, **QUIET)
    with pytest.raises(ValueError, match=r"has no items by number.*load it without streaming"):
        diffusion.train(data.to_iterable_dataset(), tmp_path / "a", recipe=RECIPE, **QUIET)


def test_a_streamed_run_resumes_as_if_it_had_not_stopped(expected, tmp_path):
    options = QUIET | {"stream": True}
    diffusion.train(Pairs(), tmp_path / "run", recipe=RECIPE, **(options | {"steps": 1, "save_every": 1}))
    model = diffusion.train(Pairs(), tmp_path / "run", resume=True, accept_changes=True, steps=3, **options)
    assert diffusion.load(tmp_path / "run").metadata["training"]["step"] == 3
    assert model.class_names == ("cat", "dog")
    other = Pairs(some_pixels()[::-1])
    with pytest.raises(ValueError, match="other images or labels; --accept-changes"):
        diffusion.train(other, tmp_path / "run", resume=True, **options)


def test_data_that_do_not_fit_into_memory_are_streamed(monkeypatch):
    def size(found):
        return 3, (8, 8)

    for free, fits in ((4 * 24 * 3 * 64, True), (4 * 24 * 3 * 64 - 4, False)):
        monkeypatch.setattr("diffusion.data.datasets.free_memory", lambda device, free=free: free)
        found = read_dataset(Pairs(), size)
        assert (found.images.decoded is not None) == fits
        assert found.labels.tolist() == LABELS
        assert torch.equal(found.images[torch.tensor([3, 1])], as_tensor(some_pixels()[[3, 1]]))


def test_the_images_choose_the_recipe(tmp_path, capsys):
    """Of photographs of any size: the middle squares, of 64 pixels, in small-64, which is made tiny here."""
    sizes = [(70, 90), (99, 80), (65, 64)]
    photographs = [Image.fromarray(some_pixels(1, (*size, 3))[0]) for size in sizes * 2]
    unet = diffusion.training.recipe.load_recipe("small-64").unet | {"num_classes": None}
    tiny = {"channels": 8, "norm_groups": 4, "channel_mult": [1, 1, 1, 1], "attention_levels": []}
    changes = {"unet": unet | tiny, "steps": 1, "more_ema_decays": (), "progress": True}
    model = diffusion.train(photographs, tmp_path / "run", **(QUIET | changes))
    line = capsys.readouterr().err.strip().splitlines()
    found = next(text for text in line if "no labels" in text)
    assert "6 images, 64 x 64 (the middle square, scaled), no labels; recipe small-64: " in found
    assert "1 step of 6 images" in found
    assert model.num_classes is None
    found = survey_dataset(photographs)
    assert (found.images, found.channels, found.size, found.side, found.labelled) == (6, 3, None, 70, False)
    streamed = DatasetImages(photographs, 3, (16, 16))[torch.tensor([1])]
    square = photographs[1].crop((0, 9, 80, 89)).resize((16, 16), Image.Resampling.LANCZOS)
    assert torch.equal(streamed, as_tensor(square))


def test_a_folder(tmp_path):
    for name, offset in (("cat", 0), ("dog", 1)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for k in range(12):
            Image.fromarray(some_pixels()[2 * k + offset]).save(tmp_path / "pets" / name / f"{k:02d}.png")
    model = diffusion.train(tmp_path / "pets", tmp_path / "run", recipe=RECIPE, **QUIET)
    assert model.class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data": some_pixels() / np.float32(255)}, "must be uint8 in 0..255, not float32; make them so by"),
        ({"labels": [0, 1]}, "labels must be 24, one for each image, not 2"),
        ({"data": some_pixels(24, (16, 16, 3))}, "the images are 16 x 16, and the recipe's 8 x 8"),
        ({"step": 7}, "field of a recipe"),
        ({"recipe": "small-33"}, "small-33"),
        ({"data": 7}, "a int has no items by number"),
        ({"data": Pairs(), "labels": LABELS}, "labels are for a tensor or an array"),
        ({"data": [], "labels": None}, "the data set is empty"),
        ({"data": [(torch.zeros(3, 8, 8), 0)], "labels": None}, r"float32 \[8, 8, 3\].* leave out ToTensor"),
        (
            {"recipe": diffusion.Recipe(unet=UNET | {"num_classes": None}, **OPTIONS)},
            "there are labels, and the recipe has no classes",
        ),
        ({"autocast": "bf16"}, "autocast must be 'auto', a torch.dtype or None, not 'bf16'"),
    ],
)
def test_mistakes_are_one_line(change, expected, tmp_path):
    options = {"data": some_pixels(), "labels": LABELS, "recipe": RECIPE, **QUIET} | change
    with pytest.raises(ValueError, match=expected) as caught:
        diffusion.train(options.pop("data"), tmp_path / "run", options.pop("labels"), **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_mistakes_with_a_trainer_and_a_loss(tmp_path):
    trainer = make_trainer()
    pixels = trainer.images.numpy()
    same = diffusion.Trainer(trainer.recipe, pixels, trainer.labels.tolist())
    assert same.data_digest == trainer.data_digest
    with pytest.raises(ValueError, match=r"images to train on must be uint8 in 0\.\.255, not float32"):
        diffusion.Trainer(trainer.recipe, pixels / np.float32(255), trainer.labels)
    with pytest.raises(
        ValueError, match=r"images must be \[N, 1, 8, 8\] for this recipe, not \[44, 1, 8, 4\]"
    ):
        diffusion.Trainer(trainer.recipe, pixels[..., :4], trainer.labels)
    x = trainer.images[:2]
    for wrong, told in (
        ((x,), r"floats in \[-1, 1\], not torch.uint8; convert 0..255 by x / 127.5 - 1"),
        ((x.float(),), r"must be in \[-1, 1\], and these reach from .* convert 0..255 by x / 127.5 - 1"),
        ((x / 127.5 - 1, [0, 1]), r"labels must be an int64 tensor \[2\], not list"),
    ):
        with pytest.raises(ValueError, match=told):
            trainer.model.loss(*wrong)
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    Image.fromarray(pixels[0, 0]).save(tmp_path / "pets" / "cat" / "1.jpg")
    with pytest.raises(ValueError, match="is a folder of images, not of a model; diffusion train --data"):
        diffusion.load(tmp_path / "pets")
