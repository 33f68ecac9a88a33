"""Help of the options that several samplers have."""

STEPS_OFFSET = "added to the timesteps of leading spacing"
SET_ALPHA_TO_ONE = "lead the last step to an image without noise, not to the noise of timestep 0"
EPSILON_AT_ZERO_SNR = "take epsilon prediction at zero SNR, dividing by a tiny signal as diffusers does"
NOISE_IN_LAST_STEP = "add noise in the last step, too, unless it starts at timestep 0"
FINAL_SIGMAS = ("zero", "sigma_min")
FINAL_SIGMAS_TYPE = f"noise that the last step leads to: {', '.join(FINAL_SIGMAS)}"
SOLVER_ORDER = "order of the solver, 1 to 3"
SOLVER_TYPE = "form of the solver: midpoint or heun for the second order of dpm++, bh1 or bh2 for unipc"
