"""The benchmark of networks, in small: it times ways that agree, refuses others, and writes its report."""

import json
import math
import sys

import pytest
import torch
from PIL import Image

from helpers.native import requires_native
from helpers.paths import ROOT
from helpers.thinning import exhaustive_but

sys.path.append(str(ROOT))  # last, so that the package is the one that is installed

from benchmarks.networks import __main__ as command
from benchmarks.networks import comparison, report, ways
from benchmarks.networks.models import MODELS
from benchmarks.sampling import timing

PARAMETERS = {  # in millions, of the real configurations, as their papers, cards or checkpoints have them
    "ddpm-cifar10": 35.7,
    "ddpm-celebahq": 113.7,
    "guided-diffusion": 295.9,
    "edm-cifar10": 55.7,
    "lucidrains": 35.7,
    "stable-diffusion": 859.5,
}


@pytest.fixture(params=MODELS)
def task(request, tmp_path):
    if request.param == "lucidrains":
        pytest.importorskip("denoising_diffusion_pytorch")
    return ways.Task(MODELS[request.param], True, 2, None, tmp_path)


def test_networks_are_of_the_real_configurations():
    for name, millions in PARAMETERS.items():
        try:
            with torch.device("meta"):
                module = MODELS[name].build(False, None)
        except ImportError:
            assert name == "lucidrains"  # an extra of the benchmark alone
            continue
        # EDM's checkpoint also has the embedding of augmentations, which sampling does not use.
        assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3), name


def test_ways_that_agree_are_timed(task, monkeypatch):
    monkeypatch.setattr(timing, "medians", lambda runs, *_: dict.fromkeys(runs, 0.5))
    rows = comparison.compare(task, ["module", "module, bf16"], 2, 0.0, 1)
    assert rows["module"] == {"difference": 0.0, "seconds": 0.25}
    assert 0 < rows["module, bf16"]["difference"] < 0.1
    assert rows["module, bf16"]["seconds"] == 0.25


@requires_native
@pytest.mark.parametrize(
    "task", exhaustive_but(MODELS, default=["ddpm-cifar10", "edm-cifar10", "stable-diffusion"]), indirect=True
)
def test_every_network_is_planned(task, monkeypatch):
    monkeypatch.setattr(timing, "medians", lambda runs, *_: dict.fromkeys(runs, 0.5))
    rows = comparison.compare(task, ["exact", "fast"], 1, 0.0, 1)
    assert {name: row.get("reason") for name, row in rows.items()} == {"exact": None, "fast": None}


def test_ways_that_disagree_or_fail_are_not_timed(monkeypatch, tmp_path):
    def shifted(task, network):
        return lambda *inputs: 1.01 * network()(*inputs)

    def missing(task, network):
        raise ImportError("No module named 'nonesuch'")

    monkeypatch.setitem(ways.WAYS, "shifted", ways.Way(shifted, True))
    monkeypatch.setitem(ways.WAYS, "missing", ways.Way(missing, True))
    task = ways.Task(MODELS["edm-cifar10"], True, 1, None, tmp_path)
    rows = comparison.compare(task, ["module", "shifted", "missing"], 1, 0.0, 1)
    assert "seconds" in rows["module"]
    assert rows["shifted"] == {
        "difference": pytest.approx(0.01, rel=1e-3),
        "reason": "wrong by 0.01 of the output, not timed",
    }
    assert rows["missing"] == {"reason": "ImportError: No module named 'nonesuch'"}


@pytest.mark.parametrize("name", ["ddpm-cifar10", "edm-cifar10"])
def test_the_loop_is_ddims(name, tmp_path):
    """A network that knows the image leads any noise to it, in any number of steps."""
    task = ways.Task(MODELS[name], True, 1, None, tmp_path)
    image = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)

    def evaluate(x, t, *more):
        if task.model.denoises:
            return image
        alpha = alphas[t.item()].item()
        return (x - math.sqrt(alpha) * image) / math.sqrt(1 - alpha)

    torch.testing.assert_close(ways.sample(task, evaluate, task.inputs(), 3), image, atol=1e-4, rtol=0)


def test_accelerated_modules_share_the_weights(tmp_path):
    network = ways.Task(MODELS["edm-cifar10"], True, 1, None, tmp_path).network()
    shared = ways.sharing(network)
    assert shared is not network
    assert all(a is b for a, b in zip(network.parameters(), shared.parameters(), strict=True))


def test_the_report(tmp_path):
    rows = {
        "module": {"seconds": 0.4, "difference": 0.0, "memory": 2**30},
        "exact": {"seconds": 0.1, "difference": 1e-6},
        "fast": {"seconds": 0.05, "difference": 0.01},
        "OpenVINO": {"seconds": 0.25, "difference": 1e-6},
        "OpenVINO, bf16": {"seconds": 0.1, "difference": 0.01},
        "ONNX Runtime": {"reason": "ModuleNotFoundError: no onnxruntime"},
    }
    point = {"along": "batch", "threads": 2, "size": 32}
    growth = [{**point, "batch": b, "seconds": {"exact": 0.1 * b}} for b in (1, 2)]
    result = {
        "device": "A Processor, 2 GHz",
        "threads": 2,
        "date": "2026-01-31",
        "small": False,
        "steps": 3,
        "versions": {"torch": torch.__version__},
        "build": {"simd": "avx2"},
        "networks": [{"network": "edm-cifar10", "batch": 8, "ways": rows}],
        "growth": growth,
    }
    paths = report.write(result, tmp_path / "a.json", tmp_path / "docs" / "networks.md")
    assert json.loads(paths[0].read_text()) == result
    text = paths[1].read_text()
    assert "| 8 | 2.50x | 1.8x | 2.00x | 1.5x | 4.00x |" in text  # 0.25 / 0.1, 0.1 / 0.05, 0.4 / 0.1
    assert "| PyTorch | 400.00 | 0.0e+00 | 1.00 GiB | 4.00x |" in text
    assert "| OpenVINO, bf16 | 100.00 | 1.0e-02 |  | 2.00x |" in text
    assert "| ONNX Runtime | ModuleNotFoundError: no onnxruntime |  |  |  |" in text
    assert "| batch (threads 2, size 32) | 1 | 2 |" in text
    assert "| accelerate, exact | 100.00 | 200.00 |" in text
    assert "![Time of an evaluation of each network](networks.png)" in text
    assert Image.open(paths[2]).size[0] > 400


def test_what_was_not_measured_has_no_column():
    rows = {"module": {"seconds": 0.4, "difference": 0.0}, "exact": {"seconds": 0.1, "difference": 1e-6}}
    rows["OpenVINO"] = {"seconds": 0.25, "difference": 1e-6}
    result = {"device": "A", "threads": 2, "date": "2026-01-31", "small": False, "steps": 3, "versions": {}}
    result |= {"build": {}, "growth": [], "networks": [{"network": "edm-cifar10", "batch": 8, "ways": rows}]}
    text = report.markdown(result, None)
    assert "| network | batch | `exact`, to the faster engine | aim | `exact`, to the module |" in text
    assert "| 8 | 2.50x | 1.8x | 4.00x |" in text
    assert "| PyTorch | 400.00 | 0.0e+00 | 4.00x |" in text


def test_precisions_choose_ways():
    assert command.parse(["--precisions", "bfloat16"]).ways == ["module, bf16", "fast", "OpenVINO, bf16"]


def test_ways_of_a_precision_share_a_process(monkeypatch):
    """The largest network in both precisions does not fit into a machine that holds either."""
    started = []

    def in_a_process(*words):
        if "--compare" not in words:
            return 1
        started.append(list(words[words.index("--ways") + 1 : words.index("--compare")]))
        return {way: {"seconds": 1.0} for way in started[-1]}

    monkeypatch.setattr(command, "in_a_process", in_a_process)
    args = command.parse(["--networks", "ddpm-cifar10", "--batches", "1", "--no-growth"])
    (entry,) = command.measure(args)["networks"]
    assert started == [
        ["module", "exact", "OpenVINO", "ONNX Runtime"],
        ["module, bf16", "fast", "OpenVINO, bf16"],
    ]
    assert list(entry["ways"]) == list(ways.WAYS)


@pytest.mark.exhaustive
def test_the_command(tmp_path, monkeypatch):
    words = ["--small", "--threads", "1", "--repeats", "1", "--seconds", "0", "--steps", "1", "--no-growth"]
    words += ["--networks", "ddpm-cifar10", "--batches", "1", "--ways", "module", "ONNX Runtime"]
    (entry,) = command.measure(command.parse(words))["networks"]
    for row in entry["ways"].values():
        assert row["difference"] < 1e-4
        assert row["seconds"] > 0
        assert row["memory"] > 10**8  # PyTorch alone is more
