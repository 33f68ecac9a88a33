"""Help of the options that several samplers have."""

STEPS_OFFSET = "added to the timesteps of leading spacing"
SET_ALPHA_TO_ONE = "lead the last step to an image without noise, not to the noise of timestep 0"
EPSILON_AT_ZERO_SNR = "take epsilon prediction at zero SNR, dividing by a tiny signal as diffusers does"
NOISE_IN_LAST_STEP = "add noise in the last step, too, unless it starts at timestep 0"
