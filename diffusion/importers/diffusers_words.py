"""The words of other projects that people write out of habit, with those of this package."""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NoReturn

from .diffusers_scheduler import EXACT, NEAREST, SIGMAS

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
    "generator": "write seed=, a whole number, or noise=, a tensor",
    "height": "write noise=, a tensor [N, C, H, W]",
    "init_image": "write image=",
    "jump_n_sample": "write resamples=, with mask=",
    "latents": "write noise=, a tensor [N, C, H, W]",
    "mask_image": "write mask=, 1 where the image is painted anew",
    "negative_prompt": "write labels=, a class for each image; this package has no models of text",
    "num_images_per_prompt": "write num_samples=, the number of images",
    "num_inference_steps": "write steps=, the number of steps",
    "original_image": "write image=",
    "output_type": 'write output=, "tensor", "pil" or "numpy"',
    "prompt": "write labels=, a class for each image; this package has no models of text",
    "return_dict": "leave it out: results are returned as they are",
    "scheduler": 'write sampler=, such as "ddim"',
    "thresholding": "write dynamic_threshold=, such as 0.995",
    "timestep_spacing": 'write spacing=, such as "trailing"',
    "timesteps": "write steps= and spacing=",
    "torch_dtype": "write dtype=, of the network",
    **{option: f'write sigmas="{sigmas}", with sampler="dpm++"' for option, sigmas in SIGMAS.items()},
    "variance_type": 'write variance=, with sampler="ddpm"',
    "width": "write noise=, a tensor [N, C, H, W]",
}
# Keyword arguments of the notebooks of stable-diffusion-from-scratch and of their kind.
NOTEBOOKS = {
    "cfg_scale": "write guidance_scale=, 1 for no guidance",
    "classes": "write labels=, a class for each image",
    "n_samples": "write num_samples=, the number of images",
    "size": "leave it out: images are of the model's size, or of that of noise=",
    "w": "write guidance_scale=, which is 1 + w",
}
# Keyword arguments of `from_pretrained`, with what to do instead in `load`.
LOADING = {
    "cache_dir": "set HF_HOME in the environment",
    "device_map": "write device=",
    "dtype": "a model is loaded in float32; give dtype= to sample",
    "local_files_only": "set HF_HUB_OFFLINE=1 in the environment",
    "torch_dtype": "a model is loaded in float32; give dtype= to sample",
    "use_safetensors": "leave it out: both kinds of file are read, and nothing in them is executed",
    "variant": 'write flags={"variant": "fp16"}',
}


def refuse_keywords(
    function: str,
    names: Iterable[str],
    arguments: Collection[str] | None = None,
    keywords: dict[str, str] = KEYWORDS,
) -> None:
    """TypeError for the first name that is a keyword of diffusers or of the notebooks; it names ours.

    arguments: those of the function, if not all that the advice names; other keywords are left to the caller.
    """
    owners = ((keywords, "diffusers'"), (NOTEBOOKS if keywords is KEYWORDS else {}, "the notebooks'"))
    for name in names:
        for words, owner in owners:
            advice = words.get(name)
            if advice and (arguments is None or set(re.findall(r"(\w+)=", advice)) <= set(arguments)):
                raise TypeError(f"{function}() has no argument {name!r}, which is {owner}; {advice}")


def refuse_unknown(function: str, names: Iterable[str], arguments: Sequence[str]) -> None:
    """TypeError for the first name that is none of the arguments; it names the one that is written alike."""
    for name in names:
        if name not in arguments:
            near = difflib.get_close_matches(name, arguments, 1)
            alike = near + [argument for argument in arguments if name in argument.split("_")]
            hint = f"do you mean {alike[0]}=?" if alike else f"see help(model.{function})"
            raise TypeError(f"{function}() has no argument {name!r}; {hint}")


def refuse_loading(names: Iterable[str]) -> None:
    """TypeError for every keyword that `load` does not have."""
    refuse_keywords("load", names, keywords=LOADING)
    for name in names:
        raise TypeError(f"load() got an unexpected keyword argument {name!r}")


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
