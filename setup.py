"""Builds the C++ and the CUDA library, each where its compiler is found; installs pure Python otherwise.

Both use LibTorch's stable ABI, so a wheel serves every torch that the metadata allows. The C++ library is
also a Python module, by pybind11, so there is a wheel for each version of Python. Environment:
DIFFUSION_NO_NATIVE=1 builds neither, DIFFUSION_NO_CUDA=1 only the first; CXX, CXXFLAGS and CUDA_HOME are
honoured. kernels/_build.json records what was built, and the reasons for what was not. Objects are kept
in build/objects, and a source is compiled again when its command or a file that it includes has changed.
"""

import hashlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    raise SystemExit("fused-diffusion is built with setuptools>=77; run: pip install -U setuptools") from None

TORCH_MINIMUM = (2, 10)
PYBIND11_MINIMUM = (3, 0)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Nothing is contracted or reassociated, so that philox, reverse_step and float32 attention compute the same
# bits on every processor. conv3x3 and group_norm_silu do not on a processor without FMA.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", STABLE_ABI]
CXX_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-DUSE_CUDA", STABLE_ABI]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]
# Machine code for compute capabilities 8 and 9, and PTX for later ones, all from one run of the compiler
# proper, which takes most of the time.
CUDA_ARCHS = ["sm_80", "sm_90", "compute_80"]
WGMMA_ARCHS = ["sm_90a"]  # of sources *_wgmma.cu, whose instructions no other device has

MODULE = "csrc/runtime/module.cpp"  # the only source that includes Python's headers
# Every op's folder of csrc/, and those that the ops share.
SOURCES = {
    "diffusion.kernels._cpp": sorted(path.as_posix() for path in Path("csrc").glob("*/*.cpp")),
    "diffusion.kernels._cuda": sorted(path.as_posix() for path in Path("csrc").glob("*/*.cu")),
}


class CannotBuild(Exception):
    """Why a library is not built; the installation goes on without it."""


def find_torch() -> Path | None:
    """The folder of a new enough torch: importable here, or in the environment that pip installs into.

    The second spares pip from fetching torch again for its isolated build; only headers are needed.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).resolve().parent] if spec and spec.origin else []
    installed = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    folders += [Path(folder, "torch") for folder in installed]
    for folder in folders:
        version = folder / "version.py"
        match = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text()) if version.exists() else None
        if match and (int(match[1]), int(match[2])) >= TORCH_MINIMUM:
            return folder
    return None


def python_headers() -> list[str]:
    """The compiler's options for a source that defines a Python module."""
    try:
        import pybind11
    except ImportError:
        raise CannotBuild("there is no pybind11 to build with; run: pip install pybind11") from None
    if pybind11.version_info[:2] < PYBIND11_MINIMUM:
        raise CannotBuild(f"pybind11 {pybind11.__version__} is too old; run: pip install -U pybind11")
    folders = [sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    if not any(Path(folder, "Python.h").exists() for folder in folders):
        raise CannotBuild(f"there is no Python.h in {folders[0]}; Debian and Ubuntu have it in python3-dev")
    return [option for folder in [*folders, pybind11.get_include()] for option in ("-isystem", folder)]


def find_compiler() -> list[str]:
    if os.environ.get("DIFFUSION_NO_NATIVE") == "1":
        raise CannotBuild("DIFFUSION_NO_NATIVE=1 was set")
    if sys.platform == "win32":
        raise CannotBuild("there is no build for Windows")
    wanted = os.environ.get("CXX")
    for candidate in [wanted] if wanted else ["g++", "clang++", "c++"]:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    raise CannotBuild(f"there is no C++ compiler {wanted or 'g++ or clang++'}")


def find_nvcc() -> str:
    if os.environ.get("DIFFUSION_NO_CUDA") == "1":
        raise CannotBuild("DIFFUSION_NO_CUDA=1 was set")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for candidate in [*(f"{home}/bin/nvcc" for home in homes if home), "nvcc"]:
        if shutil.which(candidate):
            return shutil.which(candidate)
    raise CannotBuild("there is no nvcc")


def torch_to_build_with() -> list[str]:
    """The packages that pip must fetch before the build: torch, if there is a compiler but no torch."""
    try:
        find_compiler()
    except CannotBuild:
        return []
    return [] if find_torch() else ["torch>={}.{}".format(*TORCH_MINIMUM)]


def device_code(source: str) -> list[str]:
    """nvcc's options for the devices that a CUDA source is compiled for."""
    if Path(source).stem.endswith("_wgmma"):
        return [f"-gencode=arch=compute_90a,code=[{','.join(WGMMA_ARCHS)}]"]
    return [f"-gencode=arch=compute_80,code=[{','.join(CUDA_ARCHS)}]"]


def digest_of_sources() -> str:
    """The digest of csrc/; kernels/_native.py compares it with that of the libraries."""
    return runpy.run_path("kernels/_sources.py")["digest_of_sources"](Path("csrc"))


def run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        print(result.stdout, result.stderr, sep="\n", file=sys.stderr)
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        raise CannotBuild(f"{command[0]} failed: {errors[0] if errors else f'status {result.returncode}'}")


def digest_of_compilation(command: list[str], dependencies: Path) -> str | None:
    """The digest of a command and of the files that the compiler listed as read; None if one is missing."""
    digest = hashlib.sha256(shlex.join(command).encode())
    try:
        files = dependencies.read_text().replace("\\\n", " ").partition(": ")[2].strip()
        for name in re.split(r"(?<!\\)\s+", files):  # a space in a name has a backslash before it
            digest.update(Path(name.replace("\\ ", " ")).read_bytes())
    except OSError:
        return None
    return digest.hexdigest()


def compile_source(command: list[str], source: str, target: Path) -> None:
    """Makes the object of a source, unless it is there, made by the same command from the same files."""
    dependencies, made_of = target.with_suffix(".d"), target.with_suffix(".sha256")
    command = [*command, "-MD", "-MF", str(dependencies), "-c", source, "-o", str(target)]
    if target.exists() and made_of.exists():
        if made_of.read_text() == digest_of_compilation(command, dependencies):
            return
        made_of.unlink()
    run(command)
    made_of.write_text(digest_of_compilation(command, dependencies) or "")


class BuildLibraries(build_ext):
    """Compiles the two libraries; one that cannot be built is left out, with one line that says why."""

    def get_ext_filename(self, fullname):
        if fullname.endswith("_cpp"):
            return super().get_ext_filename(fullname)  # with the tag of this Python and platform
        return str(Path(*fullname.split("."))) + ".so"

    def build_extensions(self):
        record = {"sources": digest_of_sources()}
        objects = Path(self.get_finalized_command("build").build_base, "objects")
        objects.mkdir(parents=True, exist_ok=True)
        targets = {e.name.rpartition("_")[2]: Path(self.get_ext_fullpath(e.name)) for e in self.extensions}
        for target in targets.values():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
        links = {}  # what is left to do when the sources are compiled

        def attempt(name: str, step: Callable[..., Any], *args: Any) -> Any:
            """The result of a step; None where the library cannot be built, which is told and recorded."""
            try:
                return step(*args)
            except CannotBuild as error:
                record[name] = {"reason": str(error)}
                what = "installing pure Python" if name == "cpp" else f"no {name} library"
                print(f"fused-diffusion: {what}: {error}", file=sys.stderr)
                return None

        # One pool for the sources of both, so that no core waits for the slowest source of the first library.
        with ThreadPoolExecutor(os.cpu_count()) as compilers:
            for (name, target), extension in zip(targets.items(), self.extensions, strict=True):
                links[name] = attempt(name, self.begin_library, extension, target, objects, compilers)
                if links["cpp"] is None:
                    break
            for name, link in links.items():
                built = None if link is None else attempt(name, link)
                if built is not None:
                    record[name] = built
                elif name == "cpp":
                    record["cuda"] = record["cpp"]
                    compilers.shutdown(cancel_futures=True)
                    break
        self.built = [e for e in self.extensions if Path(self.get_ext_fullpath(e.name)).exists()]
        (target.parent / "_build.json").write_text(json.dumps(record, indent=1))

    def begin_library(
        self, extension: Extension, target: Path, folder: Path, compilers: ThreadPoolExecutor
    ) -> Callable[[], dict[str, str]]:
        """Begins to compile; returns what waits for the objects, links them, and tells what was built."""
        cxx, torch = find_compiler(), find_torch()
        if torch is None:
            raise CannotBuild("there is no torch>={}.{} to build with".format(*TORCH_MINIMUM))
        cuda = extension.name.endswith("_cuda")
        module_options = [] if cuda else self.module_options()
        include = ["-I", "csrc", "-isystem", str(torch / "include")]
        if cuda:
            nvcc = [find_nvcc(), "-ccbin", cxx[0]]
            compile_command = [*nvcc, *NVCC_FLAGS, *include]
            link_command = [*nvcc, "-shared", "-cudart", "static", "-Xlinker", "--no-as-needed"]
        else:
            flags = shlex.split(os.environ.get("CXXFLAGS", ""))
            compile_command = [*cxx, *flags, *CXX_FLAGS, *include]
            link_command = [*cxx, *flags, "-shared"]

        objects = [folder / (source.replace("/", "_") + ".o") for source in extension.sources]

        def compile_one(source: str, target: Path) -> None:
            options = device_code(source) if cuda else module_options if source == MODULE else []
            compile_source([*compile_command, *options], source, target)

        compiled = compilers.map(compile_one, extension.sources, objects)
        if sys.platform == "darwin":  # symbols are looked up in the libraries that torch has loaded
            libraries = ["-undefined", "dynamic_lookup"]
        else:  # libtorch.so stands for libtorch_cuda.so, which a CPU torch does not have
            libraries = [f"-L{torch / 'lib'}", *(["-ltorch"] if cuda else []), "-ltorch_cpu"]

        def link() -> dict[str, str]:
            for _ in compiled:
                pass
            partial = target.with_suffix(".partial")
            run([*link_command, "-o", str(partial), *map(str, objects), *libraries])
            partial.rename(target)
            return {"archs": " ".join(CUDA_ARCHS + WGMMA_ARCHS)} if cuda else {}

        return link

    def module_options(self) -> list[str]:
        """For MODULE: Python's and pybind11's headers, and what the module says of its build."""
        said = {"FD_VERSION": self.distribution.get_version(), "FD_SOURCES": digest_of_sources()}
        return [*python_headers(), *(f'-D{name}="{value}"' for name, value in said.items())]

    def copy_extensions_to_source(self):
        """For an editable installation: the libraries and the record go beside kernels/_native.py.

        Modules of other Pythons stay: kernels/_native.py refuses one that was built from other sources.
        """
        built = Path(self.build_lib, "diffusion", "kernels")
        folder = Path(self.get_finalized_command("build_py").get_package_dir("diffusion.kernels"))
        files = (Path(self.get_ext_filename(extension.name)).name for extension in self.extensions)
        for name in (*files, "_build.json"):
            (folder / name).unlink(missing_ok=True)
            if (built / name).exists():
                shutil.copyfile(built / name, folder / name)


class Wheel(bdist_wheel):
    """Tags the wheel by what is in it: this Python and platform where a library was built, else any."""

    def run(self):
        build = self.get_finalized_command("build")
        shutil.rmtree(build.build_lib, ignore_errors=True)  # no file of an earlier build goes along
        self.run_command("build")
        self.skip_build = True
        if not self.get_finalized_command("build_ext").built:
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


setup(
    packages=[
        *find_packages(include=["diffusion", "diffusion.*"]),
        "diffusion.kernels",
        *(f"diffusion.kernels.{op}" for op in find_packages("kernels")),
    ],
    package_dir={"diffusion": "diffusion", "diffusion.kernels": "kernels"},
    package_data={
        "diffusion": [
            "py.typed",
            "cli/help.json",
            "recipes/*.json",
            "weights/**/*.json",
            "weights/**/*.safetensors",
        ],
        "diffusion.kernels": ["*.pyi"],
    },
    ext_modules=[Extension(name, sources, optional=True) for name, sources in SOURCES.items()],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
    setup_requires=torch_to_build_with(),
)
