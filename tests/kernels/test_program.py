"""Programs: the same bits as the calls that were written down, as often as they are run."""

import gc
import threading
import weakref

import pytest
import torch

from diffusion.kernels import _native
from diffusion.kernels._program import Program
from diffusion.kernels.ops.convolution.conv3x3_native import convolution_
from diffusion.kernels.ops.convolution.packing import choose_packing, pack
from diffusion.kernels.ops.group_norm_silu.channel_affine import group_norm_affine_
from helpers.native import requires_native

pytestmark = requires_native


def calls(batch=2, seed=0):
    """A norm and the convolution that reads its map, and where they begin and end."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 32, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 32, 3, 3, generator=generator)
    packed = pack(weight, choose_packing(weight.shape, 8, 8, torch.float32, _native.simd_in_use()))
    map = torch.empty(4 if packed.packing.parts == 3 else 3, batch, 32)
    out = torch.zeros(batch, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    norm = (x, 8, None, None, 1e-5, None, None, None, True, map)
    conv = (x, packed.data, 3, 1, 1, 1, packed.packing.tile, packed.packing.parts, None, map, True, None, out)
    return x, out, [(group_norm_affine_, norm), (convolution_, conv)]


def run(written):
    for function, arguments in written:
        function(*arguments)


def test_a_program_does_what_its_calls_do():
    x, out, written = calls()
    program = Program(written)
    assert len(program) == 2
    assert not out.any()  # nothing has run yet
    for _ in range(2):
        x.normal_()
        run(written)
        expected = out.clone()
        out.zero_()
        program.run()
        assert torch.equal(out, expected)


def test_calls_run_again_once_a_program_is_written():
    _, out, written = calls()
    with pytest.raises(RuntimeError, match="map must be"):
        Program([written[0], (group_norm_affine_, (*written[0][1][:-1], torch.empty(3)))])
    run(written)
    assert out.any()


def test_each_thread_writes_its_own():
    _, out, written = calls()
    other = calls(seed=1)

    class Slow:
        """Runs a call of another thread while this one writes."""

        def __call__(self):
            thread = threading.Thread(target=run, args=(other[2],))
            thread.start()
            thread.join()

    program = Program([(Slow(), ()), *written])
    assert len(program) == 2
    assert other[1].any()
    assert not out.any()


def test_a_program_keeps_its_tensors_and_no_longer():
    _, out, written = calls()
    run(written)
    expected, known = out.clone(), weakref.ref(written[1][1][1])
    program = Program(written)
    del written
    gc.collect()
    torch.randn(1 << 16)
    program.run()
    assert torch.equal(out, expected)
    del program
    gc.collect()
    assert known() is None


def test_a_program_within_another():
    _, out, written = calls()
    inner = []
    outer = Program([written[0], (lambda: inner.append(Program(written)), ()), written[1]])
    assert len(outer) == 2
    assert len(inner[0]) == 2
    assert not out.any()


def test_empty_calls_leave_nothing():
    _, out, written = calls(batch=0)
    program = Program(written)
    program.run()
    assert len(program) == 0
    assert out.shape == (0, 16, 8, 8)
