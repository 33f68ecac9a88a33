"""One comparison of backends and peers for each case of an op, and the ratios between them."""

import gc

import pytest

from diffusion.kernels import benchmarks


@pytest.fixture(scope="session")
def comparison():
    """comparison(op, case name, dtype, device, backward=, peers=): one object for all runs timed in turn."""
    kept = {}

    def get(name, case, dtype, device, backward=False, peers=None):
        key = (name, case, dtype, device, backward)
        if key not in kept:
            kept.clear()
            gc.collect()
            case = benchmarks.timed_cases(name)[case]
            kept[key] = benchmarks.Comparison(name, case, dtype, device, backward=backward, peers=peers)
        return kept[key]

    return get


@pytest.fixture
def timed(benchmark, comparison):
    """timed(run, op, case name, dtype, device, ...): times a backend or a peer if its result is right."""

    def time(run, name, case, dtype, device, **options):
        compared = comparison(name, case, dtype, device, **options)
        if run in compared.wrong:
            pytest.fail(f"{run} is wrong, and not timed: {compared.wrong[run]}")
        if run not in compared.runs:
            pytest.skip(f"{run} does not serve this call")
        direction = "forward and backward" if compared.backward else "forward"
        benchmark.group = f"{name} {case} {str(dtype).removeprefix('torch.')} {device} {direction}"
        benchmark.extra_info |= {"run": run, "auto": compared.auto, "peers": list(compared.peers)}
        with compared.grad_mode():
            call = compared.one_call(run)
            call()
            benchmark(call)

    return time


def pytest_terminal_summary(terminalreporter, config):
    """The speed of the backend chosen by "auto", as a multiple of each peer's."""
    session = getattr(config, "_benchmarksession", None)
    groups = {}
    for timing in session.benchmarks if session else ():
        if "run" in timing.extra_info and not timing.has_error:
            groups.setdefault(timing.group, {})[timing.extra_info["run"]] = timing
    if groups:
        terminalreporter.section("ratios of medians")
    for group, runs in groups.items():
        info = next(iter(runs.values())).extra_info
        if info["auto"] in runs:
            ours = runs[info["auto"]].stats.median
            ratios = [f"{runs[p].stats.median / ours:.2f}x {p}" for p in info["peers"] if p in runs]
            terminalreporter.write_line(f"{group}: {info['auto']} {ours * 1e6:.0f} us, {', '.join(ratios)}")
