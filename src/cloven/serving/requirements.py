"""What the endpoint needs of other packages, checked before anything is loaded.

transformers promises nothing about the inside of its server. What is relied upon is listed here; where it has changed, this says so at the
start, and not in the middle of somebody's answer.
"""

from __future__ import annotations

import importlib.util
import inspect

from cloven.errors import RunError

PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic", "starlette")
_INSTALL = "install it with pip install 'cloven[serve]'"
# class of transformers.cli.serving -> method -> parameters that are given or taken
_EXPECTED = {
    ("chat_completion", "ChatCompletionHandler", "handle_request"): ("body", "request_id"),
    ("chat_completion", "ChatCompletionHandler", "_build_generation_config"): ("body", "model_generation_config", "use_cb"),
    ("chat_completion", "ChatCompletionHandler", "_build_completion"): ("request_id", "content", "model_id"),
    ("completion", "CompletionHandler", "handle_request"): ("body", "request_id"),
    ("completion", "CompletionHandler", "_build_generation_config"): ("body", "model_generation_config", "use_cb"),
    ("model_manager", "ModelManager", "load_model_and_processor"): ("model_id_and_revision",),
    ("model_manager", "ModelManager", "process_model_name"): ("model_id",),
    ("utils", "GenerationState", "get_manager"): ("model_id", "use_cb"),
    ("utils", "GenerationState", "use_continuous_batching"): ("model", "modality"),
    ("utils", "BaseGenerateManager", "generate_streaming"): ("model", "processor", "inputs", "gen_config", "request_id", "response_parser"),
    ("utils", "BaseGenerateManager", "generate_non_streaming"): ("model", "processor", "inputs", "gen_config", "request_id"),
    ("utils", "DirectStreamer", "__init__"): ("tokenizer", "loop", "queue", "response_parser"),
    ("utils", "DirectStreamer", "_enqueue"): ("item",),
}


def require_serving() -> None:
    """Check that the packages are there, and that transformers' server is the one this code was written for.

    Raises:
        RunError: something is missing, or has changed.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(f"serving needs the package {missing[0]}: {_INSTALL}")
    import transformers

    for (module, kind, method), wanted in _EXPECTED.items():
        try:
            owner = getattr(importlib.import_module(f"transformers.cli.serving.{module}"), kind)
            has = inspect.signature(getattr(owner, method)).parameters
        except (ImportError, AttributeError) as error:
            raise RunError(f"transformers {transformers.__version__} has no server with {kind}.{method}: {_INSTALL}") from error
        if not set(wanted) <= set(has):
            raise RunError(
                f"transformers {transformers.__version__}: {kind}.{method} of its server has changed, and cloven cannot use it: {_INSTALL}"
            )
