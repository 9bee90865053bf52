"""What tests share: the tiny seeded model, and folders."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A model of two layers with a byte vocabulary and a chat template, trained on 256 tokens."""
    return ROOT / "engine/tests/data/golden/gguf/model.gguf"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store.mka"
