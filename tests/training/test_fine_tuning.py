"""Training that starts from a model's weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import load
from diffusion.cli import main
from diffusion.training.fine_tuning import images_seen, recipe_for
from helpers.training import RECIPE, make_trainer, run

SHORT = ["--steps", "1", "--batch-size", "4", "--autocast", "off"]


@pytest.fixture
def folder(tmp_path):
    """Two classes of 28x28 grey images."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for i in range(4):
            image = Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8))
            image.save(tmp_path / "pets" / label / f"{i}.png")
    return tmp_path / "pets"


def weights(model) -> dict[str, torch.Tensor]:
    return dict(model.unet.named_parameters())


def test_a_run_starts_from_the_weights_and_their_averages_too():
    model = make_trainer(replace(RECIPE, seed=5)).model
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.add_(0.01)
    recipe = recipe_for(model, replace(RECIPE, optimizer="muon", loss_weighting="min_snr"))
    trainer = make_trainer(recipe, init=model)
    for own in (trainer.model, trainer.ema):
        for name, parameter in weights(model).items():
            assert torch.equal(weights(own)[name], parameter), name
    trainer.train_step()
    assert not torch.equal(weights(trainer.model)["input_conv.weight"], weights(model)["input_conv.weight"])


def test_other_classes_start_anew_but_for_no_label():
    model = make_trainer(replace(RECIPE, seed=5, unet=RECIPE.unet | {"num_classes": 7})).model
    recipe = recipe_for(model, RECIPE)
    trainer = make_trainer(recipe, init=model)
    fresh = make_trainer(recipe)
    embedding = weights(trainer.model)["label_embedding.weight"]
    assert embedding.shape[0] == 4
    assert torch.equal(embedding[:3], weights(fresh.model)["label_embedding.weight"][:3])
    assert torch.equal(embedding[3], weights(model)["label_embedding.weight"][7])


def test_classes_of_known_names_keep_their_embeddings():
    model = make_trainer(replace(RECIPE, seed=5), class_names=("ant", "bee", "cat")).model
    there = weights(model)["label_embedding.weight"]
    recipe = recipe_for(model, replace(RECIPE, unet=RECIPE.unet | {"num_classes": 4}))
    names = ("bee", "cat", "dog", "elk")
    fresh = weights(make_trainer(recipe, class_names=names).model)["label_embedding.weight"]
    own = weights(make_trainer(recipe, class_names=names, init=model).model)["label_embedding.weight"]
    assert torch.equal(own, torch.stack([there[1], there[2], fresh[2], fresh[3], there[3]]))
    for names in (None, ("x", "y", "z")):  # as many classes, and no name in both
        own = weights(make_trainer(recipe_for(model, RECIPE), class_names=names, init=model).model)
        assert torch.equal(own["label_embedding.weight"], there)


def test_from_an_unconditional_model_and_to_one():
    plain = replace(RECIPE, unet=RECIPE.unet | {"num_classes": None})
    for before, after in ((plain, RECIPE), (RECIPE, plain)):
        model = make_trainer(replace(before, seed=5)).model
        trainer = make_trainer(recipe_for(model, after), init=model)
        assert trainer.model.num_classes == after.unet["num_classes"]
        assert torch.equal(weights(trainer.model)["input_conv.weight"], weights(model)["input_conv.weight"])


def test_the_images_seen_before_count(tmp_path):
    """Of the model that a run starts from, and of the model before that, whatever the size of the batches."""
    first, then = replace(RECIPE, steps=3), replace(RECIPE, steps=6, batch_size=4, warmup_steps=0)
    run(tmp_path / "first", make_trainer(first))
    assert images_seen(load(tmp_path / "first")) == (3 * 8, 0)
    run(tmp_path / "then", make_trainer(replace(then, steps=2), init=load(tmp_path / "first")))
    resumed = make_trainer(replace(then, batch_size=2))
    run(tmp_path / "then", resumed, resume=True, accept_changes=True)
    assert images_seen(load(tmp_path / "then")) == (2 * 4 + 4 * 2, 3 * 8)
    run(tmp_path / "last", make_trainer(then, init=load(tmp_path / "then")))
    assert images_seen(load(tmp_path / "last")) == (6 * 4, 2 * 4 + 4 * 2 + 3 * 8)


def test_images_of_models_that_do_not_hold_them(tmp_path):
    run(tmp_path, make_trainer(replace(RECIPE, steps=3)))
    model = load(tmp_path)
    del model.metadata["training"]["images"], model.metadata["training"]["images_before"]
    assert images_seen(model) == (3 * 8, 0)


@pytest.mark.parametrize(
    "training",
    [
        "long",
        None,
        [1, 2],
        {"step": 3},
        {"step": 3, "batch_size": -1},
        {"step": 3, "batch_size": True},
        {"step": "3", "batch_size": 4},
        {"step": 10**400, "batch_size": 4},
        {"step": 2**40, "batch_size": 2**40},
        {"step": 3, "batch_size": 4, "images_before": 2**63 - 1},
        {"images": 1.5},
    ],
)
def test_images_seen_are_unknown(training):
    model = make_trainer().model
    model.metadata = {"training": training}
    assert images_seen(model) is None
    assert make_trainer(init=model).images_seen == (0, 0)


def test_another_architecture_is_refused():
    model = make_trainer(replace(RECIPE, unet=RECIPE.unet | {"channels": 16})).model
    with pytest.raises(
        ValueError, match=r"another architecture: .* is \[.*\] there and \[.*\] in the recipe"
    ):
        make_trainer(RECIPE, init=model)
    deeper = make_trainer(replace(RECIPE, unet=RECIPE.unet | {"num_res_blocks": 2})).model
    with pytest.raises(ValueError, match=r"missing there|there and missing"):
        make_trainer(RECIPE, init=deeper)


def test_the_command_takes_network_schedule_and_prediction_from_the_model(folder, tmp_path):
    out = tmp_path / "run"
    words = [
        "train",
        "--data",
        str(folder),
        "--recipe",
        "mnist",
        "--init",
        "mnist",
        "--out",
        str(out),
        *SHORT,
    ]
    main([*words, "--learning-rate", "1e-12", "--set", "ema_decay=0.0"])
    digits, tuned = load("mnist"), load(out)
    assert tuned.num_classes == 2  # those of the folder
    assert tuned.schedule.to_config() == digits.schedule.to_config()
    for name, parameter in weights(digits).items():
        if name != "label_embedding.weight":
            torch.testing.assert_close(weights(tuned)[name], parameter, rtol=0, atol=1e-9)
    main([*words, "--learning-rate", "1e-12", "--set", "ema_decay=0.0", "--resume"])


def test_what_cannot_be_started_from(folder, tmp_path, capsys):
    words = ["train", "--data", str(folder), "--recipe", "mnist", "--out", str(tmp_path / "run"), *SHORT]
    for init, expected in (("nowhere", "nowhere"), (str(folder), "pets")):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--init", init])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
        assert not (tmp_path / "run").exists()
