"""PlannedUNet computes the same as the UNet, for every architecture, size and dtype."""

import copy
import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import diffusion
from diffusion.inference import denoiser, denoiser_cache
from diffusion.inference.cpu_plan import PlannedUNet, unsupported
from diffusion.inference.denoiser_cache import DenoiserCache
from diffusion.kernels import _native
from diffusion.kernels._recorded_calls import recording
from diffusion.models.structure import altered
from diffusion.models.unet import UNet
from diffusion.planner import weights
from helpers.native import requires_native
from helpers.thinning import exhaustive_but
from helpers.unets import TINY, UNPLANNED, VARIANTS, inputs, randomized

pytestmark = requires_native


@pytest.fixture(autouse=True)
def fast_kernels(monkeypatch):
    """Plans the small networks of these tests as large ones are planned."""
    monkeypatch.setattr(weights, "SMALL_NETWORK", 0)


def labels_of(config, batch: int):
    return torch.arange(batch) % config.num_classes if config.num_classes else None


@pytest.fixture
def vectors():
    """Without AMX, where the processor has it."""
    _native.use_simd(_native.simd_variants()[min(3, len(_native.simd_variants()) - 1)])
    yield
    _native.use_simd("best")


def evaluate(unet, dtype, x, t, labels):
    """The planned UNet's output, and the UNet's own in float64."""
    with torch.no_grad():
        actual = PlannedUNet(unet, dtype).denoise(x, unet.embed(t, labels)).clone()
        return actual, copy.deepcopy(unet).double()(x.double(), t, labels)


@pytest.mark.thinned
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_unet(name, simd):
    unet = randomized(VARIANTS[name])
    x, t = inputs(unet.config)
    actual, expected = evaluate(unet, torch.float32, x, t, labels_of(unet.config, 2))
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", exhaustive_but(VARIANTS, default=list(VARIANTS)[::2]))
def test_in_sixteen_bits(name, dtype):
    """The error is at most twice that of the UNet itself in that dtype."""
    unet = randomized(VARIANTS[name])
    x, t = inputs(unet.config)
    labels = labels_of(unet.config, 2)
    actual, expected = evaluate(unet, dtype, x, t, labels)
    assert actual.dtype == dtype
    with torch.no_grad():
        peer = copy.deepcopy(unet).to(dtype)(x, t, labels)
    error, allowed = (actual - expected).abs().max(), (peer - expected).abs().max()
    assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * expected.abs().max()


def errors(unet, x, t, labels=None):
    """Root mean squared errors of the plan and of the UNet itself in float32, against float64."""
    actual, expected = evaluate(unet, torch.float32, x, t, labels)
    with torch.no_grad():
        peer = unet(x, t, labels, backend="reference")
    return ((out - expected).square().mean().sqrt() for out in (actual, peer))


@pytest.mark.parametrize("name", ["tiny", "scale_shift", "heads", "embedding", "bare_mid_attention"])
def test_small_networks_are_as_accurate_as_pytorch(name, monkeypatch):
    monkeypatch.setattr(weights, "SMALL_NETWORK", 2**20)
    unet = randomized(replace(VARIANTS[name], channels=32))
    x, t = inputs(unet.config, size=(16, 16))
    error, allowed = errors(unet, x, t, labels_of(unet.config, 2))
    assert error <= 1.5 * allowed
    planned = PlannedUNet(unet, torch.float32)
    planned.denoise(x, unet.embed(t, labels_of(unet.config, 2)))
    used = set(planned.weights.packings())
    assert all(packing.amx_limbs == 0 and packing.winograd_m <= 2 for packing in used)


@pytest.mark.parametrize("t", [20, 500])
def test_digits_are_as_accurate_as_pytorchs(t, vectors):
    """Winograd's algorithm F(4 x 4, 3 x 3) with the points 1 and 2 has 1.8 times PyTorch's error."""
    unet = diffusion.load("mnist").unet
    x, _ = inputs(unet.config, 4)
    error, allowed = errors(unet, x, torch.full((4,), t), torch.arange(4))
    assert error <= 1.5 * allowed


@pytest.mark.thinned
@pytest.mark.parametrize("size", [(8, 8), (4, 6), (26, 14), (34, 34)])
@pytest.mark.parametrize("batch", [1, 3])
def test_other_sizes(size, batch):
    unet = randomized(VARIANTS["scale_shift"])
    x, t = inputs(unet.config, batch, size)
    actual, expected = evaluate(unet, torch.float32, x, t, None)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tiny", "heads", "resblock", "scale_shift"])
def test_an_image_does_not_depend_on_its_batch(name, dtype):
    unet = randomized(VARIANTS[name])
    x, t = inputs(unet.config, 5, (16, 16))
    with torch.no_grad():
        embedding, network = unet.embed(t), PlannedUNet(unet, dtype)
        together = network.denoise(x, embedding).clone()
        for i in range(5):
            assert torch.equal(network.denoise(x[i : i + 1], embedding[i : i + 1])[0], together[i])
        assert torch.equal(network.denoise(x, embedding), together)


def test_the_input_is_left_alone():
    unet = randomized(TINY)
    x, t = inputs(TINY)
    with torch.no_grad():
        embedding = unet.embed(t)
        before = x.clone(), embedding.clone()
        PlannedUNet(unet, torch.float32).denoise(x, embedding)
    assert torch.equal(x, before[0])
    assert torch.equal(embedding, before[1])


def change_by_data(unet):
    unet.down[0].blocks[0].conv1.weight.data.mul_(1.5)


def change_in_place(unet):
    with torch.no_grad():
        unet.output_norm.bias.add_(0.5)


def replace_parameter(unet):
    unet.mid.blocks[0].conv2.weight = torch.nn.Parameter(unet.mid.blocks[0].conv2.weight * 2)


def load_others(unet):
    unet.load_state_dict(randomized(TINY, seed=5).state_dict())


def denoiser_of(cache, unet, dtype=torch.float32, backend="auto"):
    return cache.get(unet, torch.device("cpu"), dtype, backend)


@pytest.mark.parametrize("change", [change_by_data, change_in_place, replace_parameter, load_others])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_cache_sees_every_change(change, backend):
    unet, cache = randomized(TINY), DenoiserCache()
    with torch.no_grad():
        first = denoiser_of(cache, unet, backend=backend)
        assert denoiser_of(cache, unet, backend=backend) is first
        change(unet)
        x, t = inputs(TINY)
        actual = denoiser_of(cache, unet, backend=backend)(x, t, None)
        torch.testing.assert_close(actual, unet(x, t), rtol=1e-4, atol=1e-4)
    assert denoiser_of(cache, unet, torch.bfloat16) is not first


def test_the_cache_keeps_the_denoisers_of_both_precisions():
    unet, cache = randomized(TINY), DenoiserCache()
    dtypes = torch.float32, torch.bfloat16
    both = [denoiser_of(cache, unet, dtype) for dtype in dtypes]
    assert all(denoiser_of(cache, unet, dtype) is one for dtype, one in zip(dtypes, both, strict=True))
    denoiser_of(cache, unet, torch.float16)  # takes the place of the one that was used first
    assert denoiser_of(cache, unet, torch.bfloat16) is both[1]
    assert denoiser_of(cache, unet, torch.float32) is not both[0]
    change_in_place(unet)
    x, t = inputs(TINY)
    with torch.no_grad():
        for dtype in dtypes:
            found = denoiser_of(cache, unet, dtype)(x.to(dtype), t, None)
            torch.testing.assert_close(found.float(), unet(x, t), rtol=0.1, atol=0.1)


def test_the_cache_drops_denoisers_where_memory_is_short(monkeypatch):
    unet, cache = randomized(TINY), DenoiserCache()
    first = weakref.ref(denoiser_of(cache, unet))
    assert first() is not None
    monkeypatch.setattr(denoiser_cache, "free_memory", lambda device: 1000)
    denoiser_of(cache, unet, torch.bfloat16)
    gc.collect()
    assert first() is None


@torch.no_grad()
def test_an_idle_network_frees_feature_maps_that_are_large(monkeypatch):
    """They are large beside the free memory. Its packed weights stay."""
    unet, cpu, cache = randomized(TINY), torch.device("cpu"), DenoiserCache()
    x, t = inputs(unet.config)

    def bytes_after(dtype):
        found = cache.get(unet, cpu, dtype, "auto")
        found(x.to(dtype), t, None)
        return found, found.unet.buffer_bytes()

    monkeypatch.setattr(denoiser, "free_memory", lambda device: 2**30)
    monkeypatch.setattr(denoiser_cache, "_is_short_of_memory", lambda unet, device: False)
    exact, size = bytes_after(torch.float32)
    fast, _ = bytes_after(torch.bfloat16)
    assert exact.unet.buffer_bytes() == size > 0
    monkeypatch.setattr(denoiser, "free_memory", lambda device: 2**20)
    monkeypatch.setattr(denoiser, "MAX_IDLE_SHARE", size / 2**23)
    assert bytes_after(torch.float32) == (exact, size)
    assert fast.unet.buffer_bytes() == 0
    assert bytes_after(torch.bfloat16)[0] is fast
    assert exact.unet.buffer_bytes() == 0


@torch.no_grad()
def test_steps_with_and_without_guidance_share_memory(monkeypatch):
    """Their plans, and recorded calls of them, use the same buffers by turns; others take their place."""
    unet = randomized(TINY)
    x, t = inputs(unet.config)
    x, embedding = x.repeat(2, 1, 1, 1), unet.embed(t.repeat(2), None)
    planned = PlannedUNet(unet, torch.float32)
    expected = planned.denoise(x, embedding).clone()
    size, made = planned.buffer_bytes(), []
    plan = PlannedUNet._plan
    monkeypatch.setattr(PlannedUNet, "_plan", lambda self, *args: made.append(args) or plan(self, *args))
    half, of_half = x[:2].contiguous(memory_format=torch.channels_last), embedding[:2].contiguous()
    assert planned.recordable(half, of_half)
    with recording() as calls:
        out = planned.denoise(half, of_half)
    for _ in range(2):
        assert torch.equal(planned.denoise(x, embedding), expected)
        calls.run()
        assert torch.equal(out, expected[:2])
    assert len(made) == 1
    assert planned.buffer_bytes() <= 1.1 * size
    planned.denoise(x[:3], embedding[:3])
    assert list(planned._thread_local.plans) == [x[:3].shape]
    assert planned.buffer_bytes() <= size


@torch.no_grad()
def test_weights_that_change_before_another_size_is_planned():
    unet = randomized(TINY)
    x, t = inputs(unet.config)
    planned = PlannedUNet(unet, torch.float32)
    planned.denoise(x, unet.embed(t, None))
    next(unet.parameters()).data.view(-1)[3] += 1
    planned.denoise(x, unet.embed(t, None))  # of the weights as they were
    with pytest.raises(RuntimeError, match="the UNet's weights changed while images were sampled"):
        planned.denoise(x[:1], unet.embed(t[:1], None))


@pytest.mark.parametrize("first", [True, False])
def test_in_inference_mode_and_out_of_it(first):
    unet = randomized(TINY)
    network, (x, t) = PlannedUNet(unet, torch.float32), inputs(TINY)
    results = []
    for mode in (first, not first, first):
        with torch.inference_mode(mode), torch.no_grad():
            results.append(network.denoise(x, unet.embed(t)).clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        unet = randomized(TINY)
        x, t = inputs(TINY)
        actual = denoiser_of(DenoiserCache(), unet)(x, t, None)
        torch.testing.assert_close(actual, unet(x, t), rtol=1e-4, atol=1e-4)


def test_threads_do_not_share_buffers():
    unet = randomized(TINY)
    network, t = PlannedUNet(unet, torch.float32), torch.tensor([5, 900])
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(2, 2, 16, 16, generator=generator) for _ in range(8)]
    with torch.no_grad():
        embedding = unet.embed(t)
        expected = [network.denoise(x, embedding).clone() for x in images]

    def work(x):
        with torch.no_grad():
            results = []
            for _ in range(30):
                out = network.denoise(x, embedding)
                time.sleep(1e-4)  # for another thread to overwrite it, if it could
                results.append(out.clone())
            return results

    with ThreadPoolExecutor(4) as pool:
        for results, right in zip(pool.map(work, images), expected, strict=True):
            assert all(torch.equal(result, right) for result in results)


def test_a_copy_makes_its_own():
    unet, cache = randomized(TINY), DenoiserCache()
    first = denoiser_of(cache, unet)
    assert denoiser_of(copy.deepcopy(cache), unet) is not first


def test_weights_that_would_take_too_much_memory(monkeypatch, vectors):
    """Smaller tiles, then none, as memory shrinks; the result stays the same."""
    unet = randomized(VARIANTS["tiny"])
    x, t = inputs(unet.config, 2, (16, 16))
    numbers = sum(
        m.weight.numel() for m in unet.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)
    )
    tiles, outputs = [], []
    for share in (4.0, 2.0, 1.0):
        total = int(4 * numbers * share / weights.MAX_SHARE_OF_MEMORY)
        monkeypatch.setattr(weights, "total_memory", lambda device, total=total: total)
        network = PlannedUNet(unet, torch.float32)
        with torch.no_grad():
            outputs.append(network.denoise(x, unet.embed(t)).clone())
        tiles.append({packing.winograd_m for packing in network.weights.packings()})
    assert tiles == [{0, 4}, {0, 2}, {0}]  # 0: convolutions by 1 x 1
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[1], outputs[2], rtol=1e-4, atol=1e-4)


def test_attention_over_many_positions():
    """More than one block of keys, and the last one is not full."""
    unet = randomized(VARIANTS["heads"])
    x, t = inputs(unet.config, 2, (26, 14))
    actual, expected = evaluate(unet, torch.float32, x, t, None)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_cannot_be_planned():
    unet = randomized(TINY)
    assert "float64" in unsupported(unet, torch.float64)
    assert "meta" in unsupported(copy.deepcopy(unet).to("meta"), torch.float32)
    with pytest.raises(
        ValueError, match=r"this UNet cannot be planned for the CPU: the dtype is torch\.float64"
    ):
        PlannedUNet(unet, torch.float64)
    assert unsupported(unet, torch.float32) is None


@pytest.mark.parametrize("name", UNPLANNED)
def test_what_no_plan_supports_runs_as_its_modules(name):
    config, reason = UNPLANNED[name]
    unet = randomized(config)
    assert reason in unsupported(unet, torch.float32)
    assert reason in denoiser.explain(unet, torch.device("cpu"), torch.float32, "auto")
    x, t = inputs(config)
    with torch.no_grad():
        found = denoiser_of(DenoiserCache(), unet)(x, t, None)
        expected = copy.deepcopy(unet).double()(x.double(), t)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


class Halved(UNet):
    def denoise(self, x, embedding, backend="auto"):
        return super().denoise(x, embedding, backend) / 2


def hooked(unet):
    unet.mid.register_forward_hook(lambda module, args, output: output * 0)
    return unet


def wrapped(unet):
    torch.nn.utils.parametrizations.weight_norm(unet.output_conv)
    return unet


def test_what_others_changed_is_not_passed_over():
    unet, cache = randomized(TINY), DenoiserCache()
    assert altered(unet) is None
    halved = Halved(TINY).eval()
    halved.load_state_dict(unet.state_dict())
    x, t = inputs(TINY)
    with torch.no_grad():
        expected = denoiser_of(cache, unet)(x, t, None).clone()
        found = denoiser_of(DenoiserCache(), halved)(x, t, None)
        torch.testing.assert_close(found, expected / 2, rtol=1e-4, atol=1e-4)
        hooked(unet)
        found = denoiser_of(cache, unet)(x, t, None)
        torch.testing.assert_close(found, unet(x, t), rtol=1e-4, atol=1e-4)
        assert (found - expected).abs().max() > 0.1
    assert "mid has a forward hook" in altered(unet)
    assert "it is Halved of test_cpu_plan, not UNet of diffusion" in altered(halved)
    assert "output_conv is ParametrizedConv2d of torch." in altered(wrapped(randomized(TINY)))


def test_a_new_denoiser_asks_once_whether_the_unet_was_altered(monkeypatch):
    asked = []
    for module in (denoiser, denoiser_cache):
        monkeypatch.setattr(module, "altered", lambda unet: asked.append(unet) or altered(unet))
    denoiser_of(DenoiserCache(), randomized(TINY))
    assert len(asked) == 1


def test_norms_are_copies():
    unet = randomized(VARIANTS["resblock"])
    x, t = inputs(unet.config)
    with torch.no_grad():
        network, embedding = PlannedUNet(unet, torch.float32), unet.embed(t)
        expected = network.denoise(x, embedding).clone()
        for parameter in unet.parameters():
            parameter.mul_(2)
        assert torch.equal(network.denoise(x, embedding), expected)
