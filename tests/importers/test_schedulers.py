"""Models of diffusers sample as their own schedulers do, by default and for other numbers of steps."""

import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import diffusion
from diffusion.importers.diffusers_scheduler import read_scheduler
from diffusion.samplers import SAMPLERS, SpacingWarning
from helpers.thinning import covering

CONFIG = {
    "sample_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "add_attention": False,
}
SHAPE = (2, 3, 4, 4)


def noise(k: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(k))


@pytest.fixture(scope="module")
def networks() -> dict[int, diffusers.UNet2DModel]:
    """A network with C output channels and one with 2 C, whose outputs are small."""
    torch.manual_seed(0)
    made = {}
    for out_channels in (3, 6):
        made[out_channels] = network = diffusers.UNet2DModel(**CONFIG | {"out_channels": out_channels}).eval()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    return made


def own_images(pipeline: Any, steps: int) -> torch.Tensor:
    """The loop of diffusers' pipelines, with `noise` in place of its random numbers."""
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps)
    x, taken = noise(0), 0
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        module = type(scheduler).__module__
        patch.setattr(f"{module}.randn_tensor", lambda *args, **kwargs: noise(taken + 1), raising=False)
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
            taken += 1
    return x


def check(folder: Path, networks, scheduler: Any, steps: tuple, pipeline=diffusers.DDPMPipeline) -> None:
    """Compares the images of a pipeline with those of its import, for each number of steps or the default."""
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    made = pipeline(networks[6 if learned else 3], scheduler)
    made.save_pretrained(folder)
    model = diffusion.load(folder)
    for number in steps:
        found = model.sample(num_samples=2, noise=noise, **({} if number is None else {"steps": number}))
        expected = own_images(made, number or model.sampler["steps"])
        assert expected.isfinite().all()
        # Solvers that end in noise have pixels far above 1.
        error = (found - expected).abs().max().item() / max(1.0, expected.abs().max().item())
        assert error < 1e-4, number


DDPM = [
    {},
    *({"timestep_spacing": spacing} for spacing in ("linspace", "trailing")),
    *({"variance_type": name} for name in ("fixed_small_log", "fixed_large", "learned_range")),
    *({"timestep_spacing": "trailing", "variance_type": name} for name in ("fixed_large", "learned_range")),
    {"clip_sample": False},
    {"clip_sample_range": 0.5},
    {"thresholding": True},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 1.5},
    {"steps_offset": 1},
    {"steps_offset": 3, "variance_type": "fixed_large"},
    *({"prediction_type": name} for name in ("sample", "v_prediction")),
    *({"beta_schedule": name} for name in ("scaled_linear", "squaredcos_cap_v2", "sigmoid")),
    {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    *(
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": name}
        for name in ("epsilon", "sample", "v_prediction")
    ),
    {"num_train_timesteps": 100, "beta_end": 0.2},
    {"num_train_timesteps": 20, "trained_betas": [0.01 + 0.01 * i for i in range(20)]},
]
DDIM = [
    {},
    *({"timestep_spacing": spacing} for spacing in ("linspace", "trailing")),
    {"set_alpha_to_one": False},
    {"set_alpha_to_one": False, "steps_offset": 1},
    {"set_alpha_to_one": False, "timestep_spacing": "trailing"},
    {"steps_offset": 1},
    {"clip_sample": False},
    {"clip_sample_range": 0.5},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.2},
    *({"prediction_type": name} for name in ("sample", "v_prediction")),
    *({"beta_schedule": name} for name in ("scaled_linear", "squaredcos_cap_v2")),
    *(
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": name}
        for name in ("epsilon", "v_prediction")
    ),
    {"num_train_timesteps": 100, "beta_end": 0.2, "timestep_spacing": "linspace"},
]
NOISE = {"final_sigmas_type": "sigma_min"}
SOLVER = [
    {},
    *({"timestep_spacing": spacing} for spacing in ("leading", "trailing")),
    {"timestep_spacing": "leading", "steps_offset": 1},
    *({"solver_order": order} for order in (1, 3)),
    {"solver_type": "heun"},
    {"solver_type": "bh2"},
    {"algorithm_type": "sde-dpmsolver++"},
    {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    {"algorithm_type": "sde-dpmsolver++", "euler_at_final": True, **NOISE},
    {"algorithm_type": "deis", **NOISE},
    *({"algorithm_type": "dpmsolver", "solver_order": order, **NOISE} for order in (1, 2, 3)),
    {"algorithm_type": "sde-dpmsolver", **NOISE},
    {"final_sigmas_type": "sigma_min"},
    {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    {"final_sigmas_type": "sigma_min", "euler_at_final": True},
    {"lower_order_final": False, "solver_order": 3},
    {"use_karras_sigmas": True},
    {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
    {"use_karras_sigmas": True, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"},
    {"use_lu_lambdas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.2},
    {"thresholding": True, "algorithm_type": "dpmsolver", **NOISE},
    {"variance_type": "learned_range"},
    {"variance_type": "learned"},
    *({"prediction_type": name} for name in ("sample", "v_prediction")),
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "prediction_type": "v_prediction"},
    *({"rescale_betas_zero_snr": True, "prediction_type": name} for name in ("epsilon", "v_prediction")),
    {"rescale_betas_zero_snr": True, "use_karras_sigmas": True, "prediction_type": "v_prediction"},
]
UNIPC = [
    {},
    *({"timestep_spacing": spacing} for spacing in ("leading", "trailing")),
    {"timestep_spacing": "leading", "steps_offset": 1},
    *({"solver_order": order} for order in (1, 3)),
    {"solver_type": "midpoint"},
    {"solver_type": "bh1", **NOISE},
    {"predict_x0": False, **NOISE},
    {"predict_x0": False, "thresholding": True, **NOISE},  # which then thresholds nothing
    {"lower_order_final": False, **NOISE},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.2},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


def every_value(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fewest that hold each value of each option, with the one of the defaults."""
    names = sorted({name for config in configs for name in config})
    rows = [tuple(repr(config.get(name)) for name in names) for config in configs]
    return [{}, *(configs[i] for i in covering(rows, 1))]


CASES = [
    *(
        pytest.param(scheduler, config, marks=pytest.mark.exhaustive if config not in default else ())
        for scheduler, configs, default in (
            (diffusers.DDPMScheduler, DDPM, every_value(DDPM)),
            (diffusers.DDIMScheduler, DDIM, every_value(DDIM)),
            (diffusers.DPMSolverMultistepScheduler, SOLVER, every_value(SOLVER)),
            (diffusers.UniPCMultistepScheduler, UNIPC, every_value(UNIPC)),
            (diffusers.DDPMParallelScheduler, DDPM[1:6], DDPM[5:6]),
            (diffusers.DDIMParallelScheduler, DDIM[1:6], DDIM[4:5]),
        )
        for config in configs
    ),
]


@pytest.mark.filterwarnings("ignore")  # diffusers' deprecations
@pytest.mark.parametrize(
    "few", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["many", "few"]
)
@pytest.mark.parametrize(
    ("scheduler", "config"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_images_of_every_option(scheduler, config, few, networks, tmp_path):
    """In many steps, and in one and two; by default the latter with the scheduler's own options alone."""
    # From 15 steps on, a solver lowers the order of its last steps only if it is told to.
    many = (7, 17) if scheduler is diffusers.DPMSolverMultistepScheduler else (7,)
    counts = (1, 2) if few else many if config else (1, 2, *many)
    check(tmp_path, networks, scheduler(**config), counts)


@pytest.mark.parametrize(
    ("scheduler", "pipeline", "steps"),
    [
        (diffusers.DDPMScheduler(), diffusers.DDPMPipeline, 1000),
        (diffusers.DDPMScheduler(2000, beta_end=0.01), diffusers.DDPMPipeline, 1000),
        (diffusers.DDPMScheduler(30, beta_end=0.4), diffusers.DDPMPipeline, 30),
        (diffusers.DDIMScheduler(), diffusers.DDPMPipeline, 1000),
        (diffusers.DDIMScheduler(), diffusers.DDIMPipeline, 50),
        (diffusers.DDPMScheduler(clip_sample_range=0.5), diffusers.DDIMPipeline, 50),
        (diffusers.DPMSolverMultistepScheduler(), diffusers.DDPMPipeline, 50),
        (diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing"), diffusers.DDPMPipeline, 1000),
    ],
    ids=str,
)
def test_the_number_of_steps_is_the_pipelines(scheduler, pipeline, steps, networks, tmp_path):
    if steps < 1000:
        check(tmp_path, networks, scheduler, (None,), pipeline)
    else:
        pipeline(networks[3], scheduler).save_pretrained(tmp_path)
    assert diffusion.load(tmp_path).sampler["steps"] == steps


@pytest.mark.thinned(2)
@pytest.mark.parametrize("T", [3, 20, 30, 49, 50, 51, 60, 100])
@pytest.mark.parametrize("offset", [1, 2, 7])
@pytest.mark.parametrize(
    "kind", ["DDPM", "DDIM", "DPMSolverMultistep", "UniPCMultistep", "PNDM", "EulerDiscrete"]
)
def test_an_offset_leaves_room_for_the_steps(kind, offset, T):
    config = {"_class_name": f"{kind}Scheduler", "num_train_timesteps": T, "beta_end": 0.2}
    config |= {"timestep_spacing": "leading", "steps_offset": min(offset, T // 3)}
    read = read_scheduler(config, "DDPMPipeline")
    options = dict(read.conventions["sampler"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpacingWarning)
        table = SAMPLERS[options.pop("name")](read.schedule, **options)
    assert 1 <= len(table) <= T


def test_a_short_schedule_with_an_offset_loads(networks, tmp_path):
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=20, beta_end=0.4, steps_offset=1)
    check(tmp_path, networks, scheduler, (None, 7), diffusers.DDIMPipeline)
    assert diffusion.load(tmp_path).sampler["steps"] == 19  # 20 steps lead to a timestep 20


def test_a_scheduler_made_of_another_keeps_nothing_of_its_options(networks, tmp_path):
    # from_config keeps the options that the class does not have, and so does its configuration.
    kept = diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample_range=0.1).config
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(kept)
    assert "clip_sample_range" in scheduler.config
    check(tmp_path, networks, scheduler, (12,))
    assert diffusion.load(tmp_path).clip is None


@pytest.mark.parametrize("options", [{"guidance_scale": 1.0}, {"clip": 0.3}, {"sampler": "ddim", "steps": 5}])
def test_an_imported_threshold_gives_way_to_an_argument(options, networks, tmp_path):
    diffusers.DDPMPipeline(networks[3], diffusers.DDPMScheduler(thresholding=True)).save_pretrained(tmp_path)
    model = diffusion.load(tmp_path)
    assert model.sampler["dynamic_threshold"] == 0.995
    steps = {"steps": 5} | options
    found = model.sample(num_samples=2, noise=noise, **steps)
    threshold = (
        {"dynamic_threshold": 0.995, "dynamic_threshold_max": 1.0} if "guidance_scale" in options else {}
    )
    own = {key: value for key, value in model.sampler.items() if "threshold" not in key}
    model.sampler = own
    assert torch.equal(found, model.sample(num_samples=2, noise=noise, **steps, **threshold))


def test_an_imported_sampler_is_saved_with_the_model(networks, tmp_path):
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=3, thresholding=True)
    diffusers.DDPMPipeline(networks[3], scheduler).save_pretrained(tmp_path / "theirs")
    model = diffusion.load(tmp_path / "theirs")
    model.save(tmp_path / "ours")
    again = diffusion.load(tmp_path / "ours")
    assert again.sampler == model.sampler
    assert torch.equal(again.schedule.betas, model.schedule.betas)
    images = [found.sample(num_samples=2, noise=noise, steps=6) for found in (model, again)]
    assert torch.equal(*images)


HEUN = [
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"timestep_spacing": "trailing", "clip_sample": True, "clip_sample_range": 0.5},
]


@pytest.mark.parametrize("config", HEUN, ids=str)
def test_heun_is_diffusers(config, networks):
    """Its images are larger by sqrt(sigma^2 + 1) while it samples."""
    scheduler = diffusers.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, **config)
    model = diffusion.load(networks[3], scheduler=scheduler)  # a warning would be an error
    for steps in (2, 7):
        scheduler.set_timesteps(steps)
        x = noise(0) * (scheduler.sigmas[0] ** 2 + 1).sqrt()
        with torch.no_grad():
            for t in scheduler.timesteps:
                output = networks[3](scheduler.scale_model_input(x, t), t).sample
                x = scheduler.step(output, t, x).prev_sample
        found = model.sample(num_samples=2, noise=noise, steps=steps)
        assert (found - x).abs().max() < 1e-4 * max(1.0, x.abs().max())


@pytest.mark.parametrize(
    ("kind", "config", "unlike"),
    [
        ("HeunDiscreteScheduler", {}, "timestep_spacing linspace"),
        ("HeunDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, "steps_offset 1"),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas True"),
        ("UniPCMultistepScheduler", {"disable_corrector": [0]}, r"disable_corrector \[0\]"),
    ],
)
def test_an_option_without_a_counterpart_is_told(kind, config, unlike, networks):
    scheduler = getattr(diffusers, kind)(beta_end=0.03, **config)
    with pytest.warns(
        UserWarning, match=f"{kind} with {unlike} is no sampler of this package; .* is the near"
    ):
        model = diffusion.load(networks[3], scheduler=scheduler)
    assert model.sample(num_samples=1, steps=3).isfinite().all()


NEAREST = {
    "EulerDiscreteScheduler": "ddim",
    "EulerAncestralDiscreteScheduler": "ddpm",
    "KDPM2DiscreteScheduler": "dpm++",
    "KDPM2AncestralDiscreteScheduler": "dpm++",
    "LMSDiscreteScheduler": "dpm++",
    "DEISMultistepScheduler": "dpm++",
    "PNDMScheduler": "dpm++",
    "SASolverScheduler": "dpm++",
    "LCMScheduler": "ddim",
    "TCDScheduler": "ddim",
}


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("name", NEAREST)
def test_other_schedulers_load_with_the_nearest_sampler(name, networks, tmp_path):
    scheduler = getattr(diffusers, name)(beta_end=0.03, prediction_type="v_prediction")
    diffusers.DDPMPipeline(networks[3], scheduler).save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=f"{name} is no sampler of this package; .* is the nearest"
    ) as caught:
        model = diffusion.load(tmp_path)
    assert "\n" not in str(caught[0].message)
    assert model.sampler["name"] == NEAREST[name]
    assert model.prediction_type == "v_prediction"
    assert torch.equal(model.schedule.alphas_cumprod.float(), torch.cumprod(1 - scheduler.betas, 0))
    assert model.sample(num_samples=1, steps=3).isfinite().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "'EDMEulerScheduler' cannot be imported: its process"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "its process is not that of DDPM"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "its process is not that of DDPM"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "its process is not that of DDPM"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
            "use_flow_sigmas cannot be",
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
            "'flow_prediction'",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "euler"}, "algorithm_type 'euler'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "sigma_min"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "quad"}, "timestep_spacing 'quad'"),
        (
            {"_class_name": "DDPMScheduler", "thresholding": True, "sample_max_value": 0.5},
            "dynamic_threshold_max",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(config, message, networks, tmp_path):
    diffusers.DDPMPipeline(networks[3], diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        diffusion.load(tmp_path)
    assert "\n" not in str(error.value)
