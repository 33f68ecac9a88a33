"""Running the reverse process: the sampling loop, its buffers and the network that it calls."""
