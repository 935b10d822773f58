"""Fixtures of all tests: fixed seeds, a private cache, where real data may lie."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_state():
    """Every test begins alike, whatever jobs ran in this process before it."""
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True, scope="session")
def _private_home(tmp_path_factory):
    """Nothing a test does may touch, or profit from, the user's own cache and settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        for name in ("MTL_DATA", "MTL_CACHE", "MTL_ALLOW_CODE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Directory with the real UTKFace archive; tests that want it skip without it."""
    path = os.environ.get("MTL_TEST_DATA")
    if not path or not (Path(path) / "UTKFace.tar.gz").is_file():
        pytest.skip("MTL_TEST_DATA does not name a directory with UTKFace.tar.gz")
    return Path(path)
