"""llama.cpp with random Q8_0 weights in a process of its own, measured on command, see `cloven.bench.commands`.

    python -m cloven.bench.llama_cpp_runner GGUF LENGTH         a file of `cloven.zoo.random_gguf`; LENGTH: of the KV cache

Command: {"op": "decode", "tokens": n}. The C interface is called directly: nothing of the package llama-cpp-python runs between two
tokens but the calls of `_step`. As many threads as cores; everything else as llama.cpp has it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any

import numpy as np

from cloven.bench.commands import answer_commands, claim_output
from cloven.bench.runner import CONTEXT
from cloven.errors import RunError

OPERATIONS = ("decode",)
_ERROR = 4  # GGML_LOG_LEVEL_ERROR


class LlamaCpp:
    """A loaded model and its context.

    Args:
        path: the GGUF file; length: of the KV cache, in tokens.

    Raises:
        RunError: llama.cpp does not load the file.
    """

    def __init__(self, path: str, length: int) -> None:
        import llama_cpp

        self._library: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(_only_errors)  # kept: the library calls it
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.threads = len(os.sched_getaffinity(0))
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RunError(f"llama.cpp {llama_cpp.__version__} does not load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_threads, options.n_threads_batch = length, self.threads, self.threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RunError(f"llama.cpp {llama_cpp.__version__} makes no context of {length} tokens")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    @property
    def version(self) -> str:
        """Of the package that holds llama.cpp."""
        return f"llama-cpp-python {self._library.__version__}"

    @property
    def details(self) -> str:
        """What the library says about itself: the instructions it was compiled for."""
        return " ".join(str(self._library.llama_print_system_info(), "utf-8").split())

    @property
    def parameters(self) -> int:
        """How many the model has."""
        return int(self._library.llama_model_n_params(self._model))

    def decode(self, tokens: int) -> dict[str, Any]:
        """Seconds of each of `tokens` greedy steps with a KV cache, after CONTEXT tokens: as `Runner.decode`."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        for token in range(CONTEXT):  # singly: llama.cpp compiled by GCC crashes at the matrix unit (AMX), which several at once would use
            self._evaluate(token % self._vocabulary)
        seconds = []
        for _ in range(tokens):
            started = time.perf_counter()
            self._evaluate(int(self.logits().argmax()))
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds}

    def logits(self) -> np.ndarray:
        """The last token's, float32 [vocabulary]; valid until the next step."""
        return np.ctypeslib.as_array(self._library.llama_get_logits_ith(self._context, -1), shape=(self._vocabulary,))

    def _evaluate(self, token: int) -> None:
        array = (ctypes.c_int32 * 1)(token)
        if (code := self._library.llama_decode(self._context, self._library.llama_batch_get_one(array, 1))) != 0:
            raise RunError(f"llama_decode failed with code {code}")


def _only_errors(level: int, text: bytes, _: object) -> None:
    if level == _ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


def main() -> None:
    """Load what the arguments say, then answer commands."""
    answers = claim_output()
    runner = LlamaCpp(sys.argv[1], int(sys.argv[2]))
    about = {"version": runner.version, "details": runner.details, "parameters": runner.parameters}
    answer_commands(runner, OPERATIONS, answers, **about)


if __name__ == "__main__":
    main()
