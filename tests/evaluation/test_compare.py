"""Distances between sets of images: against direct formulas and known answers; refusals."""

import argparse
import io
import json
import os
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import DDPM
from diffusion.classifier import load_classifier
from diffusion.cli import evaluate, main
from diffusion.data import ImageSet
from diffusion.data.npz import load_images
from diffusion.evaluation.compare import METRICS, Metric, compare, format_result
from diffusion.evaluation.features import Features, load_features
from diffusion.evaluation.guidance_sweep import save_sweep, sweep
from diffusion.evaluation.shards import sample_shards
from diffusion.storage.images import save_npz
from diffusion.utils.frechet import frechet_distance, moments
from helpers.digits import DATA, FakeModel, read_digits, real_digits
from helpers.models import make_model

pytest.importorskip("torch_fidelity", reason="the metrics are torch-fidelity's", exc_type=ImportError)
NAMES = [f"{name}_in_toy_features" for name in ("frechet_distance", "kernel_distance", "precision", "recall")]


def toy_features() -> Features:
    """Eight pixels as features and logits."""

    def extract(images):
        values = images.flatten(1)[:, :8].float() / 64
        return values, values

    return Features("toy", "0" * 64, None, extract)


def images(seed: int, count: int, low: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    return ImageSet(
        torch.randint(low, 200 + low // 2, (count, 1, 4, 4), dtype=torch.uint8, generator=generator),
        None,
        None,
        f"noise {seed}",
    )


@pytest.fixture(scope="module")
def pair():
    return images(0, 60), images(1, 70, low=40)


@pytest.fixture(scope="module")
def result(pair):
    return compare(*pair, toy_features(), protocol={"seed": 3})


def in_features(image_set) -> np.ndarray:
    return toy_features().of(image_set.images)[0].double().numpy()


def closed_form(first: np.ndarray, second: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2) - 2 tr((C1 C2)^1/2) by the eigenvalues of C1 C2, in float64."""
    cov1, cov2 = (np.cov(values, rowvar=False) for values in (first, second))
    cross = np.sqrt(np.linalg.eigvals(cov1 @ cov2).real.clip(min=0)).sum()
    return np.square(first.mean(0) - second.mean(0)).sum() + np.trace(cov1 + cov2) - 2 * cross


def test_frechet_distance(pair, result):
    expected = closed_form(*map(in_features, pair))
    assert expected > 0.1
    assert result["metrics"][NAMES[0]] == pytest.approx(expected, rel=1e-10)
    assert result["protocol"]["Fréchet distance"] == "fused-diffusion's, in float64 (utils/frechet.py)"


def test_frechet_distance_is_torch_fidelitys_within_its_rounding(pair, result):
    """torch-fidelity takes a matrix root of a product, which keeps about half of the digits."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(torch.from_numpy(in_features(s))) for s in pair]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert result["metrics"][NAMES[0]] == pytest.approx(float(theirs), rel=1e-7)


@pytest.mark.parametrize("count", [5, 60])  # fewer than features, and more
def test_a_set_is_at_no_distance_from_itself(count):
    same = images(3, count)
    values = in_features(same)
    found = compare(same, same, toy_features(), ("fid",))["metrics"][NAMES[0]]
    assert 0 <= found <= 8 * 2**-52 * np.trace(np.cov(values, rowvar=False))
    shuffled = ImageSet(same.images.flip(0), None, None, "")
    found = compare(same, shuffled, toy_features(), ("fid",))["metrics"][NAMES[0]]
    assert 0 <= found <= 8 * 2**-52 * (np.trace(np.cov(values, rowvar=False)) + np.square(values).mean())


def test_a_frechet_distance_needs_no_torch_fidelity(pair, result, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    found = compare(*pair, toy_features(), ("fid",))
    assert found["metrics"][NAMES[0]] == result["metrics"][NAMES[0]]
    assert "torch-fidelity" not in found["protocol"]["versions"]


def test_kernel_distance_is_the_unbiased_mmd(pair):
    """On sets of one size, every subset is the whole set, and its estimate the direct formula's."""
    first, second = pair[0], ImageSet(pair[1].images[:60], None, None, "")
    x, y = in_features(first), in_features(second)
    kernel = [(a @ b.T / 8 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    n = len(x)
    inside = [(k.sum() - np.trace(k)) / (n * (n - 1)) for k in kernel[:2]]
    expected = sum(inside) - 2 * kernel[2].mean()
    found = compare(first, second, toy_features(), ("kid",))["metrics"]
    assert found[NAMES[1]] == pytest.approx(expected, rel=1e-4)
    assert found[f"{NAMES[1]}_spread"] == pytest.approx(0, abs=1e-4)


def test_precision_and_recall_by_brute_force(pair, result):
    def covered(points, balls):
        """The share of points within the distance of some ball's centre to its third neighbour."""
        hits = 0
        for point in points:
            for centre in balls:
                radius = sorted(np.linalg.norm(balls - centre, axis=1))[3]  # its own distance is the first
                if np.linalg.norm(point - centre) <= radius:
                    hits += 1
                    break
        return hits / len(points)

    ours, theirs = map(in_features, pair)
    assert result["metrics"][NAMES[2]] == pytest.approx(covered(ours, theirs))
    assert result["metrics"][NAMES[3]] == pytest.approx(covered(theirs, ours))
    assert 0 < result["metrics"][NAMES[2]] < 1


def test_the_score_by_its_definition():
    """exp(E KL(p(y|x) || p(y))) of ten images: each split holds one, so every KL is 0 and the score 1."""
    found = compare(images(0, 10), images(1, 10), toy_features(), ("is",))["metrics"]
    assert found["classifier_score_in_toy_features"] == pytest.approx(1)
    many = compare(images(0, 200), images(1, 10), toy_features(), ("is",))["metrics"]
    logits = toy_features().of(images(0, 200).images)[1].double()
    p = logits.softmax(1)
    whole = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()
    assert many["classifier_score_in_toy_features"] == pytest.approx(whole, rel=0.05)


def test_the_card_says_what_was_measured(result):
    protocol = result["protocol"]
    assert (protocol["number of samples"], protocol["number of reference images"]) == (60, 70)
    assert (protocol["samples"], protocol["reference"], protocol["seed"]) == ("noise 0", "noise 1", 3)
    assert protocol["feature network's SHA-256"] == "0" * 64
    assert "torch-fidelity" in protocol["versions"]
    assert json.loads(json.dumps(result)) == result
    text = format_result(result)
    assert "rounding: 8 bits" in text
    assert not any(name in text.lower() for name in ("fid ", "fid_", "kid", "inception"))
    for name, value in result["metrics"].items():
        assert [name, f"{value:.5g}"] in [line.split() for line in text.splitlines()]
    long = format_result({"metrics": {"n" * 60: 1.5, "m": 2.0}, "protocol": {}}).splitlines()
    assert [line.split() for line in long] == [["n" * 60, "1.5"], ["m", "2"]]


def test_inceptions_are_called_by_their_names():
    toy = toy_features()
    features = Features("inception-v3-compat", "1" * 64, None, toy.extract)
    found = compare(images(0, 20), images(1, 20), features)["metrics"]
    expected = [
        "fid",
        "kid",
        "kid_spread",
        "inception_score",
        "inception_score_spread",
        "precision",
        "recall",
    ]
    assert list(found) == expected


def test_the_bundled_classifiers_features():
    features = load_features("classifier")
    digits, labels = read_digits(DATA, "test")
    vectors, logits = features.of(digits)
    assert vectors.shape == (256, 64)
    assert (logits.argmax(1) == labels).double().mean() > 0.99
    assert features.name == "mnist-classifier"
    with pytest.raises(ValueError, match="takes images"):
        features.of(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))


def test_inception_without_network_says_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        ValueError, match=r"no network\); put https.* at .*checkpoints.*--features efficientnet-lite0"
    ):
        load_features("inception")


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_inceptions_weights_are_not_unpickled(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = tmp_path / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    path.parent.mkdir()
    torch.save({"weight": Harmful(tmp_path / "harm")}, path)
    with pytest.raises(ValueError, match="does not hold Inception's weights"):
        load_features("inception")
    assert not (tmp_path / "harm").exists()


def test_sources_of_images(tmp_path):
    pixels = images(0, 5).images
    x = pixels.float() / 127.5 - 1
    save_npz(x, tmp_path / "a.npz", [3, 1, 4, 1, 5])
    found = load_images(tmp_path / "a.npz")
    assert torch.equal(found.images, pixels)
    assert found.labels.tolist() == [3, 1, 4, 1, 5]
    np.savez(tmp_path / "b.npz", arr_0=pixels.permute(0, 2, 3, 1).numpy())
    assert torch.equal(load_images(tmp_path / "b.npz").images, pixels)
    for k in range(2):
        data = io.BytesIO()
        Image.fromarray(pixels[k, 0].numpy()).save(data, "PNG")
        with zipfile.ZipFile(tmp_path / "c.zip", "a") as archive:
            archive.writestr(f"{k}.png", data.getvalue())
    assert torch.equal(load_images(tmp_path / "c.zip").images, pixels[:2])
    sample_shards(make_model(channels=3), tmp_path / "d", 5, steps=2, shard_size=3)
    assert load_images(tmp_path / "d").images.shape == (5, 3, 8, 8)
    (tmp_path / "d" / "shard-00001.npz").unlink()
    with pytest.raises(ValueError, match=r"d holds 3 images of 5; finish sampling first"):
        load_images(tmp_path / "d")


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint8, np.int16, ">i4"])
def test_labels_of_any_integers(dtype, tmp_path):
    pixels = images(0, 3).images.permute(0, 2, 3, 1).numpy()
    labels = np.array([7, 0, 9], dtype)
    np.savez(tmp_path / "a.npz", pixels, labels)  # as guided-diffusion's scripts do
    np.savez(tmp_path / "b.npz", images=pixels, labels=labels)
    np.savez(tmp_path / "c.npz", images=pixels, arr_1=labels)
    for name in ("a.npz", "b.npz"):
        found = load_images(tmp_path / name)
        assert found.labels.dtype == torch.int64
        assert found.labels.tolist() == [7, 0, 9]
    assert load_images(tmp_path / "c.npz").labels is None


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.array([1, 2**63, 3], np.uint64), r"must be whole numbers in 0..2\^31-1, not 9223372036854775808"),
        (np.array([1, -1, 3]), r"must be whole numbers in 0..2\^31-1, not -1"),
        (np.array([1, 2**31, 3]), r"must be whole numbers in 0..2\^31-1, not 2147483648"),
        (np.array([True, False, True]), r"must be integers \[3\], not bool"),
        (np.array([0.0, 1.0, 2.0]), r"must be integers \[3\], not float64"),
        (np.array([[0], [1], [2]]), r"must be integers \[3\], not int64 \[3, 1\]"),
    ],
)
def test_labels_that_are_none(labels, expected, tmp_path):
    pixels = images(0, 3).images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", pixels, labels)
    with pytest.raises(ValueError, match=r"labels in .*a\.npz " + expected):
        load_images(tmp_path / "a.npz")


def bad_npz(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "text":
        return b"no array"
    if kind == "pickle":
        return pickle.dumps([1, 2])
    arrays = {
        "other": {"pictures": np.zeros((3, 4, 4, 1), np.uint8)},
        "floats": {"images": np.zeros((3, 4, 4, 1), np.float32)},
        "flat": {"images": np.zeros((3, 16), np.uint8)},
        "one": {"images": np.zeros((1, 4, 4, 1), np.uint8)},
        "channels": {"images": np.zeros((3, 4, 4, 4), np.uint8)},
        "labels": {"images": np.zeros((3, 4, 4, 1), np.uint8), "labels": np.zeros(2, np.int64)},
        "objects": {"images": np.array([{}, {}], dtype=object)},
        "truncated": {"images": np.random.default_rng(0).integers(0, 9, (30, 9, 9, 1), dtype=np.uint8)},
    }[kind]
    np.savez_compressed(file, allow_pickle=True, **arrays)
    return file.getvalue()[:-300] if kind == "truncated" else file.getvalue()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("text", "cannot read"),
        ("pickle", "cannot read"),
        ("other", "no array `images` or `arr_0`"),
        ("floats", "must be uint8"),
        ("flat", "must be uint8"),
        ("channels", "1 or 3"),
        ("one", "holds 1 image;"),
        ("labels", "labels in .* must be integers"),
        ("objects", "cannot read"),
        ("truncated", "cannot read"),
    ],
)
def test_arrays_that_are_no_images(kind, expected, tmp_path, capsys):
    path = tmp_path / "a.npz"
    path.write_bytes(bad_npz(kind))
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--samples", str(path), "--reference", str(path), "--features", "classifier"])
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "a.npz" in lines[0]
    with pytest.raises(ValueError, match=expected):
        load_images(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrics", "fid", "nonsense"], "unknown metric 'nonsense'"),
        (["--metrics", "fid", "--num", "1"], "fid needs at least 2 samples, not 1"),
        (["--metrics", "precision-recall", "--num", "3"], "precision-recall needs at least 4 samples, not 3"),
        (["--features", "cifar10-classifier", "--metrics", "fid"], "takes images [3, 32, 32], not [3, 8, 8]"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_told_before_the_sampling(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model(channels=3).save("model")
    np.savez("a.npz", images=np.zeros((9, 8, 8, 3), np.uint8))
    judge = Features("judge", "0" * 64, None, lambda x: (x.flatten(1).float(), x.flatten(1).float()))
    if "--features" not in words:
        monkeypatch.setattr("diffusion.cli.evaluate.load_features", lambda name: judge)
    monkeypatch.setattr(DDPM, "sample", lambda *_, **__: pytest.fail("it sampled"))
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--model", "model", "--reference", "a.npz", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_metric_is_told_before_features_are_fetched(monkeypatch, capsys):
    monkeypatch.setattr("diffusion.cli.evaluate.load_features", lambda name: pytest.fail("it fetched"))
    with pytest.raises(SystemExit):
        main(["evaluate", "--samples", "a.npz", "--reference", "b.npz", "--metrics", "fid", "--metrics", "x"])
    assert "unknown metric 'x'" in capsys.readouterr().err


def test_a_curve_that_cannot_be_drawn_is_told_before_the_sampling(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DDPM, "sample", lambda *_, **__: pytest.fail("it sampled"))
    (tmp_path / "a.png").mkdir()
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--sweep", "--out", "a.json"])
    assert caught.value.code == 2
    assert "cannot write a.png: it is a folder" in capsys.readouterr().err
    model = FakeModel(real_digits)
    model.steps = make_model(T=30).steps
    with pytest.raises(ValueError, match=r"steps must be a whole number in 1\.\.30, not 50"):
        sweep(model, num=20)
    assert model.calls == []


def test_too_large_arrays(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((100, 64, 64, 3), np.uint8))
    monkeypatch.setattr("diffusion.data.npz.MAX_BYTES", 10**5)
    with pytest.raises(ValueError, match=r"a\.npz: its array images takes"):
        load_images(tmp_path / "a.npz")


def test_the_command_compares_and_writes(tmp_path, capsys):
    digits, _ = read_digits(DATA, "test")
    for name, part in (("a", digits[:128]), ("b", digits[128:])):
        save_npz(part.float() / 127.5 - 1, tmp_path / f"{name}.npz")
    words = ["evaluate", "--samples", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "b.npz")]
    main([*words, "--features", "classifier", "--metrics", "fid", "--out", str(tmp_path / "r.json")])
    assert "frechet_distance_in_mnist-classifier_features" in capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    features = load_features("classifier")
    expected = frechet_distance(
        *moments(features.of(digits[:128])[0]), *moments(features.of(digits[128:])[0])
    )
    assert list(result["metrics"].values()) == [pytest.approx(expected, rel=1e-6)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--samples", "a.npz"], "--reference is missing"),
        (["--bits-per-dim"], "--reference is missing"),
        (["--sweep"], "--out is missing"),
        (["--sweep", "--out", "a.txt"], "must end in .json"),
        (["--reference", "none.npz", "--features", "classifier"], "there is no none.npz"),
        (["--reference", "none", "--features", "classifier"], "no data set, folder or zip 'none'"),
        (["--reference", "mnist", "--features", "classifier"], "mnist needs --data-dir"),
        (["--num", "0"], "--num"),
    ],
)
def test_what_is_missing_is_told(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *words])
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "measure", [["--sweep"], ["--bits-per-dim"], ["--samples", "a"], ["--reference", "a"], []]
)
def test_an_option_without_effect_is_refused(measure, capsys, tmp_path, monkeypatch):
    """Each option is used, or refused in one line that names it."""
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    of_pairs, of_model = "reference split resize metrics features data-dir", "model num seed device"
    sampling = f"{of_model} guidance-scale sampler steps batch-size precision dtype backend"
    used = {
        "--sweep": f"{of_model} batch-size precision dtype backend classifier",
        "--bits-per-dim": f"{of_model} reference split resize data-dir",
        "--samples": f"{of_pairs} samples",
        "--reference": f"{of_pairs} {sampling} samples",  # with both, --samples decides
        "": f"{sampling} data-dir classifier reference samples",  # the last two choose another measure
    }[measure[0] if measure else ""].split()
    options = [word for action in parser._actions for word in action.option_strings if word.startswith("--")]
    for option in {*options} - {"--help", "--out", "--sweep", "--bits-per-dim"}:
        if option[2:] in used:
            continue
        value = "1" if option in ("--num", "--guidance-scale", "--steps", "--seed", "--batch-size") else "fid"
        with pytest.raises(SystemExit) as caught:
            main(["evaluate", *measure, option, *([] if option == "--resize" else [value])])
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        where = f"with {measure[0]}" if measure else "without --reference"
        assert line == f"diffusion: {option} has no effect {where}: leave it out"


def test_two_measures_are_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--sweep", "--bits-per-dim"])
    assert caught.value.code == 2
    assert "--sweep and --bits-per-dim are different measures" in capsys.readouterr().err


def test_a_metric_is_one_entry(pair, monkeypatch):
    def means(ours, theirs, logits):
        return ours.mean().item(), theirs.mean().item()

    metric = Metric(means, ("ours", "theirs"), ("ours_in_{}", "theirs_in_{}"), by_fidelity=False)
    monkeypatch.setitem(METRICS, "means", metric)
    found = compare(*pair, toy_features(), ("means",))["metrics"]
    assert found == {
        "ours_in_toy": pytest.approx(in_features(pair[0]).mean()),
        "theirs_in_toy": pytest.approx(in_features(pair[1]).mean()),
    }


def test_an_old_torch_fidelity_is_told(pair, monkeypatch):
    """0.3 has no precision and recall."""
    monkeypatch.setitem(sys.modules, "torch_fidelity.metric_prc", None)
    monkeypatch.delattr("torch_fidelity.metric_prc", raising=False)
    with pytest.raises(ValueError, match=r"this needs torch-fidelity .*fused-diffusion\[evaluate\]"):
        compare(*pair, toy_features())


def test_unknown_metrics(pair):
    with pytest.raises(ValueError, match="unknown metric 'lpips'; choose from: fid, kid"):
        compare(*pair, toy_features(), ("lpips",))


def test_the_curve_has_every_point(tmp_path):
    """The stand-in gives real digits for all options: distances are small, class accuracy is 100 %."""
    model = FakeModel(real_digits)
    result = sweep(
        model, num=40, samplers=("ddim", "dpm++"), steps=(2, 5), guidance=(1.0, 3.0), precision="fast"
    )
    points = [(p["sampler"], p["steps"], p["guidance"]) for p in result["points"]]
    one = [(2, 1.0), (5, 1.0), (5, 3.0)]
    assert points == [(sampler, *rest) for sampler in ("ddim", "dpm++") for rest in one]
    assert [p["evaluations"] for p in result["points"]] == [2, 5, 5, 2, 5, 5]
    assert min(p["accuracy"] for p in result["points"]) >= 0.95
    _, reference = load_classifier()
    features = load_features("classifier").of(
        ((real_digits([i % 10 for i in range(40)], 1) + 1) * 127.5).round().to(torch.uint8)
    )[0]
    expected = frechet_distance(*moments(features), reference.mean, reference.cov)
    assert result["points"][0]["distance"] == pytest.approx(expected, rel=1e-9)
    protocol = result["protocol"]
    assert protocol["feature network's SHA-256"] == load_features("classifier").sha256
    assert (protocol["number of samples"], protocol["EMA decay"], protocol["precision"]) == (40, 0.99, "fast")
    assert protocol["labels"] == "each class in turn"
    save_sweep(result, tmp_path / "curve.json")
    assert json.loads((tmp_path / "curve.json").read_text()) == result
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (1000, 400)
    result["protocol"]["distance"] += os.fsdecode(b" in c\xe9")  # the name of a classifier's folder
    save_sweep(result, tmp_path / "other.json")
    assert json.loads((tmp_path / "other.json").read_text()) == result


def test_bits_per_dimension_by_the_command(tmp_path, capsys):
    make_model(T=5, channels=3).save(tmp_path / "model")
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    save_npz(pixels.float() / 127.5 - 1, tmp_path / "a.npz")
    words = ["evaluate", "--model", str(tmp_path / "model"), "--bits-per-dim", "--reference"]
    main([*words, str(tmp_path / "a.npz"), "--num", "3", "--out", str(tmp_path / "r.json")])
    output = capsys.readouterr().out
    assert "on 3 images" in output
    assert "without labels, seed 0, EMA decay not known" in output
    assert json.loads((tmp_path / "r.json").read_text())["images"] == 3
