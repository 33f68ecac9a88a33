"""Every Triton kernel in every tiling, compiled for three GPUs that need not be there."""

import re

import pytest
import torch

from diffusion.kernels import _triton
from diffusion.kernels.ops.attention import triton_launch as attention_impl
from diffusion.kernels.ops.group_norm_silu import triton_launch as norm_impl
from diffusion.kernels.ops.philox import triton_launch as philox_impl
from diffusion.kernels.ops.reverse_step import triton_launch as step_impl

if _triton.MISSING is not None or _triton.INTERPRETED:
    pytest.skip("no Triton, or its interpreter", allow_module_level=True)

from triton.backends.compiler import GPUTarget

from helpers.thinning import exhaustive_but
from helpers.triton_compile import SHARED_MEMORY, recorded_launches, usage

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in SHARED_MEMORY}


def meta(*shape, dtype=torch.float32, channels_last=False):
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if channels_last else t


def norm_launches():
    """UNets of DDPM and of guided-diffusion: whole tiles and split ones, every number of groups to a tile."""
    with recorded_launches() as launches:
        for n, c, size, channels_last in (
            (512, 128, 32, True),
            (512, 384, 16, True),
            (1, 192, 64, True),
            (1, 1152, 16, True),
            (512, 256, 32, False),
        ):
            x = meta(n, c, size, size, dtype=torch.bfloat16, channels_last=channels_last)
            vector, statistics, matrix = meta(c), meta(n, 32), meta(n, c)
            norm_impl._forward(x, 32, vector, vector, 1e-5, matrix, matrix, matrix, True)
            optional = (vector, vector, None, None, None)
            norm_impl._backward(x, x, 32, *optional, True, statistics, statistics)
        x = meta(8, 512, 64, 64, dtype=torch.float16)
        norm_impl._forward(x, 32, None, None, 1e-5, None, None, None, False)
        norm_impl._backward(x, x, 32, *[None] * 5, False, meta(8, 32), meta(8, 32))
    return launches


def attention_launches():
    """Each tiling: forward with the masks of odd sizes, which take registers, and the backward of a UNet."""

    def qkv(heads, positions, width, dtype):
        return meta(heads, positions, 3, 1, width, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)

    with recorded_launches() as launches:
        for heads in (1, 64):  # both ends of the tables
            for dtype in (torch.bfloat16, torch.float32):
                for odd, width in ((48, 64), (96, 128), (208, 256)):
                    attention_impl._forward(*qkv(heads, 196, odd, dtype), 0.1)
                    q, k, v = qkv(heads, 256, width, dtype)
                    attention_impl._backward(q, q, k, v, q, meta(heads, 1, 256), 0.1)
            attention_impl._forward(*qkv(heads, 256, 256, torch.float16), 0.1)
    return launches


def noise_launches():
    with recorded_launches() as launches:
        philox_impl._philox_normal(meta(8, dtype=torch.int64), 1, 2, 3072)
    return launches


def step_launches():
    ids, table, counter = (
        meta(8, dtype=torch.int64),
        meta(20, 12, dtype=torch.float64),
        meta(4, dtype=torch.int64),
    )
    x, learned = meta(8, 3, 32, 32), meta(8, 6, 32, 32, dtype=torch.float16)
    with recorded_launches() as launches:
        step_impl._reverse_step(x, x, None, None, x, table, counter, ids)
        step_impl._reverse_step(x, learned, learned, x, None, table, counter, ids)
        for dtype, channels_last in ((torch.bfloat16, True), (torch.float32, False)):
            both = meta(16, 3, 32, 32, dtype=dtype, channels_last=channels_last)
            cond, uncond = both.chunk(2)
            step_impl._reverse_step_(x, cond, uncond, x, None, table, counter, ids, both)
    return launches


LAUNCHES = [*noise_launches(), *step_launches(), *norm_launches(), *attention_launches()]


ONE_OF_EACH_KERNEL = list({launch.kernel: launch for launch in reversed(LAUNCHES)}.values())


@pytest.mark.parametrize("target", exhaustive_but(TARGETS, default=["sm_90"]))
@pytest.mark.parametrize(
    "launch", exhaustive_but(LAUNCHES, default=ONE_OF_EACH_KERNEL), ids=lambda launch: launch.name
)
def test_fits_the_device(launch, target, tmp_path, record_property):
    used = usage(launch.compile(TARGETS[target]), tmp_path)
    record_property("usage", str(used))
    assert used.shared <= SHARED_MEMORY[TARGETS[target].arch]
    assert used.registers <= 255
    if not launch.kernel.__name__.startswith("backward"):
        assert used.stack == 0, used


def test_every_kernel_and_tiling_is_compiled():
    kernels = {launch.kernel.__name__ for launch in LAUNCHES}
    assert kernels == {
        "philox_normal_kernel", "reverse_step_kernel",
        "forward_tile_kernel", "forward_partial_kernel", "forward_apply_kernel",
        "backward_tile_kernel", "backward_partial_kernel", "backward_apply_kernel",
        "forward_kernel", "delta_kernel", "backward_queries_kernel", "backward_keys_kernel",
    }  # fmt: skip
    tilings = {
        (constants.get("BLOCK_M"), constants.get("BLOCK_N"), options["num_warps"], options.get("num_stages"))
        for launch in LAUNCHES
        for constants, options in [(dict(launch.constants), dict(launch.options))]
    }
    for direction, tables in attention_impl._TILINGS.items():
        for rows, step, warps, stages in (tiling for table in tables.values() for tiling in table):
            assert (rows, step, warps, stages) in tilings, direction


@pytest.mark.parametrize("launch", [*noise_launches(), *step_launches()], ids=lambda launch: launch.name)
def test_noise_and_steps_are_the_operations_of_csrc(launch):
    """Correctly rounded roots, sums and products: nothing approximate, flushed to zero or contracted."""
    ptx = launch.compile(TARGETS["sm_80"]).asm["ptx"]
    names = r"\b(?:sqrt|rsqrt|rcp|div|fma|mad|mul|add|sub|lg2|ex2|sin|cos)\.[\w.]*f32"
    operations = set(re.findall(names, ptx))
    assert operations <= {"sqrt.rn.f32", "fma.rn.f32", "mul.rn.f32", "add.rn.f32", "sub.rn.f32"}


VECTORS = [
    launch
    for launch in LAUNCHES
    if launch.kernel.__name__ == "forward_tile_kernel" and dict(launch.constants).get("GROUP_SIZE") == 4
]


@pytest.mark.parametrize("index", exhaustive_but(range(len(VECTORS)), default=[0]))
def test_memory_is_read_and_written_in_whole_vectors(index):
    ptx = VECTORS[index].compile(TARGETS["sm_90"]).asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx


@pytest.mark.parametrize("index", [0, 2, -1], ids=lambda i: LAUNCHES[i].kernel.__name__)
def test_compiles_for_amd(index):
    assert LAUNCHES[index].compile(GPUTarget("hip", "gfx942", 64)).asm["amdgcn"]
