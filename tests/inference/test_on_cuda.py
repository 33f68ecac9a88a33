"""Sampling on a CUDA device, with fake tensors and stand-ins for torch.cuda: no device is needed."""

import contextlib
import dataclasses
import threading
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion import kernels
from diffusion.inference.buffers import BufferSpec, SamplerBuffers, Step
from diffusion.inference.cuda_graph import capture_cuda_graph
from diffusion.inference.denoiser_cache import DenoiserCache
from diffusion.inference.loop import embed_timesteps, take_step
from diffusion.kernels.ops.group_norm_silu.arguments import Arguments
from diffusion.models import structure
from diffusion.samplers.thresholding import thresholded_step
from diffusion.utils.device import check_dtype, float32_products
from helpers.fake_cuda import CUDA, TINY, fake_denoiser, fake_unet, on_fake_cuda
from helpers.models import make_model

SETTINGS = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)


def precisions() -> list[str]:
    return [setting.fp32_precision for setting in SETTINGS]


@torch.no_grad()
@pytest.mark.parametrize(("tf32", "expected"), [(False, "ieee"), (True, "tf32")])
def test_products_of_float32(tf32, expected):
    """ "exact" is float32, although PyTorch's convolutions on CUDA are TF32 by default."""
    before, seen = precisions(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in ("convolution", "addmm"):
                seen.append(precisions())
            return function(*args, **(kwargs or {}))

    with on_fake_cuda():
        denoise = fake_denoiser(tf32=tf32)
        x, timesteps = torch.zeros(2, 3, 8, 8, device=CUDA), torch.zeros(2, device=CUDA)
        with Watch():
            denoise(x, timesteps, None)
    assert len(seen) > 10
    assert all(setting == [expected] * 2 for setting in seen)
    assert precisions() == before


def test_settings_return_to_what_they_were():
    before = precisions()
    with float32_products(CUDA, tf32=False):
        with float32_products(CUDA, tf32=True):
            assert precisions() == ["tf32"] * 2
        assert precisions() == ["ieee"] * 2
    with pytest.raises(LookupError), float32_products(CUDA, tf32=True):
        raise LookupError
    assert precisions() == before
    with float32_products(torch.device("cpu"), tf32=False):
        assert precisions() == before


def test_one_thread_at_a_time_changes_the_settings():
    entered = threading.Event()

    def other():
        with float32_products(CUDA, tf32=True):
            entered.set()

    thread = threading.Thread(target=other)
    with float32_products(CUDA, tf32=False):
        thread.start()
        assert not entered.wait(0.1)
        assert precisions() == ["ieee"] * 2
    thread.join()
    assert entered.is_set()


def test_a_switch_of_precision_makes_another_denoiser(monkeypatch):
    monkeypatch.setattr("diffusion.inference.denoiser_cache.make_denoiser", lambda *args: mock.MagicMock())
    monkeypatch.setattr("diffusion.inference.denoiser_cache._is_short_of_memory", lambda *args: False)
    unet, cache = make_model().unet, DenoiserCache()
    exact, rounded = (cache.get(unet, CUDA, torch.float32, "auto", tf32=tf32) for tf32 in (False, True))
    assert exact is not rounded
    assert cache.get(unet, CUDA, torch.float32, "auto") is exact


# ---- Graphs.


class Graphs:
    """Stand-ins for torch.cuda's streams and graphs, and what they were called with."""

    def __init__(self, monkeypatch):
        self.current, self.ran, self.captures, self.replays = torch.device("cuda", 0), [], [], []

        @contextlib.contextmanager
        def device(chosen):
            before, self.current = self.current, chosen
            yield
            self.current = before

        @contextlib.contextmanager
        def graph(graph, **options):
            self.captures.append((self.current, options))
            yield

        stand_ins = {
            "device": device,
            "graph": graph,
            "Stream": lambda device: mock.MagicMock(of=device),
            "current_stream": lambda device: mock.MagicMock(of=device),
            "stream": lambda stream: contextlib.nullcontext(),
            "CUDAGraph": lambda: mock.MagicMock(replay=lambda: self.replays.append(self.current)),
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)


def test_a_graph_is_captured_on_the_device_of_its_tensors(monkeypatch):
    graphs, other, ran = Graphs(monkeypatch), torch.device("cuda", 1), []
    with on_fake_cuda():
        x = torch.zeros(3, device=other)
        replay = capture_cuda_graph(lambda: ran.append(graphs.current), [x], pool=(0, 7))
    assert ran == [other] * 3  # twice to warm up
    ((device, options),) = graphs.captures
    assert device == options["stream"].of == other
    assert options["pool"] == (0, 7)
    assert options["capture_error_mode"] == "thread_local"
    replay(4)
    assert graphs.replays == [other] * 4
    assert graphs.current == torch.device("cuda", 0)


def test_one_thread_captures_at_a_time(monkeypatch):
    Graphs(monkeypatch)
    began, goes_on, order = threading.Event(), threading.Event(), []

    def first():
        began.set()
        assert goes_on.wait(60)
        order.append(1)

    def capture(function):
        capture_cuda_graph(function, [torch.zeros(1)], pool=(0, 0))

    threads = [threading.Thread(target=capture, args=(run,)) for run in (first, lambda: order.append(2))]
    threads[0].start()
    assert began.wait(60)
    threads[1].start()
    threads[1].join(0.1)
    goes_on.set()
    for thread in threads:
        thread.join()
    assert order == [1, 1, 1, 2, 2, 2]


def test_memory_is_let_go():
    model = make_model(num_classes=3)
    expected = model.sample([1, 2], steps=3)
    assert model._denoisers._kept is not None
    model.release_memory()
    assert model._denoisers._kept is None
    assert torch.equal(model.sample([1, 2], steps=3), expected)


def test_buffers_belong_to_a_stream(monkeypatch):
    """A step on another stream would not wait for those that still use them."""
    spec, streams = BufferSpec((3, 8, 8), 2, 1, 5, store_x0=False, injects_noise=False), iter("aaba")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: next(streams))
    found = []
    with on_fake_cuda():
        denoiser = fake_denoiser()
        for _ in range(4):
            with denoiser.buffers(spec) as buffers:
                found.append(buffers)
    assert found[0] is found[1]
    assert len(set(map(id, found))) == 3


# ---- Nothing waits for the device: a fake tensor whose value is asked for raises.

LABELLED = dataclasses.replace(TINY, num_classes=10)
THRESHOLD = thresholded_step
STEPS = {
    "plain": Step(False, False, False, False),
    "guided": Step(True, True, False, False),
    "rescaled": Step(True, False, False, False, rescale=0.7),
    "projected": Step(True, True, False, False, parallel=0.5),
    "thresholded": Step(False, False, False, False, threshold=THRESHOLD),
    "all": Step(True, True, False, False, 0.7, 0.5, THRESHOLD),
}


@torch.no_grad()
@pytest.mark.parametrize("step", STEPS)
def test_steps_can_be_captured(step):
    spec = BufferSpec((3, 8, 8), 2, 3, 5, store_x0=True, injects_noise=False, thresholds=True)
    with on_fake_cuda():
        denoiser = fake_denoiser(LABELLED)
        buffers = SamplerBuffers(spec, denoiser.unet.embedding_size, CUDA, torch.float32)
        buffers.timesteps, buffers.distinct_labels = torch.zeros(5, device=CUDA), [3, 4, 10]
        embed_timesteps(denoiser, buffers, 0)
        take_step(denoiser, buffers, STEPS[step])


def test_labels_are_not_read_in_a_training_step():
    with on_fake_cuda():
        network = fake_unet(LABELLED).train()
        labels = torch.zeros(2, dtype=torch.int64, device=CUDA)
        network(torch.zeros(2, 3, 8, 8, device=CUDA), labels, labels, backend="cuda")
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.10"):
        make_model(num_classes=10).unet(torch.zeros(1, 2, 8, 8), torch.zeros(1), torch.tensor([11]))


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names, self.arguments = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        self.arguments.append(args)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_checksums_of_weights_are_few_and_notice_every_number(monkeypatch):
    monkeypatch.setattr(structure, "GROUP", 5000)
    parameters = list(make_model(num_classes=10).unet.parameters())
    with Calls() as calls:
        before = structure._projections(parameters)
    numbers = sum(parameter.numel() for parameter in parameters)
    assert len(parameters) > 60
    assert numbers / 5000 <= calls.names.count("mv") <= numbers / 2500
    for parameter in parameters[::7]:
        kept = parameter.clone()
        changes = [lambda p: p.view(-1)[-1].add_(1e-3), lambda p: p.neg_(), lambda p: p.fill_(torch.inf)]
        for change in changes:
            change(parameter)
            after = structure._projections(parameters)
            assert not all(map(structure._same_numbers, before, after))
            parameter.copy_(kept)
    assert all(map(structure._same_numbers, before, structure._projections(parameters)))


def test_a_dtype_is_tried_once():
    check_dtype.cache_clear()
    for _ in range(3):
        check_dtype(torch.device("cpu"), torch.bfloat16)
    assert check_dtype.cache_info().misses == 1


# ---- Layouts.


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])
def test_convolutions_read_channels_last(channels):
    """A weight in another layout is copied in each step, and such an input makes all feature maps like it."""
    with on_fake_cuda():
        config = dataclasses.replace(TINY, in_channels=channels, out_channels=channels)
        denoiser = fake_denoiser(config)
        spec = BufferSpec((channels, 8, 8), 2, 1, 5, store_x0=False, injects_noise=False)
        buffers = SamplerBuffers(spec, denoiser.unet.embedding_size, CUDA, torch.float32)
        with Calls() as calls:
            denoiser.unet.denoise(buffers.inputs(True), buffers.step_embedding(4, compiled=False))
    read = [
        args[:2] for name, args in zip(calls.names, calls.arguments, strict=True) if name == "convolution"
    ]
    assert len(read) > 15
    assert {tensor.stride(1) for tensors in read for tensor in tensors} == {1}


# ---- Dispatch.


def test_the_backend_is_chosen_once_for_calls_alike(monkeypatch):
    op, validated = kernels.OPS["group_norm_silu"].op, []
    validate = op.validate
    monkeypatch.setattr(op, "validate", lambda arguments: validated.append(arguments) or validate(arguments))

    def chosen(x, groups=4, **options):
        return op.choose(Arguments(x, groups, **options), "auto")

    with on_fake_cuda(), torch.device(CUDA):
        x = torch.zeros(7, 8, 6, 10)
        last = x.contiguous(memory_format=torch.channels_last)
        different = [
            lambda: chosen(x),
            lambda: chosen(x[1:]),
            lambda: chosen(last),
            lambda: chosen(x.bfloat16()),
            lambda: chosen(x.clone().requires_grad_()),
            lambda: chosen(x.double()),
            lambda: chosen(x, 2),
            lambda: chosen(x, activation="none"),
            lambda: chosen(x, add=torch.zeros(7, 8)),
        ]
        first = [call() for call in different]
        assert len(validated) == len(different)
        assert first.pop(5) != "cuda"  # float64
        assert set(first) == {"cuda"}
        assert [call() for call in different[:5]] == first[:5]
        assert len(validated) == len(different)
        monkeypatch.setattr(torch.nn.functional, "silu", lambda x: x)
        assert chosen(last) == "reference"
        for _ in range(2):
            with pytest.raises(ValueError, match="cannot be divided"):
                chosen(x, 3)
