"""step_embeddings_ and copy_dense_: what a network reads in a step, as PyTorch indexes and copies it."""

import pytest
import torch

from diffusion.kernels import step_counter
from diffusion.kernels._recorded_calls import recording
from diffusion.kernels.ops.reverse_step.library import copy_dense_, step_embeddings_
from helpers.native import requires_native
from helpers.tensors import channels_last

pytestmark = requires_native


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("step", [0, 3, 4, 11])
def test_embeddings_of_a_step(step, dtype):
    embeddings, index = torch.randn(4, 3, 50, dtype=dtype), torch.tensor([2, 0, 0, 1, 2])
    counter, out = step_counter(0), torch.zeros(5, 50, dtype=dtype)
    with recording() as calls:
        step_embeddings_(embeddings, counter, index, out)
    assert not out.any()
    counter[0] = step
    calls.run()
    assert torch.equal(out, embeddings[step % 4][index])


@pytest.mark.parametrize("wrong", [-1, 3])
def test_labels_outside_of_the_embeddings(wrong):
    with pytest.raises(RuntimeError, match="label_index is outside of the 3 labels"):
        step_embeddings_(torch.zeros(4, 3, 5), step_counter(0), torch.tensor([0, wrong]), torch.zeros(2, 5))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"embeddings": torch.zeros(4, 5)}, "embeddings must be"),
        ({"embeddings": torch.zeros(0, 3, 5)}, "at least one step"),
        ({"counter": torch.zeros(4)}, "counter must be"),
        ({"label_index": torch.zeros(2, dtype=torch.int32)}, "label_index must be"),
        ({"out": torch.zeros(3, 5)}, "out must be"),
        ({"out": torch.zeros(2, 5, dtype=torch.float64)}, "of the dtype and on the device of embeddings"),
        ({"out": torch.zeros(5, 2).t()}, "out must be"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments(changed, message):
    arguments = {
        "embeddings": torch.zeros(4, 3, 5),
        "counter": step_counter(0),
        "label_index": torch.zeros(2, dtype=torch.int64),
        "out": torch.zeros(2, 5),
    }
    with pytest.raises(RuntimeError, match=message):
        step_embeddings_(*(arguments | changed).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(7, 9),
        channels_last(2, 3, 5, 4),
        torch.randn(3, 1, 700, 300),
        torch.randn(5),
        torch.zeros(0, 2),
    ],
    ids=lambda x: str(list(x.shape)),
)
def test_copies(x, dtype):
    x = x.to(dtype)
    out = torch.zeros_like(x)
    copy_dense_(x, out)
    assert torch.equal(out, x)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), "out must have the shape"),
        (torch.zeros(2, 3), torch.zeros(3, 2).t(), "the strides"),
        (torch.zeros(2, 3), torch.zeros(2, 3).double(), "the dtype of x"),
        (torch.zeros(2, 6)[:, :3], torch.zeros(2, 6)[:, :3], "x must be contiguous or channels_last"),
    ],
)
def test_copies_that_are_refused(x, out, message):
    with pytest.raises(RuntimeError, match=message):
        copy_dense_(x, out)
