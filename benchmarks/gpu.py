"""The ops on a CUDA device: time of each backend beside PyTorch's own, and share of the device's limits.

Run by benchmarks/gpu.sh. A backend whose output is wrong is not timed. Prints a short table and writes JSON.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from diffusion.kernels import build_info, group_norm_silu, reverse_step
from diffusion.kernels.attention import op as attention_op
from diffusion.kernels.group_norm_silu import op as norm_op
from diffusion.kernels.reverse_step import op as step_op
from diffusion.kernels.reverse_step.cases import EPSILON
from triton.testing import do_bench, do_bench_cudagraph

NORM_SHAPES = [(128, 32), (256, 16), (256, 8), (256, 4), (512, 16), (192, 64), (576, 16)]  # channels, side
ATTENTION_SHAPES = [(1, 256, 256), (1, 64, 256), (4, 256, 64), (8, 1024, 64), (1, 49, 96)]  # heads, S, D
BATCHES = (1, 16, 128, 512)


def seconds(run: Callable[[], object]) -> float:
    """Median device time of one call, in a CUDA graph, where launches cost what they cost a sampler."""
    try:
        return do_bench_cudagraph(run, rep=20, return_mode="median") * 1e-3
    except RuntimeError:  # what cannot be captured
        return do_bench(run, warmup=10, rep=30, return_mode="median") * 1e-3


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds(lambda: y.copy_(x))


def compare(op, backends, call, peer, truth, bytes_moved, bandwidth) -> dict:
    """Microseconds of each backend that serves and is right, and of the peer."""
    args, kwargs = call
    row = {"peer_us": 1e6 * seconds(peer)}
    scale = truth.abs().max().item()
    allowed = 2 * (peer().double() - truth).abs().max().item() + 8 * torch.finfo(args[0].dtype).eps * scale
    for backend in backends:
        try:
            chosen = op.choose(backend, *args, **kwargs)
        except ValueError as error:
            row[backend] = {"reason": str(error)}
            continue
        out = op.backends[chosen].run(*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        error = (out.double() - truth).abs().max().item()
        if not error <= allowed:
            row[backend] = {"reason": f"wrong: error {error:.3g}, {allowed:.3g} allowed"}
            continue
        time = seconds(lambda chosen=chosen: op.backends[chosen].run(*args, **kwargs))
        row[backend] = {
            "us": 1e6 * time,
            "ratio": row["peer_us"] * 1e-6 / time,
            "share": bytes_moved / time / bandwidth,
        }
    return row


def norms(bandwidth: float) -> list[dict]:
    rows = []
    for channels, side in NORM_SHAPES:
        for batch in BATCHES:
            for dtype in (torch.bfloat16, torch.float32):
                if batch * channels * side * side * 4 > 4 << 30:
                    continue
                x = torch.randn(batch, channels, side, side, device="cuda", dtype=dtype)
                x = x.contiguous(memory_format=torch.channels_last)
                w, b = (torch.randn(channels, device="cuda", dtype=dtype) for _ in range(2))
                row = compare(
                    norm_op,
                    ("cuda", "triton"),
                    ((x, 32, w, b, 1e-5), {}),
                    lambda x=x, w=w, b=b: F.silu(F.group_norm(x, 32, w, b)),
                    group_norm_silu(x.double(), 32, w.double(), b.double(), backend="reference"),
                    2 * x.nbytes,
                    bandwidth,
                )
                rows.append({"op": "group_norm_silu", "shape": list(x.shape), "dtype": str(dtype)[6:], **row})
    return rows


def attentions(bandwidth: float) -> list[dict]:
    rows = []
    for heads, positions, width in ATTENTION_SHAPES:
        for batch in BATCHES:
            for dtype in (torch.bfloat16, torch.float32):
                qkv = torch.randn(batch, positions, 3, heads, width, device="cuda", dtype=dtype)
                q, k, v = qkv.permute(2, 0, 3, 1, 4)
                truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
                row = compare(
                    attention_op,
                    ("cuda", "triton"),
                    ((q, k, v), {}),
                    lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
                    truth,
                    4 * q.nbytes,
                    bandwidth,
                )
                rows.append({"op": "attention", "shape": list(q.shape), "dtype": str(dtype)[6:], **row})
    return rows


def steps(bandwidth: float) -> list[dict]:
    rows = []
    for batch in BATCHES:
        shape = (batch, 3, 32, 32)
        x = torch.randn(shape, device="cuda")
        both = torch.randn(2 * batch, *shape[1:], device="cuda", dtype=torch.bfloat16)
        noise = torch.randn(shape, device="cuda")
        cond, uncond = both.chunk(2)
        row = EPSILON._replace(guidance_scale=3.0)
        arguments = {"model_output_uncond": uncond, "noise": noise}

        def eager(cond=cond, uncond=uncond, x=x, noise=noise, row=row):
            out = uncond.float() + row.guidance_scale * (cond.float() - uncond.float())
            x0 = (row.p_x * x + row.p_o * out).clamp(-1, 1)
            return row.a * x + row.b * x0 + row.s * noise

        truth = reverse_step(
            x.double(),
            cond.double(),
            row,
            model_output_uncond=uncond.double(),
            noise=noise.double(),
            backend="reference",
        )[0]
        options = {"x0_prev": None, "seed": 0, "sample_ids": None, "stream": 0}
        measured = compare(
            step_op,
            ("cuda", "triton"),
            ((x, cond, row), arguments | options),
            eager,
            truth,
            14 * x.numel(),
            bandwidth,
        )
        rows.append({"op": "reverse_step", "shape": list(shape), "dtype": "bfloat16", **measured})
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'op':16} {'shape':22} {'dtype':9} {'peer us':>9} {'cuda':>28} {'triton':>28}"]
    for row in rows:
        cells = []
        for backend in ("cuda", "triton"):
            cell = row[backend]
            if "us" in cell:
                cells.append(f"{cell['us']:9.1f} us {cell['ratio']:5.2f}x {cell['share']:6.1%}")
            else:
                cells.append(cell["reason"][-28:])
        shape = "x".join(map(str, row["shape"]))
        lines.append(
            f"{row['op']:16} {shape:22} {row['dtype']:9} {row['peer_us']:9.1f} {cells[0]:>28} {cells[1]:>28}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    bandwidth = statistics.median(copy_bandwidth() for _ in range(3))
    rows = [*steps(bandwidth), *norms(bandwidth), *attentions(bandwidth)]
    device = torch.cuda.get_device_name()
    result = {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "build": build_info(),
        "copy_bandwidth": bandwidth,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    name = device.lower().replace(" ", "-") + ".json"
    (args.out / name).write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    print(
        f"{device}, torch {torch.__version__}, triton {triton.__version__}; copy {bandwidth / 1e12:.2f} TB/s"
    )


if __name__ == "__main__":
    main()
