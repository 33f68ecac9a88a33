"""Distances between sets of images, against their formulas."""

import json
import os
import sys

import numpy as np
import pytest
import torch

from diffusion.data import ImageSet
from diffusion.evaluation.compare import METRICS, Metric, compare, format_result
from diffusion.evaluation.features import Features, load_features
from helpers.digits import DATA, read_digits

pytest.importorskip("torch_fidelity", reason="the metrics are torch-fidelity's", exc_type=ImportError)
from helpers.image_sets import images

NAMES = [f"{name}_in_toy_features" for name in ("frechet_distance", "kernel_distance", "precision", "recall")]


def toy_features() -> Features:
    """Eight pixels as features and logits."""

    def extract(images):
        values = images.flatten(1)[:, :8].float() / 64
        return values, values

    return Features("toy", "0" * 64, None, extract)


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
