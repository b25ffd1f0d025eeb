"""One thread per test process; evidence marks are collected and, on request, written beside the catalogue."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
pytest_plugins = ["tests.evidence_plugin"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "evidence(slug, name, kind): this test is evidence for a catalogue row")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
