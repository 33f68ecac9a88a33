"""Steps of recorded calls: the images of steps in Python, in stretches that end where Python is needed."""

import _thread
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from diffusion.inference import captured_steps, loop
from diffusion.inference.batches import Interrupted
from helpers.models import make_model
from helpers.native import requires_native
from helpers.samplers import variants

pytestmark = requires_native

LABELS = [3, 1, 4, 1, 5]


@pytest.fixture
def stretches(monkeypatch):
    """The numbers of steps of the stretches that ran without Python between them."""
    seen, recorded = [], captured_steps._calls

    def calls(*arguments):
        replay = recorded(*arguments)

        def counted(count):
            seen.append(count)
            replay(count)

        return None if replay is None else counted

    monkeypatch.setattr(captured_steps, "_calls", calls)
    return seen


def by_python(monkeypatch):
    monkeypatch.setattr(loop, "choose_capture", lambda denoiser, buffers: None)


def equal_to_python(stretches, monkeypatch, options, expected, labels=LABELS, **model_options):
    model = make_model(num_classes=10 if labels else None, **model_options)
    labels = {"labels": labels} if labels else {"num_samples": 3}
    found = [model.sample(**labels, **options, seed=seed) for seed in (0, 1)]
    assert stretches == 2 * expected
    by_python(monkeypatch)
    assert torch.equal(found[0], model.sample(**labels, **options))
    assert torch.equal(found[1], model.sample(**labels, **options, seed=1))
    assert stretches == 2 * expected


@variants
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_every_sampler(stretches, monkeypatch, sampler, options, precision):
    learned = options.get("variance") == "learned_range"
    options = {"sampler": sampler, "steps": 6, "precision": precision, **options}
    equal_to_python(stretches, monkeypatch, options, [6], None, learned_variance=learned)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"guidance_scale": 2.0}, [10]),
        ({"guidance_scale": 2.0, "eta": 1.0}, [10]),
        ({"guidance_scale": 1.0, "batch_size": 3}, [10, 10]),
        ({"guidance_scale": 2.0, "guidance_interval": (300, 600)}, [2, 1, 3, 1, 3]),
        ({"guidance_scale": 2.0, "dtype": "float16"}, [10]),
        (
            {
                "noise": lambda k: torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(k)),
                "eta": 1.0,
            },
            [1] * 10,
        ),
        ({"noise": lambda k: torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(k))}, [10]),
        ({"callback": lambda i, x, x0: None}, [1] * 10),
        ({"progress": True}, [1] * 10),
        ({"dynamic_threshold": 0.9}, []),
        ({"guidance_scale": 2.0, "guidance_rescale": 0.7}, []),
        ({"backend": "reference"}, []),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_stretches(stretches, monkeypatch, options, expected):
    options = {"sampler": "ddim", "steps": 10} | options
    equal_to_python(stretches, monkeypatch, options, expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"sampler": "dpm++", "solver_order": 3}, [1] * 10), ({"sampler": "heun"}, [19])],
    ids=["order 3", "heun"],
)
def test_other_samplers(stretches, monkeypatch, options, expected):
    """In the solver of order 3, Python recalls earlier predictions before each step."""
    equal_to_python(stretches, monkeypatch, options | {"steps": 10}, expected)


def test_more_steps_than_are_embedded_at_a_time(stretches, monkeypatch):
    equal_to_python(stretches, monkeypatch, {"sampler": "ddim", "steps": 150}, [64, 64, 22])


def test_on_every_instruction_set(stretches, monkeypatch, simd):
    equal_to_python(stretches, monkeypatch, {"sampler": "ddpm", "steps": 5, "guidance_scale": 2.0}, [5])


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_an_image_does_not_depend_on_its_batch(precision):
    model = make_model(num_classes=10)
    options = {"sampler": "ddpm", "steps": 5, "guidance_scale": 2.0, "precision": precision}
    together = model.sample(LABELS, **options)
    for i, label in enumerate(LABELS):
        assert torch.equal(model.sample([label], sample_ids=[i], **options)[0], together[i])


def test_a_callback_that_stops(stretches):
    model = make_model()
    expected = model.sample(num_samples=2, steps=8)
    stretches.clear()

    def stop(i, x, x0):
        if i == 2:
            raise LookupError

    with pytest.raises(LookupError):
        model.sample(num_samples=2, steps=8, callback=stop)
    assert stretches == [1, 1, 1]
    assert torch.equal(model.sample(num_samples=2, steps=8), expected)


def test_ctrl_c_between_steps(monkeypatch):
    """It ends the stretch in which it comes."""
    began, counters, recorded = threading.Event(), [], captured_steps._calls

    def calls(denoiser, buffers, *arguments):
        replay = recorded(denoiser, buffers, *arguments)

        def announced(count):
            counters.append(buffers.counter)
            began.set()
            replay(count)

        return announced

    def interrupt():
        if began.wait(60):
            _thread.interrupt_main()

    monkeypatch.setattr(captured_steps, "_calls", calls)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted) as caught:  # each of the 64 equal steps takes milliseconds
        make_model().sample(num_samples=300, steps=64, batch_size=300)
    thread.join()
    assert len(caught.value.images) == 0
    assert len(counters) == 1
    assert counters[0][0] < 64


def test_threads(stretches):
    model = make_model(num_classes=10)
    options = {"labels": [1, 2], "sampler": "ddpm", "steps": 10, "guidance_scale": 2.0}
    expected = [model.sample(seed=seed, **options) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        results = pool.map(lambda seed: model.sample(seed=seed, **options), range(6))
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert set(stretches) == {10}
