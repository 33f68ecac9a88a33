"""Steps that are captured as on a CUDA device, threads, and calls within calls: each has its own buffers."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from diffusion.inference import buffers, captured_steps
from helpers.models import make_model


def test_more_steps_than_are_embedded_at_a_time(conditional, monkeypatch):
    options = {"sampler": "ddim", "steps": 7, "guidance_scale": 2.0}
    expected = conditional.sample([4, 4, 9], **options)
    monkeypatch.setattr(buffers, "STEPS_EMBEDDED", 3)
    conditional = conditional.copy()
    torch.testing.assert_close(conditional.sample([4, 4, 9], **options), expected, atol=1e-4, rtol=0)


@pytest.fixture
def replayed(monkeypatch):
    """Has steps captured as on a CUDA device, where a graph is their call; a list of their graphs' pools."""
    seen, pools = [], itertools.count()

    def capture(function, changed, pool):
        kept = [tensor.clone() for tensor in changed]
        function()  # to warm up
        for tensor, before in zip(changed, kept, strict=True):
            tensor.copy_(before)
        seen.append(pool)
        return lambda count: [function() for _ in range(count)]

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(pools)))
    monkeypatch.setattr(captured_steps, "runs_cuda_kernels", lambda *args: True)
    monkeypatch.setattr(captured_steps, "capture_cuda_graph", capture)
    return seen


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({}, 1),
        ({"guidance_interval": (300, 600)}, 4),  # steps within, steps without, and those that lead over
        ({"eta": 1.0}, 1),
        ({"sampler": "dpm++"}, 1),
        ({"guidance_scale": 1.0, "batch_size": 3}, 2),
        ({"guidance_rescale": 0.7}, 1),
        ({"guidance_parallel": 0.3, "guidance_interval": (300, 600)}, 4),
        ({"dynamic_threshold": 0.9, "dynamic_threshold_max": 2.0, "eta": 1.0}, 1),
        ({"dynamic_threshold": 0.9, "sampler": "dpm++", "guidance_rescale": 0.7}, 1),
    ],
)
def test_captured_steps_need_nothing_but_their_buffers(replayed, monkeypatch, options, graphs):
    """The same images with steps that are captured once, and replayed for all others and another batch."""
    conditional = make_model(10)  # which has captured nothing
    options = {"sampler": "ddim", "steps": 10, "guidance_scale": 2.0, "seed": 3} | options
    labels = [3, 1, 4, 1, 5]
    first = conditional.sample(labels, **options)
    assert len(replayed) == graphs
    assert len(set(replayed)) == (2 if "batch_size" in options else 1)  # the graphs of a batch share memory
    again = conditional.sample(labels, **options | {"seed": 4})
    once = len(replayed)
    monkeypatch.undo()
    plain = conditional.copy()
    assert torch.equal(first, plain.sample(labels, **options))
    assert torch.equal(again, plain.sample(labels, **options | {"seed": 4}))
    assert once == (graphs if "batch_size" not in options else 2 * graphs)


def test_threads_sample_from_one_model(conditional):
    options = {"sampler": "ddim", "steps": 10, "guidance_scale": 2.0}
    expected = [conditional.sample([1, 2], seed=seed, **options) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        results = pool.map(lambda seed: conditional.sample([1, 2], seed=seed, **options), range(6))
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"dynamic_threshold": 0.995}], ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_sampling_within_a_callback(conditional, options, fails):
    """A call within a call has buffers of its own, also where it ends early."""
    outer = {"labels": [3, 1], "steps": 5, "sampler": "ddim", "guidance_scale": 2.0, **options}
    inner = outer | {"labels": [4, 7], "seed": 9}
    expected = conditional.sample(**outer), conditional.sample(**inner, callback=lambda *args: None)
    found = []

    def stop(i, x, x0):
        if fails and i == 2:
            raise LookupError

    def callback(i, x, x0):
        if i == 1:
            try:
                found.append(conditional.sample(**inner, callback=stop))
            except LookupError:
                found.append(None)

    assert torch.equal(conditional.sample(**outer, callback=callback), expected[0])
    assert found == [None] if fails else torch.equal(found[0], expected[1])
    assert torch.equal(conditional.sample(**outer), expected[0])
