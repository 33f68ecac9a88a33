"""Batches that do not fit the memory, and samples that someone interrupts."""

import pytest
import torch

from diffusion.inference import batches, loop
from diffusion.inference.batches import Interrupted
from diffusion.inference.buffers import Batch
from diffusion.utils import memory


def failing(monkeypatch, when, error):
    """Has loop.run raise `error` for batches that `when` says; a list of the sizes of all batches."""
    sizes, run = [], loop.run

    def patched(network, table, batch, *args, **options):
        sizes.append(len(batch.sample_ids))
        if when(sizes):
            raise error
        return run(network, table, batch, *args, **options)

    monkeypatch.setattr(loop, "run", patched)
    return sizes


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_batch_too_large_for_the_memory_is_halved(model, monkeypatch, error, capsys):
    expected = model.sample(num_samples=9, steps=3)
    sizes = failing(monkeypatch, lambda sizes: sizes[-1] > 3, error)
    assert torch.equal(model.sample(num_samples=9, steps=3, progress=True), expected)
    assert sizes == [9, 5, 3, 3, 3]
    assert "9/9 images" in capsys.readouterr().err


@pytest.mark.parametrize(("free", "expected"), [(None, [9]), (1 << 40, [9]), (1 << 19, None), (0, [1] * 9)])
def test_the_batch_is_what_free_memory_holds(model, monkeypatch, free, expected):
    monkeypatch.setattr(batches, "free_memory", lambda device: free)
    sizes = failing(monkeypatch, lambda sizes: False, None)
    model.sample(num_samples=9, steps=2)
    if expected is None:  # some, but not all
        assert 1 < max(sizes) < 9
        assert sum(sizes) == 9
    else:
        assert sizes == expected


def test_no_memory_for_a_single_image(model, monkeypatch):
    failing(monkeypatch, lambda sizes: True, OUT_OF_MEMORY[0])
    with pytest.raises(ValueError, match="not enough memory on cpu for one image"):
        model.sample(num_samples=2, steps=3)


def test_other_errors_are_not_taken_for_a_lack_of_memory(model, monkeypatch):
    sizes = failing(monkeypatch, lambda sizes: True, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        model.sample(num_samples=4, steps=3)
    assert sizes == [4]


def test_an_interruption_leaves_the_finished_images(model, monkeypatch):
    expected = model.sample(num_samples=8, steps=3)
    failing(monkeypatch, lambda sizes: len(sizes) == 3, KeyboardInterrupt())
    with pytest.raises(Interrupted) as caught:
        model.sample(num_samples=8, steps=3, batch_size=3)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert torch.equal(caught.value.images, expected[:6])


def test_ctrl_c_between_two_batches(model, monkeypatch):
    expected = model.sample(num_samples=2, steps=3)
    begun = []

    def batch(**arguments):
        begun.append(arguments)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return Batch(**arguments)

    monkeypatch.setattr(batches, "Batch", batch)
    with pytest.raises(Interrupted) as caught:
        model.sample(num_samples=5, steps=3, batch_size=2)
    assert torch.equal(caught.value.images, expected)


def test_an_image_beyond_memory_is_refused_at_once(model, monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda device: 1000)  # an image of 512 bytes fits
    with pytest.raises(ValueError, match=r"the feature maps of one image take .* GiB, and cpu has"):
        model.sample(steps=1)
