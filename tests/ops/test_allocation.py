"""glibc keeps freed memory; another C library is left alone."""

import platform
import subprocess
import sys

import pytest

from solq_lab.allocation import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's memory can be tuned")
@pytest.mark.parametrize("keep", [True, False])
def test_glibc_takes_both_settings(keep: bool):
    # How often a kept block is used again depends on where the system put the heap, so no count of pages is claimed.
    code = f"from solq_lab.allocation import keep_freed_memory; raise SystemExit(not keep_freed_memory(keep={keep}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
