"""The choice of a backend: no backend is skipped without a reason."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from diffusion.kernels import (
    StepCoefficients,
    _limits,
    _native,
    build_info,
    explain,
    philox_normal,
    reverse_step,
)
from diffusion.kernels._dispatch import Backend, Op, always
from diffusion.kernels.ops.group_norm_silu import op as group_norm_silu_op
from diffusion.kernels.ops.group_norm_silu.arguments import Arguments
from diffusion.kernels.ops.reverse_step.cases import CASES
from helpers.native import requires_native
from helpers.processes import start_python

ON_EVEN = Backend(lambda n: f"even {n}", lambda n: None if n % 2 == 0 else f"{n} is odd")
ON_ALL = Backend(lambda n: f"any {n}", always)


def refuse_negative(n):
    if n < 0:
        raise ValueError(f"n is {n}, not at least 0")


OP = Op("toy", {"even": ON_EVEN, "any": ON_ALL}, refuse_negative)


def test_auto_takes_the_first_backend_that_serves():
    assert OP(4) == "even 4"
    assert OP(3) == "any 3"


def test_an_explicit_backend_runs_or_says_why_not():
    assert OP(4, backend="any") == "any 4"
    with pytest.raises(ValueError, match="toy: backend 'even' cannot serve this call: 3 is odd"):
        OP(3, backend="even")
    with pytest.raises(ValueError, match="toy has no backend 'odd'; choose from: auto, even, any"):
        OP(3, backend="odd")
    with pytest.raises(ValueError, match=r"toy has no backend \[\]; choose from: auto, even, any"):
        OP(3, backend=[])


def test_validation_comes_before_the_choice():
    for backend in ("auto", "even", "nonsense"):
        with pytest.raises(ValueError, match="n is -1, not at least 0"):
            OP(-1, backend=backend)


def test_explain_names_the_choice_and_the_reasons():
    assert OP.explain(3) == "toy: any\n  not even: 3 is odd"
    assert OP.explain(4) == "toy: even\n  not any: available; 'even' is preferred"
    assert OP.explain(4, backend="any") == "toy: any\n  not even: available; 'any' is preferred"


def test_auto_passes_over_a_slower_backend_and_says_why():
    slow_below_ten = ON_EVEN._replace(slower=lambda n: f"{n} is below ten" if n < 10 else None)
    op = Op("toy", {"even": slow_below_ten, "any": ON_ALL})
    assert (op(12), op(4), op(4, backend="even")) == ("even 12", "any 4", "even 4")
    assert op.explain(4) == "toy: any\n  not even: 4 is below ten"
    assert op.explain(3) == "toy: any\n  not even: 3 is odd"


def test_explain_tells_in_which_manner_the_choice_would_serve():
    op = Op("toy", {"even": ON_EVEN._replace(manner=lambda n: f"in {n} halves"), "any": ON_ALL})
    assert op.explain(4) == "toy: even, in 4 halves\n  not any: available; 'even' is preferred"
    assert op.explain(3) == "toy: any\n  not even: 3 is odd"


def test_explain_takes_the_public_functions_arguments():
    args, kwargs = CASES["mnist"].inputs()
    expected = explain("reverse_step", *args, **kwargs)
    assert explain(reverse_step, *args, **kwargs) == expected
    assert explain(philox_normal, (2, 3), seed=1, backend="reference").startswith("philox_normal: reference")
    assert "not cuda: it runs on CUDA devices, not on cpu" in expected
    with pytest.raises(ValueError, match="unknown op 'softmax'; choose from: attention"):
        explain("softmax", torch.ones(2))
    with pytest.raises(ValueError, match="runs on CUDA devices"):
        explain(reverse_step, *args, backend="cuda", **kwargs)


def has_compiler() -> bool:
    return any(map(shutil.which, [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]))


@pytest.mark.skipif(os.environ.get("DIFFUSION_NO_NATIVE") == "1", reason="DIFFUSION_NO_NATIVE=1")
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_the_cpp_library_is_loaded_where_there_is_a_compiler():
    """Without this test, all tests of the library could be skipped unnoticed."""
    assert _native.CPP_MISSING is None
    assert explain(philox_normal, (2, 3), seed=1).startswith("philox_normal: cpp")


def test_build_info_says_what_is_there():
    info = build_info()
    assert info["cpp"] == (_native.CPP_MISSING or "loaded")
    assert info["cuda"] == (_native.CUDA_MISSING or "loaded")
    assert all(isinstance(value, str) and "\n" not in value for value in info.values())
    if _native.CPP_MISSING is None:
        assert info["simd"] == info["simd variants"].split(", ")[-1]


def test_a_broken_library_gives_a_reason(tmp_path):
    path = tmp_path / _native.CPP_FILE
    library, reason = _native._load_cpp(path)
    assert library is None
    assert reason.startswith("the cpp library was not built")
    path.write_bytes(b"not a library" * 100)
    library, reason = _native._load_cpp(path)
    assert library is None
    assert reason.startswith("the cpp library cannot be loaded")
    assert "\n" not in reason


def load_in_a_process(*paths: Path) -> list[str]:
    """Why each file cannot be the C++ library. A crash ends that process alone."""
    code = "import pathlib; from diffusion.kernels import _native; "
    code += "".join(f"print(_native._load_cpp(pathlib.Path({str(path)!r}))[1]); " for path in paths)
    done = run_capped("", code)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_library_that_is_no_such_module_gives_a_reason(tmp_path):
    """Any other shared library, such as that of an older version, which no Python could import."""
    path = tmp_path / _native.CPP_FILE
    shutil.copy(torch._C.__file__, path)
    (reason,) = load_in_a_process(path)
    assert reason.startswith("the cpp library cannot be loaded: ")
    assert "PyInit__cpp" in reason


def test_a_library_for_another_python_gives_a_reason(tmp_path):
    """The file's name tells, so that it is never loaded."""
    (tmp_path / "_cpp.cpython-37m-x86_64-linux-gnu.so").write_bytes(b"for Python 3.7")
    library, reason = _native._load_cpp(tmp_path / _native.CPP_FILE)
    assert library is None
    wanted = (
        f"_cpp.cpython-37m-x86_64-linux-gnu.so, and this Python needs {_native.CPP_FILE}; run: pip install ."
    )
    if "reason" not in _native._record.get("cpp", {}):
        assert reason == f"the cpp library is {wanted}"


@requires_native
@pytest.mark.skipif(sys.platform != "linux", reason="is about ELF files")
def test_a_library_that_is_cut_short_gives_a_reason(tmp_path):
    whole, paths = (_native.FOLDER / _native.CPP_FILE).read_bytes(), []
    for share in (0.01, 0.3, 0.9, 0.9999):
        paths.append(tmp_path / str(share) / _native.CPP_FILE)
        paths[-1].parent.mkdir()
        paths[-1].write_bytes(whole[: int(share * len(whole))])
    for path, reason in zip(paths, load_in_a_process(*paths), strict=True):
        assert reason.startswith(f"the cpp library is damaged: {path} is cut short")


@requires_native
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda patch: patch.setattr(_limits, "PANEL", 32),
            "the cpp library is not of this version: its PANEL is 64, not 32",
        ),
        (
            lambda patch: patch.delattr(_limits, "ZERO"),
            "the cpp library is not of this version: its ZERO is 96, not None",
        ),
        (
            lambda patch: patch.setattr(_native, "_PARTS", (*_native._PARTS, "tea")),
            "the cpp library is not of this version: it has no tea",
        ),
        (
            lambda patch: patch.setitem(_native._record, "sources", ""),
            "the cpp library was built from other sources than _build.json says",
        ),
    ],
    ids=["another limit", "no limit", "no part", "other sources"],
)
def test_a_library_that_python_does_not_agree_with_gives_a_reason(change, reason, monkeypatch):
    change(monkeypatch)
    library, found = _native._load_cpp(_native.FOLDER / _native.CPP_FILE)
    assert library is None
    assert found.startswith(reason)


@requires_native
def test_python_and_the_library_agree():
    """Python and the library agree on all limits and instruction sets; the module says how it was built."""
    module = _native.library()
    limits = {name: value for name, value in vars(_limits).items() if name.isupper()}
    assert limits == module.LIMITS
    assert len(StepCoefficients._fields) == _limits.ROW_LENGTH
    assert _native.VARIANTS == module.SIMD_VARIANTS
    assert module.BUILD["python"].rpartition(".")[0] == "{}.{}".format(*sys.version_info)
    assert set(module.BUILD) == {"compiler", "python", "pybind11", "version", "sources"}
    with pytest.raises(ValueError, match="this processor has no mmx"):
        module.use_simd("mmx")


@requires_native
def test_the_module_is_loaded_once():
    """Loaded again it is the same module, and no kernel is registered twice, of which PyTorch would warn."""
    code = """if True:
        from diffusion.kernels import _native, philox_normal
        import diffusion.kernels._cpp as imported
        again, reason = _native._load_cpp(_native.FOLDER / _native.CPP_FILE)
        assert reason is None and imported is _native.library()
        assert again.RecordedCalls is imported.RecordedCalls
        print(philox_normal((2, 3), seed=0, backend="cpp").shape)
    """
    done = run_capped("", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "torch.Size([2, 3])\n", "")


def test_instruction_sets_can_be_chosen_by_name():
    if _native.CPP_MISSING is None:
        for variant in (*_native.simd_variants(), "best"):
            _native.use_simd(variant)
            assert build_info()["simd"] == (_native.simd_variants()[-1] if variant == "best" else variant)
    with pytest.raises(ValueError, match=r"no instruction set|has no 'mmx'"):
        _native.use_simd("mmx")


def run_capped(cap: str, code: str) -> subprocess.CompletedProcess:
    """Runs code with a cap, in a process of its own."""
    environment = os.environ | {"DIFFUSION_SIMD": cap, "OMP_NUM_THREADS": "1"}
    process = start_python(code, environment=environment)
    outputs = process.communicate()
    return subprocess.CompletedProcess([code], process.returncode, *outputs)


@requires_native
@pytest.mark.parametrize("cap", ["baseline", pytest.param("avx2", marks=pytest.mark.exhaustive), "amx"])
def test_the_environment_caps_the_instruction_sets(cap):
    """The cap adds nothing that the processor lacks; choices in Python are capped, too."""
    code = """if True:
        import json, torch
        from diffusion.cli.train import choose_autocast
        from diffusion.utils.device import multiplies_bfloat16
        from diffusion.kernels import _native, build_info, pack_conv3x3
        cpu = torch.device("cpu")
        packing = pack_conv3x3(torch.ones(16, 16, 3, 3), 8, 8, torch.bfloat16).packing
        try:
            _native.use_simd("amx")
        except ValueError as error:
            refusal = str(error)
        else:
            refusal = None
        print(json.dumps([build_info(), packing, multiplies_bfloat16(cpu), str(choose_autocast("auto", cpu)),
                          refusal]))
    """
    done = run_capped(cap, code)
    assert done.returncode == 0, done.stderr
    info, (_, pairs, parts, panel), multiplies, autocast, refusal = json.loads(done.stdout)
    own = _native.VARIANTS[: _native.VARIANTS.index(_native.library().best_simd()) + 1]
    best = cap if cap in own else own[-1]
    assert info["simd"] == best
    assert info["simd variants"] == ", ".join(own[: own.index(best) + 1])
    assert info["simd cap"].startswith(f"DIFFUSION_SIMD={cap}")
    assert ("lacks" in info["simd cap"]) == (cap not in own)
    assert multiplies == (best in ("avx512_bf16", "amx"))
    assert parts == (best == "amx")
    assert pairs == (best == "avx512_bf16")
    assert panel == (16 if best in ("baseline", "avx2") else 64)
    if cap != "amx":
        assert autocast == "None"
        assert refusal.startswith(f"DIFFUSION_SIMD={cap} allows no 'amx'")
    elif best != "amx":
        assert refusal.startswith("this processor has no 'amx'")
    else:
        assert refusal is None


def test_an_unknown_cap_is_one_line():
    code = """if True:
        import sys
        from diffusion.cli import main
        from diffusion.kernels import philox_normal
        try:
            philox_normal((2,), seed=0)
        except ValueError as error:
            print(error)
        main(["info"])
    """
    done = run_capped("mmx", code)
    choices = "baseline, avx2, avx512, avx512_bf16, amx"
    assert done.returncode == 2
    assert done.stdout == f"DIFFUSION_SIMD is 'mmx'; choose from: {choices}\n"
    assert done.stderr == f"diffusion: {done.stdout}"


def test_plain_pytorch_runs_where_its_functions_are_watched(monkeypatch):
    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    chosen = group_norm_silu_op.choose(Arguments(x, 2))
    with Watch():
        assert group_norm_silu_op.choose(Arguments(x, 2)) == "reference"
        assert "Watch is active, a TorchFunctionMode" in group_norm_silu_op.explain(Arguments(x, 2))
        if chosen != "reference":  # who asks for a backend gets it
            assert group_norm_silu_op.choose(Arguments(x, 2), chosen) == chosen
    with torch.device("cpu"):
        assert group_norm_silu_op.choose(Arguments(x, 2)) == chosen
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x: x)
    assert group_norm_silu_op.choose(Arguments(x, 2)) == "reference"
    assert "torch.nn.functional.silu was replaced" in group_norm_silu_op.explain(Arguments(x, 2))
