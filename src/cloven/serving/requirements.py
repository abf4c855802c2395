"""What the endpoint needs of other packages, checked before anything is loaded.

transformers promises nothing about the inside of its server. What is relied upon is listed here; where it has changed, this says so at the
start, and not in the middle of somebody's answer.
"""

from __future__ import annotations

import importlib.util
import inspect

from cloven.errors import RunError

PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic", "starlette", "httpx")
_INSTALL = "install it with pip install 'cloven[serve]'"
_CB = "generation.continuous_batching"
# class of transformers -> method -> parameters that are given or taken
_EXPECTED = {
    ("cli.serving.chat_completion", "ChatCompletionHandler", "handle_request"): ("body", "request_id"),
    ("cli.serving.chat_completion", "ChatCompletionHandler", "_build_generation_config"): ("body", "model_generation_config", "use_cb"),
    ("cli.serving.chat_completion", "ChatCompletionHandler", "_build_completion"): ("request_id", "content", "model_id"),
    ("cli.serving.completion", "CompletionHandler", "handle_request"): ("body", "request_id"),
    ("cli.serving.completion", "CompletionHandler", "_build_generation_config"): ("body", "model_generation_config", "use_cb"),
    ("cli.serving.model_manager", "ModelManager", "load_model_and_processor"): ("model_id_and_revision",),
    ("cli.serving.model_manager", "ModelManager", "process_model_name"): ("model_id",),
    ("cli.serving.utils", "GenerationState", "get_manager"): ("model_id", "use_cb"),
    ("cli.serving.utils", "GenerationState", "use_continuous_batching"): ("model", "modality"),
    ("cli.serving.utils", "BaseGenerateManager", "generate_streaming"): (
        "model",
        "processor",
        "inputs",
        "gen_config",
        "request_id",
        "response_parser",
    ),
    ("cli.serving.utils", "BaseGenerateManager", "generate_non_streaming"): ("model", "processor", "inputs", "gen_config", "request_id"),
    ("cli.serving.utils", "DirectStreamer", "__init__"): ("tokenizer", "loop", "queue", "response_parser"),
    ("cli.serving.utils", "DirectStreamer", "_enqueue"): ("item",),
    (f"{_CB}.continuous_api", "ContinuousBatchingManager", "__init__"): ("model", "generation_config", "continuous_batching_config"),
    (f"{_CB}.continuous_api", "ContinuousBatchingManager", "add_request"): ("input_ids", "request_id", "max_new_tokens", "eos_token_id"),
    (f"{_CB}.continuous_api", "ContinuousBatchingManager", "register_result_handler"): ("request_id", "callback"),
    (f"{_CB}.continuous_api", "ContinuousBatchingManager", "stop"): ("block", "timeout", "hard_stop"),
    (f"{_CB}.continuous_api", "ContinuousBatchingManager", "_run_generation_loop"): ("use_inference_mode",),
    (f"{_CB}.continuous_api", "ContinuousBatchingManager", "_handle_critical_error"): ("error", "batch_processor"),
    (f"{_CB}.cb_logits_processors", "ContinuousBatchingLogitsProcessor", "prepare_tensor_args"): ("requests_with_new_token",),
    (f"{_CB}.cb_logits_processors", "ContinuousBatchingLogitsProcessorList", "__init__"): ("logits_processor",),
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
            owner = getattr(importlib.import_module(f"transformers.{module}"), kind)
            has = inspect.signature(getattr(owner, method)).parameters
        except (ImportError, AttributeError) as error:
            raise RunError(f"transformers {transformers.__version__} has no server with {kind}.{method}: {_INSTALL}") from error
        if not set(wanted) <= set(has):
            raise RunError(
                f"transformers {transformers.__version__}: {kind}.{method} of its server has changed, and cloven cannot use it: {_INSTALL}"
            )
