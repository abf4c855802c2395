"""One model in a process of its own, measured on command: JSON lines on standard input, one JSON line back for each.

    python -m cloven.bench.runner plain SHAPE LAYERS            the unsplit model, bf16, random weights
    python -m cloven.bench.runner split TRUSTED ADDRESS         the split model, bf16 activations
    python -m cloven.bench.runner stored TRUSTED ADDRESS PADS  the same, with pads from a store
    python -m cloven.bench.runner keyed EXPOSED ADDRESS         the model with a keyed cache, bf16

Commands: {"op": "decode", "tokens": n, "batch": b}, {"op": "decode_rtt", "tokens": n, "rtt": seconds}, {"op": "prefill", "tokens": n},
{"op": "pads", "rows": n}, {"op": "drop_pads"}, {"op": "memory"}, {"op": "memory_while_decoding", "tokens": n}. Each model is alone in
its process, so that its memory can be told.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import cloven
from cloven.bench.commands import answer_commands, claim_output
from cloven.engine.memory import anonymous_bytes, file_mappings
from cloven.model.cache_argument import cache_of, with_cache
from cloven.model.quiet import quiet_transformers
from cloven.model.runtime import Session
from cloven.slip.session import SlipSession
from cloven.zoo.shapes import shape_config

CONTEXT = 8  # tokens before the timed ones
FACTORS = ("secret_a", "secret_b")
OPERATIONS = ("decode", "decode_rtt", "prefill", "pads", "drop_pads", "memory", "memory_while_decoding")


class Stopwatch:
    """Times the decoder layers of a model, from the first one's beginning to the last one's end: `seconds`, of the last pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.seconds = self._started = 0.0
        model.model.layers[0].register_forward_pre_hook(self._start)
        model.model.layers[-1].register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started


class Runner:
    """A loaded model and, if it is split, its session."""

    def __init__(self, model: PreTrainedModel, session: Session | None) -> None:
        self.model, self.session = model.eval(), session
        self._layers = Stopwatch(model)

    @torch.no_grad()
    def decode(self, tokens: int, batch: int = 1) -> dict[str, Any]:
        """Seconds of each of `tokens` greedy steps of `batch` sequences with a KV cache, after CONTEXT tokens.

        `seconds_layers`: of them in the decoder layers, without embedding, last norm and head.
        """
        output = self._context(batch)
        seconds, layers = [], []
        for _ in range(tokens):
            taken, output = self._step(output)
            seconds.append(taken)
            layers.append(self._layers.seconds)
        return {"seconds": seconds, "seconds_layers": layers, **self._traffic(tokens)}

    @torch.no_grad()
    def decode_rtt(self, tokens: int, rtt: float) -> dict[str, Any]:
        """Seconds of `tokens` greedy steps with a simulated round trip of `rtt` seconds, and of one without before each of them."""
        assert self.session is not None
        output = self._context(1)
        seconds, without = [], []
        for _ in range(tokens):
            taken, output = self._step(output)
            without.append(taken)
            self.session.channel.simulated_rtt = rtt
            taken, output = self._step(output)
            self.session.channel.simulated_rtt = 0.0
            seconds.append(taken)
        return {"seconds": seconds, "without": without, **self._traffic(2 * tokens)}

    @torch.no_grad()
    def prefill(self, tokens: int) -> dict[str, Any]:
        """Seconds of one forward pass over `tokens` tokens that keeps the cache and the last logits."""
        ids = torch.arange(tokens).view(1, -1) % self.model.config.vocab_size
        self._reset()
        started = time.perf_counter()
        self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return {"seconds": [time.perf_counter() - started], **self._traffic(1)}

    def pads(self, rows: int) -> dict[str, Any]:
        """Make pads for `rows` rows in every group; seconds per row."""
        assert isinstance(self.session, SlipSession)
        started = time.perf_counter()
        self.session.make_pads(rows)
        return {"seconds": time.perf_counter() - started}

    def drop_pads(self) -> dict[str, Any]:
        """Forget the pads that are ready."""
        assert isinstance(self.session, SlipSession)
        for source in self.session.pads:
            source.forget()
        return {}

    def memory(self) -> dict[str, Any]:
        """This process's own memory and its model's, in bytes; `mapped`: of the model, what is mapped from files, not in `anonymous`."""
        parameters, mappings = list(self.model.parameters()), file_mappings()
        mapped = [p.nbytes for p in parameters if any(start <= p.data_ptr() < end for start, end in mappings)]
        return {"anonymous": anonymous_bytes(), "parameters": sum(p.nbytes for p in parameters), "mapped": sum(mapped)}

    @torch.no_grad()
    def memory_while_decoding(self, tokens: int) -> dict[str, Any]:
        """`memory` after `tokens` steps, with the KV cache alive; its bytes, and those of the model's layers, embedding and factors."""
        output = self._context(1)
        for _ in range(tokens):
            _, output = self._step(output)
        named = dict(self.model.named_parameters())
        return {
            **self.memory(),
            "cache": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache_of(output).layers),
            "layers": sum(p.nbytes for name, p in named.items() if name.startswith("model.layers.")),
            "embeddings": sum(p.nbytes for name, p in named.items() if name.startswith("model.embed_tokens.")),
            "factors": sum(p.nbytes for name, p in named.items() if name.endswith(FACTORS)),
        }

    def _context(self, batch: int) -> Any:
        """The output for CONTEXT tokens in each of `batch` sequences; traffic is counted from here on."""
        ids = (torch.arange(batch * CONTEXT) % self.model.config.vocab_size).view(batch, CONTEXT)
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        self._reset()
        return output

    def _step(self, output: Any) -> tuple[float, Any]:
        """One greedy step after `output`: its seconds, and its output."""
        started = time.perf_counter()
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        output = self.model(input_ids=token, **with_cache(cache_of(output)), use_cache=True)
        return time.perf_counter() - started, output

    def _reset(self) -> None:
        if self.session is not None:
            self.session.telemetry.reset()

    def _traffic(self, tokens: int) -> dict[str, Any]:
        if self.session is None:
            return {}
        total = self.session.telemetry.total()
        return {
            "exchanges": total.exchanges / tokens,
            "bytes_up": total.bytes_up / tokens,
            "bytes_down": total.bytes_down / tokens,
            "seconds_waiting": total.seconds_waiting / tokens,
            "seconds_worker": total.seconds_round_trip / tokens,
        }


def main() -> None:
    """Load what the arguments say, then answer commands."""
    answers = claim_output()
    quiet_transformers()
    kind, *arguments = sys.argv[1:]
    importlib.import_module("transformers.models.llama.modeling_llama")  # the code of the model is not the model
    before = anonymous_bytes()
    if kind == "plain":
        runner = Runner(random_model(*arguments), None)
    elif kind == "keyed":
        model = AutoModelForCausalLM.from_pretrained(Path(arguments[0]))
        runner = Runner(model, cloven.attach(model, arguments[1], timeout=120.0))
    else:
        model = AutoModelForCausalLM.from_pretrained(Path(arguments[0]))
        pads: dict[str, Any] = {"pads": arguments[2]} if kind == "stored" else {"look_ahead": 0}
        session = cloven.attach(model, arguments[1], timeout=120.0, **pads)
        assert isinstance(session, SlipSession)
        runner = Runner(model, session)
    answer_commands(runner, OPERATIONS, answers, before=before)
    if runner.session is not None:
        runner.session.close()


def random_model(shape: str, layers: str) -> PreTrainedModel:
    """A model with random bf16 weights, without the slow initialisation."""
    config = shape_config(shape, int(layers))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not stored
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    for parameter in {id(p): p for p in model.parameters()}.values():
        parameter.data.uniform_(-0.03, 0.03, generator=generator) if parameter.dim() > 1 else parameter.data.fill_(1)
    return model


if __name__ == "__main__":
    main()
