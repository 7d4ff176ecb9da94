"""Kept memory serves the next tensor without new pages of the system's."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from solq_lab.allocation import keep_freed_memory

PAGES = 16_384  # of 4 KiB, 64 MiB: more than glibc keeps by itself
COUNT_FAULTS = f"""
import resource
import torch
from solq_lab.allocation import keep_freed_memory

assert keep_freed_memory(keep=KEEP)
for _ in range(2):  # the second tensor comes after the first was freed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones({PAGES} * 1024)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's memory can be tuned")
@pytest.mark.parametrize("keep", [True, False])
def test_kept_memory_is_used_again_and_given_back_otherwise(keep: bool):
    code = COUNT_FAULTS.replace("KEEP", str(keep))
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    faults = int(finished.stdout)
    assert faults < PAGES // 100 if keep else faults > PAGES // 1000  # huge pages fault once in 512


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
