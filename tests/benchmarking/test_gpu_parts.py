"""The parts of the run of benchmarks/gpu: its plan, its summary, and how calls are timed."""

import json
import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion import UNet, UNetConfig
from diffusion.kernels.ops.attention import native
from diffusion.models.blocks import Norm
from diffusion.training.recipe import load_recipe
from helpers.fake_cuda import on_fake_cuda
from helpers.paths import ROOT

sys.path.append(str(ROOT))  # last, so that the package is the one that is installed

from benchmarks.gpu import device, libraries, ops, results, sanitized, sanitizer, stand_ins, summary
from benchmarks.gpu.__main__ import PARTS

# ---- What the parts are made of.


def test_the_plan_fits_its_time():
    """The part in the background ends before the first that is timed, so the longer of the two counts."""
    beside = [part for part in PARTS if not (part.essential or part.timed or part.background)]
    behind = max(sum(part.limit for part in beside), *(part.limit for part in PARTS if part.background))
    assert behind + sum(part.limit for part in PARTS if part.timed) <= 520


def test_a_line_that_was_cut_off_costs_no_other(tmp_path):
    path = tmp_path / "gpu.jsonl"
    results.append(path, part="a", value=1)
    with open(path, "a") as file:
        file.write('{"part": "b", "val')
    results.append(path, part="c", value=2)
    assert results.read(path) == [{"part": "a", "value": 1}, {"part": "c", "value": 2}]


def test_a_summary_is_short_and_right():
    long = "a message\nof lines " + "x" * 500
    rows = [
        {"part": "parity", "test": f"tests/kernels/test_gpu.py::test_{i}", "reason": long} for i in range(500)
    ]
    rows += [{"part": "parity", "when": "finished", "counts": {"failed": 500}, "skips": {long: 7, "no": 1}}]
    for part in PARTS:
        row = {"part": part.name, "status": "failed", "seconds": 3.14, "failures": [long] * 40}
        rows.append(json.loads(json.dumps(row)))
    rows.append({"part": "ops", "bytes_per_second": 4e12})
    for shape in [(512, 128, n, n) for n in range(1, 60)]:
        row = {"op": "group_norm_silu", "shape": shape, "backend": "cuda", "bytes": 2e8, "seconds": 1e-4}
        rows.append({"part": "ops", **row, "beyond_cache": True, "peers": {"torch": 3e-4, "other": "no"}})
    text = summary.text(rows)
    assert len(text.splitlines()) == 60
    assert len(text) <= 8000

    # 2e8 bytes in 1e-4 s are half of 4e12 bytes per second; the peer takes three times as long.
    assert "group_norm_silu 128x1x1  512: 100.0 50% 3.00x torch\n" in text
    assert "parity         3.1 s, 500 failed: a message of lines xxx" in text
    assert "parity: 7 skipped: a message" in text
    for part in PARTS:
        assert f"FAILED  {part.name}" in text
    assert text.splitlines()[-1].endswith("lines more; gpu.jsonl has everything")


def test_a_result_that_cannot_be_read_costs_no_other():
    rows = [{"part": "sampler", "call": 1.0}, {"part": "sampler", "status": "failed", "failures": ["no"]}]
    rows[1]["seconds"] = 2.0
    rows.append(
        {"part": "training", "loop": "ours", "batch": 128, "images_per_second": 9, "allocated": 2**30}
    )
    text = summary.text(rows)
    assert "sampler cannot be shown: KeyError: 'precision'" in text
    assert "FAILED  sampler        2.0 s: no" in text
    assert "training, batch 128, ours: 9 images/s, 1.0 GiB" in text


def test_the_summary_decides_about_wgmma():
    """The second of these shapes takes 20 us by wgmma and 30 by mma."""
    rows = [{"part": "wgmma", "shape": [n, 256, 256], "wrong": None} for n in (1, 64)]
    errors = {"wgmma": 0.004, "mma": 0.002}
    times = [{"wgmma": 2e-5, "mma": 1e-5}, {"wgmma": 2e-5, "mma": 3e-5}]
    timed = [row | {"times": t} for row, t in zip(rows, times, strict=True)]
    compared = [row | {"errors": errors} for row in rows]
    assert summary.text(compared + timed).splitlines() == [
        "attention by wgmma agrees with float64 (2 of 2 shapes, error 0.004, by mma 0.002)",
        "attention_wgmma 256x256, us by batch  1: 20.0 0.50x mma;  64: 20.0 1.50x mma",
    ]
    compared[1]["wrong"] = "its error is 9, 0.1 allowed"
    text = summary.text(compared)
    assert "attention by wgmma IS WRONG: its error is 9, 0.1 allowed (1 of 2 shapes" in text
    refused = summary.text([{"part": "wgmma", "refused": "no wgmma on 8.0"}])
    assert refused == "attention by wgmma was not tried: no wgmma on 8.0\n"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print('all ran')", (None, "all ran")),
        ("print('========= Race at wgmma_kernel'); raise SystemExit(9)", "status 9: Race at wgmma_kernel"),
        ("import time; print('========= begun', flush=True); time.sleep(600)", "killed after 3 s: begun"),
    ],
)
def test_how_a_sanitizer_ends(program, expected, monkeypatch):
    monkeypatch.setattr(sanitizer, "SECONDS", 3.0)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, "-S", "-c", program], **options)
    result = sanitizer.finish(process, 3.0)
    if isinstance(expected, tuple):
        assert result == expected
    else:
        assert result[0].startswith(expected)
    assert process.poll() is not None


def test_when_libraries_are_built_here():
    loaded = {"build": {"cuda": "loaded"}, "of_these_sources": True}
    assert libraries.reason_to_build(loaded) is None
    assert libraries.reason_to_build(loaded | {"of_these_sources": False}) is not None
    missing = {"build": {"cuda": "the cuda library was not built: no nvcc"}, "of_these_sources": True}
    assert libraries.reason_to_build(missing) == "the cuda library was not built: no nvcc"


def test_the_norms_are_those_of_the_network():
    found, config = set(), UNetConfig(**load_recipe("cifar10-ddpm").unet)
    with FakeTensorMode(), torch.no_grad():
        unet = UNet(config).eval()
        for module in unet.modules():
            if isinstance(module, Norm):
                module.register_forward_pre_hook(lambda _, args: found.add(tuple(args[0].shape[1:3])))
        embedding = torch.zeros(1, sum(unet.embedding_sizes))
        unet.denoise(torch.zeros(1, 3, 32, 32), embedding, "reference")
    assert sorted(found) == sorted(ops.NORMS)


@pytest.fixture
def cuda(monkeypatch):
    """The stand-ins for torch.cuda, with a clock of which each replay takes 2 ms."""
    names = ("Event", "Stream", "CUDAGraph", "graph", "stream", "current_stream", "current_device")
    names += ("synchronize", "mem_get_info", "get_device_properties", "empty_cache", "max_memory_allocated")
    for name in (*names, "max_memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cuda, name))
    for name in ("node_count", "MEMORY", "CALLS"):
        monkeypatch.setattr(device, name, getattr(device, name))
    stand_ins.install()
    now = [0.0]
    replay = stand_ins.CUDAGraph.replay

    def replays(graph):
        replay(graph)
        now[0] += 2e-3

    monkeypatch.setattr(stand_ins.CUDAGraph, "replay", replays)
    monkeypatch.setattr(stand_ins.time, "perf_counter", lambda: now[0])


def test_times_of_calls(cuda):
    calls = [((i,), {}) for i in range(4)]
    assert device.call_seconds(lambda i: i, calls) == pytest.approx(2e-3 / 4)


def test_a_capture_that_fails_is_not_passed_over(cuda):
    runs = []

    def run():
        runs.append(1)
        if len(runs) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        device.capture(run)


def test_steps_are_timed_by_their_replays(cuda):
    with device.watched_graphs() as watched:
        graph = device.capture(lambda: None)
        for _ in range(5):
            graph.replay()
        assert watched.step_seconds() == pytest.approx(2e-3)
        assert watched.nodes() == ([1], None)
    assert torch.cuda.CUDAGraph is stand_ins.CUDAGraph


def test_buffers_exceed_the_cache_twice(cuda, monkeypatch):
    monkeypatch.setattr(device, "CALLS", (4, 200))
    monkeypatch.setattr(device, "MEMORY", 1 << 30)
    cache = stand_ins.torch.cuda.get_device_properties().L2_cache_size
    assert device.calls_beyond_cache(cache) == (4, True)
    count, cold = device.calls_beyond_cache(cache // 50)
    assert cold
    assert count * (cache // 50) > 2 * cache
    assert device.calls_beyond_cache(1, 200) == (200, False)


def operators_of_cuda() -> set[str]:
    """The operators that the CUDA sources implement."""
    sources = "".join(path.read_text() for path in sorted(ROOT.glob("csrc/*/*.cu")))
    return set(re.findall(r'm\.impl\("(\w+)"', sources))


def test_the_sanitizer_sees_every_operator(monkeypatch):
    """On fake tensors: the operators that run are all that the CUDA library has."""
    ran = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "fused_diffusion":
                ran.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    def gradient(y, tensors, grad):  # without autograd's engine, which asks for a device
        y.grad_fn.apply(grad, *[None] * (len(y.grad_fn._input_metadata) - 1))

    monkeypatch.setattr(torch.autograd, "grad", gradient)
    monkeypatch.setattr(native, "_processors", lambda index: 132)
    with on_fake_cuda(), Watch():
        for run in sanitized.RUN.values():
            run("cuda")
    assert ran == operators_of_cuda()
