"""What tests share: the tiny seeded model, and folders."""

from __future__ import annotations

import os
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


@pytest.fixture(params=["tiny", "default"])
def cancelled_model(request: pytest.FixtureRequest, tiny_model: Path) -> Path:
    """Models to cancel: the tiny one, and the default one, whose token takes longer than anything else."""
    if request.param == "tiny":
        return tiny_model
    cache = Path(os.environ.get("MKA_CACHE", Path.home() / ".cache/mka"))
    model = cache / "models/SmolLM2-135M-Instruct-Q4_1.gguf"
    if not model.exists():
        pytest.skip(f"the default model is not in {cache}")
    return model


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store.mka"
