"""The devices that Triton serves, and the choice of a launch configuration, which is remembered."""

from types import SimpleNamespace

import pytest
import torch

from diffusion.kernels import _triton
from diffusion.kernels.ops.attention import triton_launch as attention_impl
from diffusion.kernels.ops.group_norm_silu import triton_launch as norm_impl

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A GPU whose clock is `times`; what `launched` holds has been measured."""
    state = SimpleNamespace(times={}, launched=[], capturing=False)

    def clock(launch, candidate):
        launch(candidate)
        return state.times[candidate]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(_triton, "_fastest", {})
    monkeypatch.setattr(_triton, "_time", clock)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    pytest.importorskip("triton")
    return state


def choose(device, problem=(1, 2)):
    return _triton.fastest("op", problem, list(device.times), device.launched.append, CUDA)


def test_the_fastest_candidate_is_measured_once(device):
    device.times = {"slow": 3.0, "fast": 1.0, "impossible": float("inf")}
    assert [choose(device) for _ in range(3)] == ["fast"] * 3
    assert device.launched == ["slow", "fast", "impossible"]
    assert choose(device, problem=(1, 3)) == "fast"
    assert len(device.launched) == 6


def test_the_choice_outlives_the_process(device, monkeypatch):
    device.times = {"slow": 3.0, "fast": 1.0}
    choose(device)
    monkeypatch.setattr(_triton, "_fastest", {})
    device.times = {"slow": 1.0, "fast": 3.0}
    assert choose(device) == "fast"
    assert len(device.launched) == 2
    monkeypatch.setattr(_triton, "_fastest", {})
    monkeypatch.setattr(_triton, "_sources", lambda: "other kernels")
    assert choose(device) == "slow"


def test_nothing_is_measured_while_a_graph_is_captured(device):
    device.times, device.capturing = {"guess": 3.0, "fast": 1.0}, True
    assert choose(device) == "guess"
    assert not device.launched
    device.capturing = False
    assert choose(device) == "fast"


def test_nothing_is_measured_for_one_candidate_or_in_the_interpreter(device, monkeypatch):
    device.times = {"only": 1.0}
    assert choose(device) == "only"
    device.times = {"guess": 3.0, "fast": 1.0}
    monkeypatch.setattr(_triton, "INTERPRETED", True)
    assert choose(device) == "guess"
    assert not device.launched


def test_where_triton_serves(monkeypatch):
    monkeypatch.setattr(_triton, "MISSING", None)
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    assert "not on cpu" in _triton.unsupported(CPU)
    monkeypatch.setattr(_triton, "INTERPRETED", True)
    assert _triton.unsupported(CPU) is None
    assert "takes no mps tensors" in _triton.unsupported(torch.device("mps"))
    monkeypatch.setattr(_triton, "MISSING", "the package triton is not installed")
    assert _triton.unsupported(CPU) == "the package triton is not installed"


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True), ((10, 0), True)])
def test_old_devices_are_declined(monkeypatch, capability, served):
    monkeypatch.setattr(_triton, "MISSING", None)
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert (_triton.unsupported(CUDA) is None) == served


@pytest.mark.parametrize("direction", norm_impl.MAX_TILE)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 6, 96, 128, 192, 384, 576, 1152, 2048])
def test_tilings_hold_whole_groups_within_the_limits(channels, channels_last, direction):
    for groups in {1, 2, 3, 16, 32, channels}:
        if channels % groups:
            continue
        for positions in (1, 16, 49, 784, 1024, 65536):
            for samples in (1, 512):
                sizes = (samples, channels, positions, groups)
                candidates = norm_impl.tilings(*sizes, channels_last, direction)
                assert 1 <= len(candidates) <= 5
                assert len(set(candidates)) == len(candidates)
                for tiling in candidates:
                    width = tiling.groups * channels // groups
                    assert tiling.block_c // 2 < width <= tiling.block_c
                    assert tiling.block_c * tiling.block_s <= norm_impl.MAX_TILE[direction]
                    assert tiling.chunk % tiling.block_s == 0
                    assert tiling.chunk or tiling.block_s >= positions
                    if channels_last:
                        assert width >= min(16, channels)


def test_one_image_of_attention_fills_the_chip():
    """B = 1, S = 256, D = 256 of the DDPM UNet: the smallest tiles. B = 512: the largest."""
    small = attention_impl.tilings(torch.bfloat16, 256, 1, 256, "forward")
    assert small[0].rows == min(t.rows for t in attention_impl._TILINGS["forward"][2, 256]) == 16
    large = attention_impl.tilings(torch.bfloat16, 256, 512, 256, "forward")
    assert large[0].rows == 64
