"""The conditions of the figures: the device, its clocks, and the versions of all packages."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess

import torch

from .part import Job, Run

PACKAGES = ("torch", "triton", "diffusers", "numpy", "pytest", "pytest-xdist")
QUERY = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,clocks.max.sm,power.limit"


def jobs(run: Run) -> list[Job]:
    return [("host", lambda: host(run)), ("device", lambda: device(run))]


def host(run: Run) -> None:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    run.record(
        python=platform.python_version(),
        libc=" ".join(platform.libc_ver()),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        versions=versions,
        sanitizer=shutil.which("compute-sanitizer"),
        nvcc=shutil.which("nvcc"),
    )


def device(run: Run) -> None:
    if not run.dry_run and not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device")
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    reported = None
    if shutil.which(command[0]):
        result = subprocess.run(command, capture_output=True, text=True, timeout=15)
        reported = result.stdout.strip() or result.stderr.strip()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    run.record(
        device=properties.name,
        processors=properties.multi_processor_count,
        capability=[properties.major, properties.minor],
        memory=properties.total_memory,
        cache=properties.L2_cache_size,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        convolutions_in_tf32=torch.backends.cudnn.allow_tf32,
        nvidia_smi=reported,
    )
