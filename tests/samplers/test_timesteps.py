"""The timesteps that are visited, against diffusers and the DDIM paper's code."""

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


def test_quad_spacing_is_that_of_the_ddim_paper():
    # The formula in the published code, for a grid in which no timestep repeats.
    grid = [int(t) for t in np.linspace(0, np.sqrt(1000 * 0.8), 20) ** 2]
    assert spaced_timesteps(1000, 20, "quad").tolist() == grid[::-1]
    # floor(i^2 / 10) for i = 0..9 is 0 0 0 0 1 2 3 4 6 8: the repeated 0 moves the ones after it.
    assert spaced_timesteps(10, 9, "quad").tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]
