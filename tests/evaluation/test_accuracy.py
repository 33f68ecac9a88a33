"""The Fréchet distance, the classifier that judges samples, and `evaluate` where the answer is known."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import scipy.linalg
import torch

from diffusion import data
from diffusion.classifier import (
    BUNDLED,
    Classifier,
    augment,
    bundled_classifiers,
    classifier_of,
    classify,
    command,
    load_classifier,
    train_classifier,
)
from diffusion.classifier import __main__ as classifier_command
from diffusion.classifier.storage import save_classifier
from diffusion.data import load_mnist
from diffusion.evaluation.accuracy import _named_set, class_accuracy, evaluate, format_report
from diffusion.storage.images import to_float
from diffusion.utils.frechet import frechet_distance, moments
from helpers.digits import DATA, FakeModel, read_digits, real_digits


@pytest.fixture(autouse=True)
def without_torchvision(monkeypatch):
    digits = data.NAMED_SETS["mnist"]._replace(
        load=lambda data_dir, split, download: read_digits(data_dir, split)
    )
    monkeypatch.setitem(data.NAMED_SETS, "mnist", digits)


def noise(labels, guidance_scale):
    return torch.rand(len(labels), 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1


def covariance(size, rank, seed):
    factor = np.random.default_rng(seed).normal(size=(size, rank))
    return factor @ factor.T / rank


# --- the Fréchet distance


def test_frechet_of_diagonal_covariances_is_the_closed_form():
    rng = np.random.default_rng(0)
    mean1, mean2 = rng.normal(size=(2, 20))
    std1, std2 = rng.uniform(0.1, 3, size=(2, 20))
    expected = np.sum((mean1 - mean2) ** 2) + np.sum((std1 - std2) ** 2)
    found = frechet_distance(*map(torch.tensor, (mean1, np.diag(std1**2), mean2, np.diag(std2**2))))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [64, 12])
def test_frechet_agrees_with_scipy(rank):
    cov1, cov2 = covariance(16, rank, 1), covariance(16, 40, 2)
    mean1, mean2 = np.random.default_rng(3).normal(size=(2, 16))
    root = scipy.linalg.sqrtm(cov2)
    cross = np.trace(scipy.linalg.sqrtm(root @ cov1 @ root).real)
    expected = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross
    # scipy's root of a singular matrix keeps about half the digits
    found = frechet_distance(*map(torch.tensor, (mean1, cov1, mean2, cov2)))
    assert found == pytest.approx(expected, rel=1e-10 if rank == 64 else 1e-6)


def test_frechet_of_singular_covariances_is_exact():
    """Rank 1: N(0, u u^T) and N(0, v v^T) are |u|^2 + |v|^2 - 2 |u.v| apart."""
    u, v = torch.tensor([1.0, 2, 0, 0]).double(), torch.tensor([3.0, -1, 0, 0]).double()
    zero = torch.zeros(4).double()
    assert frechet_distance(zero, u.outer(u), zero, v.outer(v)) == pytest.approx(5 + 10 - 2, abs=1e-12)
    assert frechet_distance(zero, u.outer(u), zero, torch.zeros(4, 4)) == pytest.approx(5, abs=1e-12)
    assert frechet_distance(u, torch.zeros(4, 4), v, torch.zeros(4, 4)) == pytest.approx(13, abs=1e-12)


def test_frechet_of_a_distribution_with_itself_is_zero_and_symmetric_otherwise():
    mean, cov1, cov2 = torch.zeros(16), *(torch.tensor(covariance(16, rank, 4)) for rank in (12, 40))
    assert 0 <= frechet_distance(mean, cov1, mean, cov1) <= 16 * 2**-52 * cov1.trace()
    forward = frechet_distance(mean, cov1, mean, cov2)
    assert forward == pytest.approx(frechet_distance(mean, cov2, mean, cov1), rel=1e-12)


def test_moments_are_numpys():
    features = np.random.default_rng(5).normal(1e3, 1, size=(300, 5)).astype(np.float32)
    mean, cov = moments(torch.tensor(features))
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moments(torch.zeros(1, 4)), "at least 2"),
        (lambda: moments(torch.full((3, 4), torch.nan)), "finite"),
        (lambda: frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(2), torch.eye(2)), "one F"),
        (
            lambda: frechet_distance(torch.zeros(2), torch.eye(2) * torch.inf, torch.zeros(2), torch.eye(2)),
            "finite",
        ),
    ],
)
def test_frechet_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- the classifier


def test_bundled_classifier_reads_digits_and_claims_what_is_required():
    classifier, reference = load_classifier()
    images, labels = read_digits(DATA, "test")
    features, digits = classify(classifier, images)
    assert features.shape == (256, classifier.num_features)
    assert reference.test_accuracy >= 0.995
    assert (digits == labels).double().mean() >= 0.99
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 1e6


def test_every_bundled_classifier_is_found_by_name_and_by_its_images():
    """88 % of the test images are what a judge of CIFAR-10 must read; the digits' is asked for above."""
    assert {"mnist-classifier", "cifar10-classifier"} <= set(bundled_classifiers())
    for name, folder in bundled_classifiers().items():
        classifier, reference = load_classifier(name)
        assert classifier.folder == folder
        assert classifier_of(classifier.shape) == folder
        assert "/" not in reference.source
    assert load_classifier("cifar10-classifier")[1].test_accuracy >= 0.88
    assert load_classifier("cifar10-classifier")[0].shape == (3, 32, 32)
    assert classifier_of((3, 9, 9)) == BUNDLED


def test_bundled_reference_fits_the_bundled_classifier():
    """The moments of 256 training digits are near the stored ones, as near as 256 allow."""
    classifier, reference = load_classifier()
    mean, cov = moments(classify(classifier, read_digits(DATA, "train")[0])[0])
    error_of_mean = (reference.cov.diagonal() / 256).sqrt()
    assert ((mean - reference.mean).abs() <= 5 * error_of_mean).all()  # some ReLUs never open
    assert cov.trace().item() == pytest.approx(reference.cov.trace().item(), rel=0.2)
    assert reference.cov.dtype == torch.float64
    assert len(reference.real_random) == 10
    assert len(reference.real_balanced) == 8  # MNIST has 892 test digits of its rarest class
    assert reference.sample_size == 1000


@pytest.mark.parametrize("split", ["train", "test"])
def test_load_mnist_reads_the_digits_beside_the_tests(split):
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # beside a torch it was not built for, torchvision raises RuntimeError
        pytest.skip(f"torchvision cannot be imported: {error}")
    for found, expected in zip(load_mnist(DATA, split), read_digits(DATA, split), strict=True):
        assert torch.equal(found, expected)


def test_features_are_what_the_logits_are_made_of():
    classifier, _ = load_classifier()
    x = to_float(read_digits(DATA, "test")[0][:8])
    features = classifier.features(x)
    assert features.min() >= 0
    torch.testing.assert_close(
        classifier(x), torch.nn.functional.linear(features, *classifier.output.parameters())
    )
    with pytest.raises(ValueError, match="1, 28, 28"):
        classifier.features(torch.zeros(2, 3, 28, 28))


def test_augment_moves_digits_a_little(monkeypatch):
    images, _ = read_digits(DATA, "train")
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.full(shape, 0.5))  # all changes are zero
    torch.testing.assert_close(augment(images), to_float(images), atol=1e-4, rtol=0)
    monkeypatch.undo()
    moved = augment(images)
    assert moved.shape == images.shape
    assert moved.min() >= -1 - 1e-5
    assert moved.max() <= 1 + 1e-5
    assert 0.01 < (moved - to_float(images)).square().mean() < 1


def test_training_is_reproducible_and_leaves_the_global_generator_alone():
    images, labels = read_digits(DATA, "train")
    state = torch.get_rng_state()
    first, second = (train_classifier(images, labels, epochs=2, batch_size=64, seed=7) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    with pytest.raises(ValueError, match="at least 300 images"):
        train_classifier(images, labels, batch_size=300)


def test_training_command_writes_what_is_loaded_again(tmp_path, monkeypatch, capsys):
    """The data are 256 digits; samples of 70 stand in for the thousands that 256 test digits do not hold."""
    words = ["--data-dir", str(DATA), "--out", str(tmp_path / "c"), "--epochs", "8", "--sample-size", "70"]
    classifier_command.main(words)
    classifier, reference = load_classifier(tmp_path / "c")
    images, labels = read_digits(DATA, "test")
    accuracy = (classify(classifier, images)[1] == labels).double().mean().item()
    assert reference.test_accuracy == accuracy  # measured after rounding to the stored dtypes
    assert f"{accuracy:.2%}" in capsys.readouterr().out
    assert (len(reference.real_random), len(reference.real_balanced)) == (3, 2)
    assert json.loads((tmp_path / "c" / "config.json").read_text())["training"]["epochs"] == 8


def test_training_command_ends_in_one_line_without_data(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        classifier_command.main(["--data-dir", str(tmp_path), "--out", str(tmp_path / "c")])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.glob("c/*")) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--sample-size", "1000"], "too few for 1,000"),
        (["--sample-size", "0"], "at least 10 images"),
        (["--width", "65536"], "such a classifier has"),
        (["--width", "0"], "--width must be a whole number in 1..65536, not 0"),
    ],
)
def test_training_command_looks_before_it_trains(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "train_classifier", None)
    with pytest.raises(SystemExit) as end:
        classifier_command.main(["--data-dir", str(DATA), "--out", str(tmp_path / "c"), *words])
    assert end.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "truncated", "architecture", "nan", "config", "foreign"])
def test_a_damaged_classifier_is_refused(tmp_path, damage):
    from safetensors.torch import save_file

    for path in BUNDLED.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "architecture":
        save_file({"weight": torch.zeros(3)}, weights)
    elif damage == "nan":
        save_file({name: value * torch.nan for name, value in Classifier().state_dict().items()}, weights)
    elif damage == "config":
        (tmp_path / "config.json").write_text("[]")
    else:
        (tmp_path / "config.json").write_text('{"format": "fused-diffusion"}')
    with pytest.raises(ValueError, match="no usable classifier") as error:
        load_classifier(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "statistics.safetensors"])
def test_the_classifiers_files_are_those_of_their_digests(name, tmp_path):
    shutil.copytree(BUNDLED, tmp_path / "c")
    data = bytearray((tmp_path / "c" / name).read_bytes())
    data[-2] ^= 1  # no number becomes infinite
    (tmp_path / "c" / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"no usable classifier: .*{name} is not the file .*verify=False"):
        load_classifier(tmp_path / "c")
    load_classifier(tmp_path / "c", verify=False)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.endswith("sha256")}  # as older releases
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    load_classifier(tmp_path / "c")


def test_a_classifier_that_could_not_be_loaded_is_not_written(tmp_path):
    classifier, reference = load_classifier()
    save_classifier(tmp_path, classifier, reference, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    classifier.output.weight.data[0, 0] = 1e5  # stored as float16
    with pytest.raises(
        ValueError, match=r"cannot write .*output\.weight holds NaN or infinite .* in float16"
    ):
        save_classifier(tmp_path, classifier, reference, {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    load_classifier(tmp_path)


# --- evaluate


def test_class_accuracy_counts_confusions():
    result = class_accuracy(torch.tensor([0, 1, 9, 9, 4, 7]), torch.tensor([0, 1, 4, 4, 4, 1]))
    assert (result["samples"], result["correct"], result["accuracy"]) == (6, 3, 0.5)
    assert result["misread"] == [{"asked": 4, "seen": 9, "count": 2}, {"asked": 1, "seen": 7, "count": 1}]
    with pytest.raises(ValueError, match="both be"):
        class_accuracy(torch.tensor([1]), torch.tensor([1, 2]))


def test_real_digits_do_well():
    model = FakeModel(real_digits)
    result = evaluate(model, num=140, data_dir=DATA, seed=3, batch_size=50, backend="reference")
    assert result["class_accuracy"]["accuracy"] >= 0.98
    assert result["class_accuracy"]["samples"] == 140
    assert result["frechet"]["ratio"] < 1.5  # the ratio is to others of the same few test digits
    assert result["frechet"]["ratio"] == result["frechet"]["real"]["balanced"]["ratio"]
    assert [call["guidance_scale"] for call in model.calls] == [2.0, 1.0]
    for call in model.calls:
        assert [call["labels"].count(digit) for digit in range(10)] == [14] * 10
        assert call["seed"] == 3
        assert (call["sampler"], call["steps"], call["batch_size"]) == ("ddim", 50, 50)
        assert call["backend"] == "reference"
    assert json.loads(json.dumps(result)) == result


def test_noise_does_badly():
    result = evaluate(FakeModel(noise), num=100, data_dir=DATA)
    assert result["class_accuracy"]["accuracy"] < 0.3
    assert result["frechet"]["ratio"] > 5
    assert (
        sum(pair["count"] for pair in result["class_accuracy"]["misread"])
        == 100 - result["class_accuracy"]["correct"]
    )


def test_the_data_of_a_classifier_are_found_among_sets_of_one_shape(monkeypatch):
    letters = data.NAMED_SETS["mnist"]
    monkeypatch.setitem(data.NAMED_SETS, "letters", letters)
    classifier, reference = load_classifier()
    assert reference.source.startswith("MNIST: ")
    assert _named_set(classifier, reference.source) == "mnist"
    assert _named_set(classifier, "letters, train split: 9 training images") == "letters"
    assert _named_set(classifier, "a folder: 9 training images") == "mnist"


def test_the_report_names_the_models_classes():
    digits = FakeModel(real_digits)
    digits.class_names = tuple(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    )
    result = evaluate(digits, num=100)
    assert result["class_accuracy"]["class_names"] == list(digits.class_names)
    text = format_report(result)
    assert "by class    zero: " in text
    assert ", nine: " in text
    result["class_accuracy"]["misread"] = [{"asked": 4, "seen": 9, "count": 3}]
    assert "misread     four as nine: 3\n" in format_report(result)


def test_the_two_measurements_use_their_own_guidance():
    """Digits under guidance, noise without it: accuracy is high and the distance large."""
    model = FakeModel(lambda labels, g: real_digits(labels, g) if g == 4 else noise(labels, g))
    result = evaluate(model, num=100, guidance_scale=4, data_dir=DATA)
    assert result["class_accuracy"]["accuracy"] >= 0.97
    assert result["class_accuracy"]["guidance_scale"] == 4
    assert result["frechet"]["ratio"] > 5


def test_samples_are_rounded_to_eight_bits():
    """Changes below half a grey level, and values outside [-1, 1], change nothing."""
    digits = FakeModel(lambda labels, g: real_digits(labels, g))
    blurred = FakeModel(lambda labels, g: real_digits(labels, g) * (1 + 1e-3))
    assert evaluate(digits, num=20) == evaluate(blurred, num=20)


def test_an_unconditional_model_gets_the_distance_only():
    model = FakeModel(real_digits, num_classes=None)
    result = evaluate(model, num=120, data_dir=DATA)
    assert result["class_accuracy"] is None
    assert result["frechet"]["ratio"] == result["frechet"]["real"]["random"]["ratio"] < 2
    assert [call["labels"] for call in model.calls] == [None]
    assert "accuracy" not in format_report(result)


def test_the_stored_reference_gives_a_ratio_for_its_own_number_only():
    result = evaluate(FakeModel(real_digits), num=100)
    assert result["frechet"]["ratio"] is None
    assert result["frechet"]["real_samples"] == 1000
    assert "--data-dir" in format_report(result)
    result = evaluate(FakeModel(real_digits), num=1000)
    _, reference = load_classifier()
    real = np.mean(reference.real_balanced)
    assert result["frechet"]["ratio"] == pytest.approx(result["frechet"]["distance"] / real, rel=1e-12)


def test_the_report_says_what_was_measured():
    text = format_report(
        evaluate(FakeModel(noise), num=100, steps=None, sampler="ddpm", seed=5, data_dir=DATA)
    )
    for part in (
        str(BUNDLED),
        "of real test images",
        "100, ddpm, full chain, seed 5",
        "guidance 2",
        "EMA decay 0.99",
        "by class    0: ",
        " as ",
        hashlib.sha256((BUNDLED / "model.safetensors").read_bytes()).hexdigest(),
        f"torch {torch.__version__}",
    ):
        assert part in text
    for part in (
        "Fréchet distance in mnist-classifier features (64 of them, guidance 1)",
        "256 training images",
    ):
        assert part in text
    assert "FID" not in text


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (FakeModel(real_digits), {"num": 9}, "at least 10 images"),
        (FakeModel(real_digits), {"num": 300, "data_dir": DATA}, "256 test images, too few for 300"),
        (FakeModel(real_digits), {"data_dir": DATA / "none"}, "MNIST"),
        (FakeModel(real_digits), {"classifier": DATA}, "no usable classifier"),
        (FakeModel(real_digits, shape=(3, 16, 16)), {}, "this model has 3x16x16 with 10 classes"),
        (FakeModel(real_digits, num_classes=1000), {}, "this model has 1x28x28 with 1000 classes"),
        (
            FakeModel(lambda labels, g: real_digits(labels, g) / 0),
            {"num": 20},
            "NaN or infinite values in 20 of the model's 20 samples",
        ),
    ],
)
def test_evaluate_refuses(model, options, message):
    with pytest.raises(ValueError, match=message) as error:
        evaluate(model, **options)
    assert "\n" not in str(error.value)
