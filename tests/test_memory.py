"""Peak memory in bytes, on systems that report KiB and on those that report bytes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rarefy.probes import generation, memory


@pytest.mark.parametrize(("platform", "expected"), [("linux", 7 * 1024), ("freebsd14", 7 * 1024), ("darwin", 7)])
def test_the_unit_is_the_systems(monkeypatch: pytest.MonkeyPatch, platform: str, expected: int) -> None:
    monkeypatch.setattr(memory.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=7))
    monkeypatch.setattr(memory.sys, "platform", platform)
    assert memory.peak_bytes() == expected
    assert generation.peak_bytes is memory.peak_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_is_what_the_kernel_says() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    if "VmHWM" not in status:
        pytest.skip("this kernel does not say")
    assert memory.peak_bytes() == pytest.approx(int(status["VmHWM"].split()[0]) * 1024, rel=0.05)
