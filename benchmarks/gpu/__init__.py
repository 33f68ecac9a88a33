"""One run of everything on a GPU: parity, times, sanitizers. See `benchmarks/gpu.sh`.

__main__ and run hold the plan, each part of which is a process with a limit; worker runs a part's jobs in it.
"""
