import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from diffusion.utils.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):  # until the heap is as large as they need
    torch.ones(12 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(12 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is for glibc")
def test_kept_memory_costs_no_page_faults():
    """Blocks of 48 MiB, larger than any that glibc keeps of its own accord."""

    def faults(what):
        return int(subprocess.check_output([sys.executable, "-c", FAULTS, what], text=True))

    given_back = faults("give back")
    if given_back < 1000:
        pytest.skip("this system's C library keeps large blocks anyway, or its pages are huge")
    assert faults("keep") < given_back / 5
