import subprocess
import sys

import pytest

from equigrad.freed_memory import keep_freed_memory

FAULTS = """
import resource, sys, torch
from equigrad.freed_memory import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    print("refused")
    raise SystemExit
def large(): torch.empty(20 * 2**20).fill_(1)  # 80 MB, which are 20,480 pages of 4 KiB
large()
large()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    large()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(what: str) -> int:
    command = [sys.executable, "-c", FAULTS, what]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if said == "refused":
        pytest.skip("this C library keeps no freed memory on request")
    return int(said)


def test_memory_that_was_freed_serves_the_next_tensor():
    assert page_faults("kept") < page_faults("returned") / 4


def test_a_c_library_without_the_setting_is_said(monkeypatch):
    class Musl:
        pass

    monkeypatch.setattr("ctypes.CDLL", lambda name: Musl())
    assert not keep_freed_memory()
