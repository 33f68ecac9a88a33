"""The words of diffusers that people write out of habit, with those of this package."""

from typing import Any, NoReturn

from .diffusers_scheduler import EXACT, NEAREST

# Keyword arguments of diffusers' pipelines and schedulers, with what to do instead in `DDPM.sample`.
KEYWORDS = {
    "algorithm_type": 'write algorithm=, with sampler="dpm++"',
    "callback_on_step_end": "write callback=, a function of (i, x, x0)",
    "callback_on_step_end_tensor_inputs": "write callback=, a function of (i, x, x0)",
    "callback_steps": "write callback=, which is called after every step",
    "class_labels": "write labels=, a class for each image",
    "clip_sample": "write clip=, a number or None",
    "clip_sample_range": "write clip=, a number or None",
    "dynamic_thresholding_ratio": "write dynamic_threshold=, such as 0.995",
    "generator": "write seed=, a whole number, or noise=, a function of the step",
    "height": "write noise=, whose noise(0) is [N, C, H, W]",
    "latents": "write noise=, a function whose noise(0) is the initial noise",
    "negative_prompt": "write labels=, a class for each image; this package has no models of text",
    "num_images_per_prompt": "write num_samples=, the number of images",
    "num_inference_steps": "write steps=, the number of steps",
    "output_type": 'write output=, "tensor", "pil" or "numpy"',
    "prompt": "write labels=, a class for each image; this package has no models of text",
    "return_dict": "leave it out: sample returns the images",
    "scheduler": 'write sampler=, such as "ddim"',
    "thresholding": "write dynamic_threshold=, such as 0.995",
    "timestep_spacing": 'write spacing=, such as "trailing"',
    "timesteps": "write steps= and spacing=",
    "torch_dtype": "write dtype=, of the network",
    "use_karras_sigmas": 'write sigmas="karras", with sampler="dpm++"',
    "width": "write noise=, whose noise(0) is [N, C, H, W]",
}


def refuse_keywords(function: str, names: Any) -> None:
    """TypeError for the first name that is a keyword of diffusers; it names this package's argument."""
    for name in names:
        if name in KEYWORDS:
            raise TypeError(f"{function}() has no argument {name!r}, which is diffusers'; {KEYWORDS[name]}")


def refuse_scheduler(sampler: Any) -> None:
    """ValueError, with the sampler's name here, where `sampler` is a scheduler of diffusers or its name."""
    kind = sampler if isinstance(sampler, type) else type(sampler)
    name = sampler if isinstance(sampler, str) else kind.__name__
    read = EXACT.get(name) or NEAREST.get(name)
    if read is not None:
        nearest = "" if name in EXACT else ", the nearest to it"
        raise ValueError(
            f"sampler must be a name of this package, such as {read({})['name']!r}{nearest}, not {name}"
        )


def refuse_call() -> NoReturn:
    """The TypeError of a model that is called as diffusers' pipelines are, or as a network is."""
    raise TypeError(
        "a DDPM is not called: model.sample(num_samples=4, steps=50) makes images, model.loss(x0, labels) "
        "is the loss of training, and model.unet(x_t, t, labels) the network's prediction"
    )
