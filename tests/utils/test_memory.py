import sys

import pytest

from helpers.processes import start_python

FAULTS = """
import resource
import torch
from diffusion.utils.memory import keep_freed_memory

def faults():
    for _ in range(10):  # until the heap is as large as they need
        torch.ones(12 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(12 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_freed_memory()
print(given_back, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is for glibc")
def test_kept_memory_costs_no_page_faults():
    """Blocks of 48 MiB, larger than any that glibc keeps of its own accord."""
    process = start_python(FAULTS)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    given_back, kept = map(int, output.split())
    if given_back < 1000:
        pytest.skip("this system's C library keeps large blocks anyway, or its pages are huge")
    assert kept < given_back / 5
