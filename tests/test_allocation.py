"""Kept memory serves the next tensor without a single page of the system's."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from solq_lab.allocation import keep_freed_memory

PAGES = 16_384  # of 4 KiB, 64 MiB: more than glibc ever keeps by itself


def pages_touched_anew() -> int:
    """Page faults of filling a large tensor a second time, after the first was freed."""
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(PAGES * 1024)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's memory can be tuned")
def test_kept_memory_is_used_again_and_given_back_otherwise():
    try:
        assert keep_freed_memory()
        assert pages_touched_anew() < PAGES // 100
        assert keep_freed_memory(keep=False)
        assert pages_touched_anew() > PAGES // 1000
    finally:
        keep_freed_memory(keep=False)


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
