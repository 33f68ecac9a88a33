"""Networks that people hold, beside the engines that run them: python -m benchmarks.networks."""
