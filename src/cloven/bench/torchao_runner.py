"""torchao's int8 weight-only model in a process of its own, measured on command, see `cloven.bench.commands`.

    python -m cloven.bench.torchao_runner SHAPE LAYERS LENGTH FOLDER

The unsplit model with random weights; LENGTH: of the KV cache; FOLDER: where Inductor keeps what it compiles.

Three ways to run it are tried once at the beginning, and the fastest one is used from then on: as it is (`eager`), with `torch.compile`
(`compiled`), and with weights that are constants of the compiled code (`compiled, frozen`), by which Inductor uses its int8 product for
CPUs. Compiled code needs a KV cache of a fixed length. Command: {"op": "decode", "tokens": n}.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from cloven.bench.commands import answer_commands, claim_output
from cloven.bench.runner import CONTEXT, random_model
from cloven.model.cache_argument import with_cache
from cloven.model.quiet import quiet_transformers

OPERATIONS = ("decode",)
EAGER, COMPILED, FROZEN = "eager", "compiled", "compiled, frozen"
WAYS = (EAGER, COMPILED, FROZEN)
TRIAL = 5  # tokens, after one that compiles


class TorchAo:
    """A quantised model.

    Args:
        model: bf16; its linears, the head included, are quantised in place. Where the head is tied to the embedding, the latter stays.
        length: of the KV cache, in tokens.
    """

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        import torchao
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        self.version = f"torchao {torchao.__version__}, torch {torch.__version__}"
        self.model = model.eval()
        self._static = StaticCache(config=model.config, max_cache_len=length)  # one: compiled code is compiled for it
        quantize_(self.model, Int8WeightOnlyConfig())
        self.way, self._forward = EAGER, self._forward_of(EAGER)
        self.tokens_per_s: dict[str, float] = {}

    def choose(self, ways: tuple[str, ...] = WAYS) -> None:
        """Try each way, keep the fastest; `tokens_per_s` holds what they reached at best. One that fails to compile reached 0."""
        forwards: dict[str, Callable[..., Any]] = {}
        for way in ways:
            self.way, self._forward = way, self._forward_of(way)
            try:
                self.decode(1)
                self.tokens_per_s[way] = 1 / min(self.decode(TRIAL)["seconds"])
                forwards[way] = self._forward
            except Exception as error:  # of a compiler, whatever it is
                if way == EAGER:
                    raise
                logging.getLogger(__name__).warning("torchao, %s: %s", way, error)
                self.tokens_per_s[way] = 0.0
        self.way = max(forwards, key=lambda way: self.tokens_per_s[way])
        self._forward = forwards[self.way]

    @torch.no_grad()
    def decode(self, tokens: int) -> dict[str, Any]:
        """Seconds of each of `tokens` greedy steps with a KV cache, after CONTEXT tokens: as `Runner.decode`."""
        config = self.model.config
        self._static.reset()
        cache = DynamicCache(config=config) if self.way == EAGER else self._static
        ids = torch.arange(CONTEXT).view(1, CONTEXT) % config.vocab_size
        output = self.model(input_ids=ids, **with_cache(cache), use_cache=True, logits_to_keep=1)
        seconds = []
        for place in range(CONTEXT, CONTEXT + tokens):
            started = time.perf_counter()
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = self._forward(input_ids=token, position_ids=torch.tensor([[place]]), **with_cache(cache), use_cache=True)
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds}

    def _forward_of(self, way: str) -> Callable[..., Any]:
        if way == EAGER:
            eager: Callable[..., Any] = self.model.forward
            return eager
        options: dict[str, Any] = {"freezing": True} if way == FROZEN else {}
        compiled: Callable[..., Any] = torch.compile(self.model.forward, dynamic=False, options=options)
        return compiled


def main() -> None:
    """Load what the arguments say, then answer commands."""
    answers = claim_output()
    quiet_transformers()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # theirs
    shape, layers, length, folder = sys.argv[1:]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    runner = TorchAo(random_model(shape, layers), int(length))
    runner.choose()
    answer_commands(runner, OPERATIONS, answers, version=runner.version, details=runner.way, tokens_per_s=runner.tokens_per_s)


if __name__ == "__main__":
    main()
