"""Tiny models on disk, made once for all pipeline tests."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from sf_xfuser.bench.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``model_folder(family)``: the folder of that family's tiny model with 8 heads and seed 0."""

    @cache
    def folder(family: str) -> Path:
        return save_tiny_model(family, tmp_path_factory.mktemp("models") / family)

    return folder
