"""Claims about every op of kernels/ops, found as the package finds them, so that a new op is tested too."""

import inspect

import pytest
import torch

from diffusion import kernels
from diffusion.kernels import ops
from diffusion.kernels._registry import InternalOp, folders
from diffusion.kernels.benchmarks import Comparison, subjects
from diffusion.kernels.ops.convolution.library import ConvolutionArguments
from diffusion.planner.plan import _RECORDABLE
from helpers.paths import ROOT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def calls():
    """(op, case, dtype, backward). By default those of ops that have no test file."""
    for name, subject in subjects().items():
        has_a_file = (ROOT / f"tests/kernels/ops/test_{name.removesuffix('_')}.py").exists()
        marks = [pytest.mark.exhaustive] if has_a_file or name == "philox_normal" else []
        for case in subject.cases:
            for dtype in subject.dtypes:
                for backward in (False, True) if subject.differentiable else (False,):
                    direction = "backward" if backward else "forward"
                    identity = f"{name}-{case}-{str(dtype).removeprefix('torch.')}-{direction}"
                    yield pytest.param(name, case, dtype, backward, marks=marks, id=identity)


@pytest.mark.parametrize(("name", "case", "dtype", "backward"), list(calls()))
def test_every_backend_that_serves_is_right(name, case, dtype, backward):
    compared = Comparison(name, subjects()[name].cases[case], dtype, DEVICE, backward=backward)
    assert compared.wrong == {}
    assert compared.auto in compared.runs or compared.auto == "triton"


@pytest.mark.parametrize("folder", folders(ops), ids=lambda folder: folder.__name__.rpartition(".")[2])
def test_the_public_names_are_those_of_the_folders(folder):
    for name in folder.__all__:
        assert getattr(kernels, name) is getattr(folder, name), f"kernels/__init__.py does not import {name}"
        assert name in kernels.__all__
    for public in folder.OPS:
        assert public.function.__name__ in folder.__all__
        assert public.function.__name__ in subjects(), f"{folder.__name__}.peers does not name it"


@pytest.mark.parametrize("name", kernels.OPS)
def test_the_arguments_are_those_of_the_function(name):
    public = kernels.OPS[name]
    parameters = inspect.signature(public.function).parameters.values()
    expected = {p.name: p.default for p in parameters if p.name != "backend"}
    assert list(public.arguments._fields) == list(expected)
    required = inspect.Parameter.empty
    assert public.arguments._field_defaults == {n: v for n, v in expected.items() if v is not required}


@pytest.mark.parametrize("name", kernels.OPS)
def test_the_example_is_explained(name):
    public = kernels.OPS[name]
    lines = public.op.explain(public.example(DEVICE)).splitlines()
    assert lines[0].startswith(f"{name}: ")
    assert len(lines) == len(public.op.backends)


def test_the_arguments_of_the_convolution_are_those_of_its_schema():
    schema = torch.ops.fused_diffusion.convolution_.default._schema
    assert list(ConvolutionArguments._fields) == [argument.name for argument in schema.arguments]


def test_the_operators_of_plans_are_named_for_info():
    recorded = {str(operator).removeprefix("fused_diffusion.") for operator in _RECORDABLE}
    assert recorded <= {op.name for op in kernels.INTERNAL}


def test_an_internal_operator_says_why_it_is_not_called():
    op = InternalOp("toy_", "nobody", lambda: "the cpp library was not built")
    assert op.explain() == "toy_: not called by nobody\n  not cpp: the cpp library was not built"
