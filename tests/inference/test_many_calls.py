"""Sampling many times: in threads, within callbacks, and with the memory of a single call."""

import copy
import gc
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from helpers.models import make_model

OPTIONS = {"sampler": "ddim", "steps": 4}


def hooked(model):
    model.unet.mid.register_forward_hook(lambda module, args, output: output / 2)
    return model


def circular(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "circular"
    return model


def six_models() -> list:
    """Fused, conditional, altered and in training mode."""
    return [
        make_model(),
        make_model(10, seed=1),
        hooked(make_model(10, seed=2)),
        circular(make_model(seed=3)),
        make_model(seed=4).train(),
        make_model(prediction_type="sample", seed=5).bfloat16(),
    ]


@pytest.mark.exhaustive
def test_eight_threads_on_six_models():
    """Every thread samples from three models, beginning with another one, and gets what one thread gets."""
    models = six_models()
    jobs = [
        (i, precision) for i, precision in enumerate(("exact", "fast", "exact", "fast", "exact", "exact"))
    ]

    def sample(job):
        return models[job[0]].sample(num_samples=2, seed=job[0], precision=job[1], **OPTIONS)

    expected = {job: sample(job) for job in jobs}
    start = threading.Barrier(8)

    def work(thread):
        start.wait()
        order = [jobs[(thread + i) % len(jobs)] for i in range(3)]
        return all(torch.equal(sample(job), expected[job]) for job in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_hooks_come_and_go_while_others_sample():
    """One thread alters its model again and again; the models of others do not change."""
    steady, changing = make_model(10), make_model(10, seed=1)
    expected = steady.sample([1, 2], **OPTIONS)
    plain = changing.sample([1, 2], **OPTIONS)
    halved = hooked(make_model(10, seed=1)).sample([1, 2], **OPTIONS)
    ended = threading.Event()

    def others():
        results = [torch.equal(steady.sample([1, 2], **OPTIONS), expected)]
        while not ended.is_set():
            results.append(torch.equal(steady.sample([1, 2], **OPTIONS), expected))
        return results

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(others) for _ in range(2)]
        try:
            for _ in range(3):
                hook = changing.unet.mid.register_forward_hook(lambda module, args, output: output / 2)
                assert torch.equal(changing.sample([1, 2], **OPTIONS), halved)
                hook.remove()
                assert torch.equal(changing.sample([1, 2], **OPTIONS), plain)
        finally:
            ended.set()
        assert all(all(future.result()) for future in found)


@pytest.mark.parametrize("altered", [False, True])
def test_recursion_three_calls_deep(altered):
    """From a callback of the same model, and of another one, and back."""
    one, other = make_model(10), make_model(10, seed=1)
    if altered:
        hooked(one)
    calls = [(one, [3, 1]), (one, [4]), (other, [5, 9, 2]), (one, [6, 5])]
    expected = [model.sample(labels, **OPTIONS, callback=lambda *args: None) for model, labels in calls]
    found = {}

    def sample(depth):
        def callback(i, x, x0):
            if i == 1 and depth + 1 < len(calls):
                sample(depth + 1)

        model, labels = calls[depth]
        found[depth] = model.sample(labels, **OPTIONS, callback=callback)

    sample(0)
    for depth, right in enumerate(expected):
        assert torch.equal(found[depth], right)


def live_tensors() -> int:
    gc.collect()
    return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def calls(models, count: int) -> None:
    for i in range(count):
        model = models[i % len(models)]
        labels = None if model.num_classes is None else [i % 10]
        model.sample(labels, num_samples=1 + i % 3, seed=i, precision=("exact", "fast")[i % 2], **OPTIONS)


def test_no_tensor_is_left_by_a_call():
    models = six_models()
    calls(models, 12)
    before = live_tensors()
    calls(models, 12)
    assert live_tensors() <= before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc")
def test_five_hundred_calls_take_no_more_memory():
    models = six_models()
    calls(models, 100)
    before = resident()
    calls(models, 500)
    assert resident() - before < 8 << 20


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["plain", "circular"])
def test_a_duplicate_of_a_model_that_has_sampled(duplicate, name):
    """Both sample the same, and altering one does not alter the other."""
    model = make_model(10)
    if name == "circular":
        circular(model)
    expected = model.sample([3, 1], **OPTIONS)
    if duplicate == "deepcopy":
        other = copy.deepcopy(model)
    elif duplicate == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(other.sample([3, 1], **OPTIONS), expected)
    with torch.no_grad():
        other.unet.output_conv.weight.mul_(0.5)
    assert not torch.equal(other.sample([3, 1], **OPTIONS), expected)
    assert torch.equal(model.sample([3, 1], **OPTIONS), expected)
