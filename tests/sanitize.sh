#!/usr/bin/env bash
# The tests of the C++ ops under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the repository.
# Any finding ends the run. Arguments go to pytest, instead of all tests of the ops.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work"
cd "$work"

# Checks of each pointer are left to AddressSanitizer: with them, or with setup.py's -O3, the kernels take an hour to
# compile. The flags come last, behind setup.py's own.
flags="-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
flags+=" -fno-sanitize=null,alignment,object-size,pointer-overflow,vptr"
printf '#!/bin/sh\nexec %s "$@" %s\n' "${CXX:-g++}" "$flags" >compiler
chmod +x compiler
DIFFUSION_NO_CUDA=1 CXX=$work/compiler python3 setup.py build_ext --inplace >build.log 2>&1 || { tail build.log; exit 1; }
compgen -G 'kernels/_cpp.*.so' >build.so || { tail build.log; exit 1; }
if [ $# = 0 ]; then
    set -- tests/kernels/ops tests/kernels/test_recorded_calls.py tests/inference/test_cpu_plan.py
    # AddressSanitizer ends a process whose address space is limited.
    set -- "$@" -k "not compile and not opcheck and not without_memory"
fi
export PYTHONPATH=$work LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
python3 -m pytest -q -p no:cacheprovider "$@"
