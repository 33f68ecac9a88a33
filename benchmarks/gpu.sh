#!/usr/bin/env bash
# Builds in place without network, tests the ops on this machine's GPU, times them, and prints a table last.
# Needs torch 2.11, Triton 3.6, CUDA 13.0 or newer; takes less than nine minutes. OUT: where results go.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
mkdir -p "$out"
export PYTHONPATH=$PWD

python3 setup.py build_ext --inplace >"$out/build.log" 2>&1 || { tail -20 "$out/build.log"; exit 1; }
python3 -m diffusion info
timeout 180 python3 -m pytest -q --maxfail=20 tests/test_gpu.py >"$out/tests.log" 2>&1
echo "GPU tests: $(tail -1 "$out/tests.log")"
grep -E "^(FAILED|ERROR)" "$out/tests.log" | head -20
if command -v compute-sanitizer >/dev/null; then
    timeout 60 compute-sanitizer --error-exitcode 9 python3 -m pytest -q tests/test_gpu.py -k "captured or normals" \
        >"$out/sanitizer.log" 2>&1
    echo "compute-sanitizer: status $?, $(tail -1 "$out/sanitizer.log")"
fi
timeout 150 python3 benchmarks/gpu.py --out "$out"
if python3 -c "import diffusers" 2>/dev/null; then
    timeout 150 python3 -m benchmarks.sampling --device cuda --models cifar10 --growth --seconds 4 --out "$out"
fi
