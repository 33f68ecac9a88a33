"""The timesteps that are visited, against diffusers and the DDIM paper's code."""

import hashlib
import math
from fractions import Fraction
from itertools import pairwise

import diffusers
import numpy as np
import pytest

from diffusion.samplers.timesteps import SPACINGS, spaced_timesteps

DIFFUSERS_SPACINGS = SPACINGS[:3]


@pytest.mark.thinned
@pytest.mark.parametrize("T", [1, 2, 3, 7, 100, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("skip_zero", [False, True])
def test_grids_are_strictly_decreasing_for_every_number_of_steps(T, spacing, skip_zero):
    for steps in range(1, T + 1):
        grid = spaced_timesteps(T, steps, spacing, skip_zero=skip_zero).tolist()
        assert len(grid) == steps
        assert all(a > b for a, b in pairwise(grid))
        assert 0 <= grid[-1] <= grid[0] < T
    assert grid == spaced_timesteps(T, None, spacing).tolist() == list(range(T - 1, -1, -1))


@pytest.mark.thinned
@pytest.mark.parametrize("T", [1, 10, 100, 1000])
@pytest.mark.parametrize("spacing", DIFFUSERS_SPACINGS)
def test_grids_are_those_of_diffusers(T, spacing):
    ddpm_scheduler = diffusers.DDPMScheduler(T, timestep_spacing=spacing)
    dpm_scheduler = diffusers.DPMSolverMultistepScheduler(T, timestep_spacing=spacing)
    for steps in range(1, T + 1):
        for scheduler, skip_zero in ((ddpm_scheduler, False), (dpm_scheduler, True)):
            scheduler.set_timesteps(steps)
            theirs = scheduler.timesteps.tolist()
            if skip_zero and steps == T and spacing != "trailing":
                # diffusers spaces T + 1 points here, so that a timestep comes twice
                assert len(set(theirs)) < T or T == 1
            else:
                ours = spaced_timesteps(T, steps, spacing, skip_zero=skip_zero).tolist()
                assert ours == theirs[:steps]
                assert all(t == -1 for t in theirs[steps:])  # a point too many, of arange in floating point


# SHA-256 of the lists that space_timesteps of openai/guided-diffusion (22e0df8) gives for 1..T timesteps in
# increasing order, as Python prints them, one after the other; "none" where it finds no stride.
RESPACED = {
    7: ("db6be530a1fd2a30", "642aff20cfdb60cd"),
    100: ("51de85e1c7c6521c", "f6195931380ae224"),
    1000: ("3b9d245afd1d617c", "abf540765ee322fb"),
}


@pytest.mark.parametrize("T", RESPACED)
def test_timestep_respacing_is_that_of_guided_diffusion(T):
    respaced, stride = hashlib.sha256(), hashlib.sha256()
    for steps in range(1, T + 1):
        respaced.update(repr(spaced_timesteps(T, steps, "respaced").tolist()[::-1]).encode())
        try:
            grid = repr(spaced_timesteps(T, steps, "stride").tolist()[::-1])
        except ValueError:
            grid = "none"
        stride.update(grid.encode())
    assert (respaced.hexdigest()[:16], stride.hexdigest()[:16]) == RESPACED[T]


def test_sections_are_those_of_guided_diffusion():
    assert spaced_timesteps(11, None, "2,0,1,2").tolist() == [10, 9, 6, 2, 0]
    assert spaced_timesteps(11, 5, "2,0,1,2").tolist() == [10, 9, 6, 2, 0]
    # Stride 11 in 0..99, 7.07 in 100..199 and 5.21 in 200..299.
    grid = spaced_timesteps(300, None, "10,15,20").tolist()[::-1]
    assert grid[:10] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert grid[10:25] == [100, 107, 114, 121, 128, 135, 142, 149, 157, 164, 171, 178, 185, 192, 199]
    assert grid[25:32] + grid[-2:] == [200, 205, 210, 216, 221, 226, 231, 294, 299]


@pytest.mark.parametrize("steps", [1, 2, 10, 30, 300, 501, 1000])
def test_uniform_spacing_is_that_of_ermongroup_ddim(steps):
    assert spaced_timesteps(1000, steps, "uniform").tolist()[::-1] == list(range(0, 1000, 1000 // steps))


@pytest.mark.parametrize(("T", "steps"), [(1000, 250), (1000, 37), (1000, 999), (20, 7), (20, 1), (5, 5)])
def test_truncated_spacing_is_that_of_denoising_diffusion_pytorch(T, steps):
    timesteps = spaced_timesteps(T, steps, "truncated").tolist()[::-1]
    assert len(set(timesteps)) == steps
    for k, timestep in enumerate(timesteps, start=1):
        exact = Fraction(T * k, steps) - 1
        # The original computes in float32, so that a timestep a little above a whole number can be below it.
        near_whole = T % steps != 0 and exact - math.floor(exact) < 1e-3
        assert timestep in ({math.floor(exact), math.floor(exact) - 1} if near_whole else {math.floor(exact)})


@pytest.mark.parametrize(
    ("steps", "spacing", "message"),
    [
        (300, "stride", "no 300 of 1,000 timesteps.* the nearest numbers of steps are 250 and 334"),
        (10, "10,15", r"spacing '10,15' has 25 steps, not 10"),
        (None, "0", r"spacing '0' has 0 steps"),
        (None, "501,3", "cannot take 501 timesteps of a section of 500"),
        (3, "1,", "unknown spacing '1,'; choose from: leading"),
        (3, 7, "unknown spacing"),
        (1001, "uniform", "steps must be a whole number in 1..1000"),
    ],
)
def test_spacings_that_there_are_not(steps, spacing, message):
    with pytest.raises(ValueError, match=message) as error:
        spaced_timesteps(1000, steps, spacing)
    assert "\n" not in str(error.value)


def test_quad_spacing_is_that_of_the_ddim_paper():
    # The formula in the published code, for a grid in which no timestep repeats.
    grid = [int(t) for t in np.linspace(0, np.sqrt(1000 * 0.8), 20) ** 2]
    assert spaced_timesteps(1000, 20, "quad").tolist() == grid[::-1]
    # floor(i^2 / 10) for i = 0..9 is 0 0 0 0 1 2 3 4 6 8: the repeated 0 moves the ones after it.
    assert spaced_timesteps(10, 9, "quad").tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]
