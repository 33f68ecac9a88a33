#!/usr/bin/env bash
# Tests and times everything on this machine's GPU, without network, in at most 520 seconds; prints a summary last.
# Needs torch 2.10 or newer and, unless kernels/ has libraries built from these sources elsewhere, CUDA 13.0 or newer.
# Results go to $OUT or ./gpu-results: gpu.jsonl, gpu.log, summary.txt. Options: bash benchmarks/gpu.sh --help
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
