from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
from typing import Any

import pytest

import cloven
from tests.split_models import run_python

SECURITY_RELEVANT = ("Bundle", "Session", "Worker", "attach", "evaluate", "generate_keys", "prepare_slip")


def test_the_public_names() -> None:
    assert set(cloven.__all__) == {
        "AdapterServerProcess",
        "Bundle",
        "ClovenConfig",
        "ClovenError",
        "Session",
        "SlipConfig",
        "Worker",
        "WorkerProcess",
        "attach",
        "demo_model_path",
        "evaluate",
        "generate_keys",
        "EnclaveProcess",
        "KvShieldConfig",
        "PrivateLoraConfig",
        "adapt",
        "demo_adapter_path",
        "prepare_private_lora",
        "open_bundle",
        "prepare_kv_shield",
        "prepare_slip",
    }
    assert set(cloven.__all__) <= set(dir(cloven))


@pytest.mark.parametrize("name", cloven.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    thing = getattr(cloven, name)
    text = inspect.getdoc(thing) or ""
    assert len(text.splitlines()[0]) > 15 and text.splitlines()[0][-1] in ".:"
    assert getattr(cloven, name) is thing  # kept, not imported again


@pytest.mark.parametrize("name", SECURITY_RELEVANT)
def test_what_matters_for_security_says_what_it_guarantees_and_what_not(name: str) -> None:
    text = inspect.getdoc(getattr(cloven, name)) or ""
    assert "Guarantee" in text
    assert re.search(r"[Nn]ot hidden|nothing is guaranteed|Guarantee: the manifests|[Nn]ot protect", text), name


@pytest.mark.parametrize("name", ["attach", "evaluate", "generate_keys", "open_bundle", "prepare_slip"])
def test_functions_say_what_they_raise(name: str) -> None:
    assert "Raises:" in (inspect.getdoc(getattr(cloven, name)) or "")


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'cloven' has no attribute 'prepare_kv'"):
        _ = cloven.prepare_kv
    assert not hasattr(cloven, "torch")


def test_the_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", cloven.__version__)


def test_looking_at_a_name_imports_only_what_it_needs() -> None:
    script = "import sys, cloven; cloven.ClovenError, cloven.SlipConfig, dir(cloven); print('torch' in sys.modules)"
    assert run_python(script).stdout == "False\n"


NO_MODULES = (
    "cloven.__main__",
    "cloven.field.native._kernels",
    "cloven.kv_shield.native._step",
    "cloven.wire.native._bell",
    "cloven.worker.native._serve",
)
# a program; C libraries beside their Python modules


def modules() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(cloven.__path__, "cloven.") if module.name not in NO_MODULES]
    return [name for name in names if name != "cloven.field.triton_combine" or importlib.util.find_spec("triton") is not None]


@pytest.mark.parametrize("name", modules())
def test_every_module_says_what_it_is_for(name: str) -> None:
    assert len(importlib.import_module(name).__doc__ or "") > 20


def errors() -> list[Any]:
    from cloven import errors as module

    return [value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, Exception)]


@pytest.mark.parametrize("error", errors(), ids=lambda error: error.__name__)
def test_every_error_is_caught_as_a_cloven_error(error: Any) -> None:
    assert issubclass(error, cloven.ClovenError) and error.__doc__ and error.exit_code in (1, 2, 3, 130)
