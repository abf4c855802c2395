"""`cloven bench rounds`: what a generated token costs in exchanges with and without drafted tokens, and what that is worth on a link.

A model with real weights is split; this process generates greedily with a worker process, from a text that repeats itself and from one
that does not. Plain decoding, prompt lookup and an assistant follow one another with each simulated round trip; figures are medians.
Pads are made by the look-ahead, as for `cloven generate`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cloven.bench.decoding import check_measurements
from cloven.cluster.worker_process import WorkerProcess
from cloven.errors import BadInput
from cloven.model.assistant import open_assistant
from cloven.model.attach import attach
from cloven.model.runtime import Session
from cloven.model.source import Source, open_source
from cloven.slip.config import SlipConfig
from cloven.slip.prepare import prepare_slip
from cloven.zoo.demo import demo_model_path
from cloven.zoo.text import PROMPTS

AWAY = ":\nAway with him!\n\n"
TEXTS = {"repetitive": f"First Citizen{AWAY}Second Citizen{AWAY}First Citizen{AWAY}Second Citizen:\n", "ordinary": PROMPTS[1]}
RTTS_MS = (1.0, 10.0)
PLAIN, LOOKUP, ASSISTANT = "plain", "prompt lookup", "assistant"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DraftFigures:
    """One way to decode one text, per generated token; `rows_per_token` counts rows (pads) of a group after the prompt's;
    speeds are by round trip in ms, the prompt included."""

    text: str
    drafts: str
    new_tokens: int
    tokens_identical: bool
    exchanges_per_token: float
    rows_per_token: float
    tokens_per_s: dict[str, float]


@dataclass(frozen=True)
class RoundsBench:
    """Medians of one interleaved run. With `assistant_is_the_model` the assistant's figures are an upper bound, not a use."""

    model: str
    precision: str
    dtype: str
    rounds: int
    prompt_lookup: int
    assistant: str | None
    assistant_is_the_model: bool
    results: list[DraftFigures]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Run:
    tokens: Tensor
    seconds: float
    exchanges: int
    rows: int


def bench_rounds(
    progress: Progress,
    model: str | None = None,
    *,
    assistant: str | None = None,
    prompt_lookup: int = 5,
    tokens: int = 32,
    rtts_ms: Sequence[float] = RTTS_MS,
    rounds: int = 3,
    precision: str = "int8x2",
    dtype: str = "float32",
) -> RoundsBench:
    """Measure a model.

    Args:
        model: a model directory or a Hub id; None: the demo model.
        assistant: a small model with the same vocabulary; None: the demo model for itself, none for another model.
        prompt_lookup: tokens drafted at a time.
        tokens: new tokens per text.
        rtts_ms: round trips to simulate, in milliseconds, besides none.
        dtype: auto, float32 or bfloat16, of the split model and the assistant.

    Raises:
        BadInput: the model or the assistant cannot be used, or an impossible number.
    """
    check_measurements(rtts_ms)
    if prompt_lookup < 1 or tokens < 1 or rounds < 1:
        raise BadInput("prompt_lookup, tokens and rounds: give 1 or more")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise BadInput(f"dtype {dtype!r}: choose auto, float32 or bfloat16")
    path = model or str(demo_model_path())
    source = open_source(path)
    tokenizer = _tokenizer(path, source)
    helper = assistant or (path if model is None else None)
    drafts: dict[str, dict[str, Any]] = {PLAIN: {}, LOOKUP: {"prompt_lookup_num_tokens": prompt_lookup}}
    if helper is not None:
        drafts[ASSISTANT] = {"assistant_model": _converted(open_assistant(helper, source.config).load(), dtype)}
    rtts = (0.0, *dict.fromkeys(rtts_ms))
    with tempfile.TemporaryDirectory(prefix="cloven-bench-") as folder:
        bundle = prepare_slip(path, Path(folder) / "out", SlipConfig(precision=precision), progress)
        split = AutoModelForCausalLM.from_pretrained(bundle.trusted, dtype=dtype, trust_remote_code=False)
        split.generation_config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        inputs = {name: dict(tokenizer(text, return_tensors="pt")) for name, text in TEXTS.items()}
        keys = [(text, name, rtt) for rtt in rtts for text in TEXTS for name in drafts]
        runs: dict[tuple[str, str, float], list[_Run]] = {key: [] for key in keys}
        with WorkerProcess(bundle.exposed) as worker, attach(split, worker.address, timeout=120.0) as session:
            _generate(split, session, inputs["ordinary"], min(tokens, 8), {}, 0.0)  # warms up
            for done in range(rounds):
                for index, (text, name, rtt) in enumerate(keys):
                    progress("generating", done * len(keys) + index, rounds * len(keys))
                    runs[text, name, rtt].append(_generate(split, session, inputs[text], tokens, drafts[name], rtt / 1000))
    return RoundsBench(
        model=source.name,
        precision=precision,
        dtype=dtype,
        rounds=rounds,
        prompt_lookup=prompt_lookup,
        assistant=Path(helper).name if helper is not None else None,
        assistant_is_the_model=helper is not None and helper == path,
        results=[_figures(text, name, rtts, runs) for text in TEXTS for name in drafts],
    )


def _converted(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    return model.eval() if dtype == "auto" else model.to(getattr(torch, dtype)).eval()


def _tokenizer(model: str, source: Source) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"{model}: its tokenizer cannot be loaded, and the texts need one") from error


def _generate(model: PreTrainedModel, session: Session, inputs: dict[str, Tensor], tokens: int, drafts: dict[str, Any], rtt: float) -> _Run:
    session.telemetry.reset()
    session.channel.simulated_rtt = rtt
    started = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **drafts)
    seconds = time.perf_counter() - started
    prompt = inputs["input_ids"].shape[1]
    rows = max(layer.rows for layer in session.statistics().values())  # the head's are fewer: it needs no logits of the prompt
    return _Run(output[0, prompt:], seconds, session.telemetry.total().exchanges, rows - prompt)


def _figures(text: str, name: str, rtts: Sequence[float], runs: dict[tuple[str, str, float], list[_Run]]) -> DraftFigures:
    plain, first = runs[text, PLAIN, 0.0][0], runs[text, name, 0.0][0]
    count = len(first.tokens)
    return DraftFigures(
        text=text,
        drafts=name,
        new_tokens=count,
        tokens_identical=all(torch.equal(plain.tokens, run.tokens) for rtt in rtts for run in runs[text, name, rtt]),
        exchanges_per_token=first.exchanges / count,
        rows_per_token=first.rows / count,
        tokens_per_s={f"{rtt:g}": count / statistics.median(run.seconds for run in runs[text, name, rtt]) for rtt in rtts},
    )
