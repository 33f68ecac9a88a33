"""The contents of an installation, with a compiler and without one.

The default run asks setup.py alone; `-m slow` builds from a source distribution, compiles and installs.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

from diffusion.kernels import _native
from helpers.cuda_on_host import CXX, requires_compiler
from helpers.native import requires_native
from helpers.paths import ROOT
from helpers.thinning import exhaustive_but

TREE = ["csrc", "diffusion", "kernels", "tests", "setup.py", "pyproject.toml", "MANIFEST.in"]
TREE += ["README.md", "LICENSE.txt", "NOTICE.md"]
SETTINGS = ("DIFFUSION_NO_NATIVE", "DIFFUSION_NO_CUDA", "CXX", "CXXFLAGS", "PYTHONPATH")


def run(command, folder, **settings) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | settings
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution of a tree that also holds what a build leaves behind."""
    tree = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "_build.json")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=ignore)
        else:
            shutil.copy(source, tree / name)
    for name in (_native.CPP_FILE, "_build.json"):
        (tree / "kernels" / name).write_text("left behind")
    run([sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')"], tree)
    return next(tree.glob("dist/*.tar.gz"))


def build_wheel(sdist: Path, folder: Path, **settings) -> tuple[Path, str]:
    """The wheel built from the source distribution alone, and what pip printed."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    output = run([*command, "--wheel-dir", str(folder), str(sdist)], folder, **settings)
    return next(folder.glob("*.whl")), output


def unpacked(sdist: Path, folder: Path) -> Path:
    """The tree of the source distribution, with the objects that an earlier build of the sources left."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    tree = next(path for path in folder.iterdir() if path.is_dir())
    if (ROOT / "build" / "objects").is_dir():
        shutil.copytree(ROOT / "build" / "objects", tree / "build" / "objects")
    return tree


@pytest.mark.slow
def test_sdist_holds_the_sources_and_nothing_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    weights = "diffusion/weights/**/*.safetensors"
    for pattern in ("csrc/**/*.*", "kernels/**/*.py", "diffusion/**/*.py", weights):
        expected = {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)}
        assert expected <= names
    assert not [name for name in names if name.endswith((".so", "_build.json"))]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        pytest.param(
            *(dict(DIFFUSION_NO_NATIVE="1"), "DIFFUSION_NO_NATIVE=1 was set"),
            **{"id": "asked_for", "marks": pytest.mark.exhaustive},
        ),
        pytest.param(
            *(dict(CXX="/nonexistent/g++"), "there is no C++ compiler /nonexistent/g++"),
            **{"id": "no_compiler", "marks": pytest.mark.slow},
        ),
        pytest.param(
            *(dict(CXX=f"{sys.executable} -c raise(SystemExit(1))"), "failed: status 1"),
            **{"id": "compiler_fails", "marks": pytest.mark.exhaustive},
        ),
        pytest.param(
            *(dict(PYTHONPATH="without"), "there is no pybind11 to build with; run: pip install pybind11"),
            **{"id": "no_pybind11", "marks": pytest.mark.exhaustive},
        ),
        pytest.param(
            *(dict(PYTHONPATH="old"), "pybind11 2.13.6 is too old; run: pip install -U pybind11"),
            **{"id": "old_pybind11", "marks": pytest.mark.exhaustive},
        ),
    ],
)
def test_pure_python_wheel(sdist, tmp_path, settings, reason):
    if "PYTHONPATH" in settings:  # a pybind11 before the installed one
        folder = tmp_path / settings["PYTHONPATH"]
        folder.mkdir()
        old = "version_info, __version__ = (2, 13, 6), '2.13.6'"
        (folder / "pybind11.py").write_text(old if folder.name == "old" else "raise ImportError")
        settings = {"PYTHONPATH": str(folder)}
    wheel, output = build_wheel(sdist, tmp_path, **settings)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert output.count("fused-diffusion: installing pure Python: ") == 1
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"diffusion", "fused_diffusion"}
    for folder, package in (("diffusion", "diffusion"), ("kernels", "diffusion/kernels")):
        modules = {f"{package}/{p.relative_to(ROOT / folder)}" for p in ROOT.glob(f"{folder}/**/*.py")}
        assert modules <= set(names)
    weights = [
        p for p in ROOT.glob("diffusion/weights/**/*") if p.suffix in (".json", ".safetensors", ".npz")
    ]
    assert {str(p.relative_to(ROOT)) for p in weights} <= set(names)
    assert not [name for name in names if name.endswith(".so")]

    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "from diffusion import kernels as k; print(k.build_info()); print(k.philox_normal((1, 1), seed=0))"
    )
    said = run([sys.executable, "-c", program], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert "the cpp library was not built: " in said
    assert reason in said
    assert "tensor([[" in said


@pytest.mark.slow
def test_pytorch_is_fetched_to_build_with_where_there_is_none(sdist, tmp_path):
    """By an environment of setuptools alone; none is fetched without a compiler, or beside a PyTorch."""
    tree = unpacked(sdist, tmp_path)
    packages = tmp_path / "packages"
    packages.mkdir()
    for pattern in ("setuptools*", "_distutils_hack"):
        for path in Path(setuptools.__file__).parents[1].glob(pattern):
            (packages / path.name).symlink_to(path)
    venv.create(tmp_path / "venv")
    python = str(tmp_path / "venv/bin/python")
    program = "from setuptools.build_meta import get_requires_for_build_wheel as ask; print(*ask())"

    def asked(**settings) -> str:
        return run([python, "-c", program], tree, PYTHONPATH=str(packages), **settings).splitlines()[-1]

    assert asked(CXX=sys.executable) == "torch>=2.10"
    assert "torch" not in asked(DIFFUSION_NO_NATIVE="1")
    (packages / "torch").symlink_to(Path(torch.__file__).parent)
    assert "torch" not in asked(CXX=sys.executable)


@pytest.fixture
def compile_source(tmp_path, monkeypatch):
    """setup.py's function of that name, with a compiler that counts its calls; and that count."""
    monkeypatch.chdir(ROOT)
    with monkeypatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **options: None)
        function = runpy.run_path("setup.py")["compile_source"]
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(f'#!/bin/sh\necho called >>{calls}\nexec {CXX} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return (
        lambda *options: function([str(compiler), *options], "a.cpp", tmp_path / "a.cpp.o"),
        lambda: len(calls.read_text().splitlines()),
    )


@requires_compiler
def test_a_source_is_compiled_again_where_what_it_is_made_of_has_changed(compile_source, tmp_path):
    compile_again, count = compile_source
    header = tmp_path / "a header.h"
    header.write_text("inline int one() { return 1; }\n")
    (tmp_path / "a.cpp").write_text('#include "a header.h"\nint two() { return one() + one(); }\n')
    compile_again()
    (tmp_path / "a.cpp").touch()
    compile_again()
    assert count() == 1
    times = header.stat()
    header.write_text("inline int one() { return 3 - 2; }\n")
    os.utime(header, ns=(times.st_atime_ns, times.st_mtime_ns))  # a copy of files may keep old times
    compile_again()
    assert count() == 2
    compile_again("-O2")
    assert count() == 3
    (tmp_path / "a.cpp.o").unlink()
    compile_again("-O2")
    assert count() == 4
    header.unlink()
    with pytest.raises(Exception, match="failed"):
        compile_again("-O2")
    assert not (tmp_path / "a.cpp.sha256").exists()


@requires_native
def test_the_cpp_library_depends_on_no_library_of_python():
    """The file's tag names the Python. It needs neither libpython nor PyTorch's bindings or unstable C++."""
    binary = (_native.FOLDER / _native.CPP_FILE).read_bytes()
    assert b"PyInit__cpp" in binary
    for symbol in (b"libpython", b"libtorch_python", b"_ZN2at6"):
        assert symbol not in binary


@pytest.mark.skipif(not (_native.FOLDER / "_cuda.so").exists(), reason="there is no CUDA library")
def test_the_cuda_library_knows_no_python():
    binary = (_native.FOLDER / "_cuda.so").read_bytes()
    for symbol in (b"_Py_", b"PyObject", b"libpython", b"libtorch_python", b"_ZN2at6"):
        assert symbol not in binary


COMPILER = """#!/bin/bash
# Tells what it compiles, makes empty files, and fails where it is told to.
compiles=
while [ $# -gt 0 ]; do
  case $1 in -o) out=$2;; -c) compiles=$2;; -MF) echo "x: setup.py" > "$2";; esac
  shift
done
echo "$compiles" >> {log}
{then}
: > "$out"
"""


@pytest.mark.parametrize("fails", exhaustive_but(["neither", "cpp", "cuda"], default=["neither", "cpp"]))
def test_both_libraries_are_compiled_at_once(fails, sdist, tmp_path):
    """The C++ library's sources begin first; without it, there is no CUDA library."""
    tree, log = unpacked(sdist, tmp_path), tmp_path / "log"
    shutil.rmtree(tree / "build", ignore_errors=True)
    for name, path in (("cpp", "cc"), ("cuda", "cuda/bin/nvcc")):
        program = tmp_path / path
        program.parent.mkdir(parents=True, exist_ok=True)
        then = "echo 'error: no' >&2; exit 1" if name == fails else ""
        program.write_text(COMPILER.format(log=log, then=then))
        program.chmod(0o755)
    settings = {"CXX": str(tmp_path / "cc"), "CUDA_HOME": str(tmp_path / "cuda")}
    run([sys.executable, "setup.py", "build_ext", "--build-lib", "built"], tree, **settings)
    built = tree / "built" / "diffusion" / "kernels"
    record = json.loads((built / "_build.json").read_text())
    names = {"cpp": _native.CPP_FILE, "cuda": "_cuda.so"}
    left_out = {"neither": (), "cpp": ("cpp", "cuda"), "cuda": ("cuda",)}[fails]
    for name, file in names.items():
        assert (built / file).exists() == (name not in left_out)
        assert ("failed: error: no" in record[name].get("reason", "")) == (name in left_out)
    if fails == "neither":
        sources = log.read_text().split()
        assert len(sources) == len(set(sources)) == len(list(ROOT.glob("csrc/*/*.c*")))
        assert sources[0].endswith(".cpp")
        assert record["cuda"]["archs"] == "sm_80 sm_90 compute_80 sm_90a"


@pytest.mark.slow
def test_native_wheel(sdist, tmp_path):
    wheel, _ = build_wheel(sdist, tmp_path)
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert f"-{tag}-{tag}-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    archive = zipfile.ZipFile(wheel)
    record = json.loads(archive.read("diffusion/kernels/_build.json"))
    assert "reason" not in record["cpp"]
    assert f"diffusion/kernels/{_native.CPP_FILE}" in archive.namelist()
    assert "diffusion/kernels/_cpp.pyi" in archive.namelist()
    assert ("diffusion/kernels/_cuda.so" in archive.namelist()) == ("archs" in record["cuda"])
    archive.extractall(tmp_path / "site")
    program = "from diffusion import kernels; print(kernels.explain('philox_normal', (2, 3), seed=0))"
    assert "philox_normal: cpp" in run(
        [sys.executable, "-c", program], tmp_path, PYTHONPATH=str(tmp_path / "site")
    )


def show_packages_around(folder: Path, site: str) -> None:
    """Lets an environment see this one's packages, without the fused-diffusion that may be among them."""
    folder.mkdir()
    for path in Path(torch.__file__).parents[1].iterdir():
        if path.name.partition("-")[0] not in (
            "diffusion",
            "fused_diffusion",
            "__editable__.fused_diffusion",
        ):
            (folder / path.name).symlink_to(path)
    Path(site, "around.pth").write_text(str(folder))


@pytest.mark.slow
def test_editable_installation(sdist, tmp_path):
    tree = unpacked(sdist, tmp_path)
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv/bin/python")
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip()
    show_packages_around(tmp_path / "around", site)
    run([python, "-m", "pip", "uninstall", "-q", "-y", "setuptools"], tmp_path)  # the outer one is newer
    install = [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--editable", str(tree)]
    run(install, tmp_path, DIFFUSION_NO_CUDA="1")
    program = (
        "from diffusion import kernels as k; print(k.__file__, k.explain('philox_normal', (2, 3), seed=0))"
    )
    said = run([python, "-c", program], tmp_path)
    assert str(tree / "kernels" / "__init__.py") in said
    assert "philox_normal: cpp" in said
    assert (tree / "kernels" / _native.CPP_FILE).exists()
    run(install, tmp_path, DIFFUSION_NO_NATIVE="1")
    assert not (tree / "kernels" / _native.CPP_FILE).exists()
    assert "philox_normal: reference" in run([python, "-c", program], tmp_path)


def other_python() -> str | None:
    """An interpreter of another version that has its headers, on PATH or from pyenv; the newest."""
    found = [shutil.which(f"python3.{minor}") for minor in range(15, 9, -1)]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found += sorted(pyenv.glob("versions/3.1[0-5].*/bin/python3"), reverse=True)
    ask = "import sys, sysconfig; print(sys.version_info[1], sysconfig.get_path('include') + '/Python.h')"
    for python in filter(None, found):
        said = subprocess.run([python, "-c", ask], capture_output=True, text=True).stdout.split(maxsplit=1)
        if len(said) == 2 and int(said[0]) != sys.version_info[1] and Path(said[1].strip()).exists():
            return str(python)
    return None


@pytest.mark.slow
@requires_native
def test_a_wheel_for_another_python(sdist, tmp_path):
    """Built by another Python with the headers of this one's PyTorch. There it loads, and here not."""
    python = other_python()
    if python is None:
        pytest.skip("there is no other Python with headers")
    outer = str(Path(torch.__file__).parents[1])  # pip, setuptools and pybind11 are the same for every Python
    command = [
        python,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
    ]
    tree = unpacked(sdist, tmp_path)
    run([*command, str(tree)], tmp_path, PYTHONPATH=outer, DIFFUSION_NO_CUDA="1")
    wheel = next(tmp_path.glob("*.whl"))
    minor = run([python, "-c", "import sys; print(sys.version_info[1])"], tmp_path).strip()
    assert f"-cp3{minor}-cp3{minor}-" in wheel.name

    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    module = next(tmp_path.glob("site/diffusion/kernels/_cpp.*.so"))
    program = f"""if True:
        import ctypes, importlib.util
        ctypes.CDLL({str(Path(torch.__file__).parent / "lib/libtorch_cpu.so")!r})
        spec = importlib.util.spec_from_file_location("_cpp", {str(module)!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with module.RecordedCalls() as calls:
            pass
        calls.run()
        print(module.best_simd(), module.BUILD["python"].split(".")[1], module.LIMITS["PANEL"])
    """
    best = _native.library().best_simd()
    assert run([python, "-c", program], tmp_path).split() == [best, minor, "64"]

    ask = "import pathlib, sys; from diffusion.kernels import _native; "
    ask += "print(_native._load_cpp(pathlib.Path(sys.argv[1]))[1])"
    own = module.with_name(_native.CPP_FILE)
    said = run([sys.executable, "-c", ask, str(own)], ROOT)
    assert f"the cpp library is {module.name}, and this Python needs {own.name}" in said
    shutil.copy(module, own)
    assert "the cpp library cannot be loaded: " in run([sys.executable, "-c", ask, str(own)], ROOT)
