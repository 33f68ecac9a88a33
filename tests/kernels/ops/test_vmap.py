"""torch.vmap over the ops, as per-sample gradients need it: equal to a loop."""

import pytest
import torch

from diffusion.kernels import attention, conv2d, conv3x3, group_norm_silu


def weighted(*shape, seed=0):
    """Numbers of which none is like another."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Each with a parameter, and what each of five samples gives it.
PER_SAMPLE = {
    "group_norm_silu": (lambda w, x: group_norm_silu(x, 4, w, w, add=x[:, :, 0, 0]), (8,), (2, 8, 3, 5)),
    "group_norm_silu of one image": (lambda w, x: group_norm_silu(x[None], 2, w), (8,), (8, 3, 5)),
    "group_norm_silu of a sequence": (lambda w, x: group_norm_silu(x, 2, w), (8,), (2, 8, 7)),
    "group_norm_silu of a volume": (lambda w, x: group_norm_silu(x, 2, w), (8,), (2, 8, 3, 2, 3)),
    "attention": (lambda w, x: attention(x * w, x, x.sin()), (8,), (2, 3, 6, 8)),
    "conv2d": (lambda w, x: conv2d(x, w, w[:, 0, 0, 0], padding=1), (6, 8, 3, 3), (2, 8, 4, 5)),
    "conv3x3": (
        lambda w, x: conv3x3(x, w, num_groups=4, activation="silu", upsample=True),
        (6, 8, 3, 3),
        (2, 8, 4, 5),
    ),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", PER_SAMPLE)
def test_vmap_is_a_loop(name, layout):
    """Values, gradients for each sample, gradients through a map, tangents; the loop is in float64."""
    function, size, shape = PER_SAMPLE[name]
    parameter, x = weighted(*size), weighted(5, *shape, seed=1)
    if layout == torch.channels_last and len(shape) == 4:
        x = x.flatten(0, 1).contiguous(memory_format=layout).unflatten(0, (5, -1))
    exact, samples = parameter.double(), x.double()

    def loss(w, one):
        out = function(w, one)
        return (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum()

    def compare(actual, expected):
        torch.testing.assert_close(actual.double(), torch.stack(expected), rtol=1e-4, atol=1e-4)

    values = [function(exact, one) for one in samples]
    compare(torch.vmap(lambda one: function(parameter, one))(x), values)
    moved = torch.vmap(lambda one: function(parameter, one), in_dims=1, out_dims=1)(x.movedim(0, 1))
    compare(moved.movedim(1, 0), values)
    gradients = []
    for one in samples:
        leaf = exact.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(leaf, one), leaf)[0])
    compare(torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameter, x), gradients)
    mapped = torch.func.grad(lambda w: torch.vmap(loss, in_dims=(None, 0))(w, x).sum())(parameter)
    compare(mapped[None], [sum(gradients)])

    def tangent(w, one):
        return torch.func.jvp(lambda v: function(v, one), (w,), (w.cos(),))[1]

    compare(torch.vmap(tangent, in_dims=(None, 0))(parameter, x), [tangent(exact, one) for one in samples])


def test_vmap_in_a_compiled_function():
    x = weighted(5, 2, 8, 3, 5)
    compiled = torch.compile(
        torch.vmap(lambda one: group_norm_silu(one, 4)), backend="aot_eager", fullgraph=True
    )
    expected = torch.stack([group_norm_silu(one, 4) for one in x])
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
