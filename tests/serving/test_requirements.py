from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import transformers.cli.serving.utils as serving_utils

from cloven.errors import RunError
from cloven.serving.requirements import _EXPECTED, PACKAGES, require_serving


def test_what_is_installed_here_is_enough() -> None:
    require_serving()
    assert len(_EXPECTED) > 15


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else real(name, *more))
    with pytest.raises(RunError, match=rf"needs the package {package}: install it with pip install 'cloven\[serve\]'"):
        require_serving()


def test_a_transformers_whose_server_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: Any, model_id: str) -> None:
        del self, model_id

    monkeypatch.setattr(serving_utils, "GenerationState", SimpleNamespace(get_manager=changed))
    with pytest.raises(RunError, match=r"GenerationState\.get_manager of its server has changed"):
        require_serving()
    monkeypatch.setattr(serving_utils, "GenerationState", SimpleNamespace())
    with pytest.raises(RunError, match=r"has no server with GenerationState\.get_manager"):
        require_serving()
