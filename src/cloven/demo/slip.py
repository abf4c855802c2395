"""`cloven demo slip`: split the shipped model, run it in two processes, compare, and look at what the worker saw."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cloven.audit.exposed_only import exposed_model
from cloven.bundle.bundle import Bundle
from cloven.bundle.exposed_copy import ExposedCopy
from cloven.cluster.worker_process import WorkerProcess
from cloven.demo.uniformity import chi_square_of_low_bytes
from cloven.errors import RunError
from cloven.field.codec import encode
from cloven.field.residues import centre
from cloven.model.attach import attach
from cloven.slip.config import SlipConfig
from cloven.slip.prepare import prepare_slip
from cloven.slip.session import SlipSession
from cloven.worker.transcript import read_transcript
from cloven.zoo.demo import demo_model_path
from cloven.zoo.text import PROMPTS, perplexity, sample_text

Progress = Callable[[str, int, int], None]
TEXT_SEED = 2024


@dataclass(frozen=True)
class WorkerSaw:
    """What was recorded at the worker: vectors, and the chi-square test of their low bytes against uniform."""

    vectors: int
    bytes_tested: int
    chi_square_p: float
    example: list[int]


@dataclass(frozen=True)
class SlipDemo:
    """The demo's figures. Speeds, exchanges and bytes are those of int8x2."""

    tokens_identical: int
    tokens_identical_int8: int
    prompts: int
    new_tokens: int
    bit_exact: bool
    trusted_pid: int
    worker_pid: int
    exchanges_per_token: float
    bytes_up_per_token: float
    bytes_down_per_token: float
    tokens_per_s_plain: float
    tokens_per_s_protected: float
    pad_seconds_per_token: float
    secret_fraction: float
    perplexity_original: float
    perplexity_protected: float
    perplexity_protected_int8x2: float
    perplexity_exposed_only: float
    perplexity_exposed_unscrambled: float
    perplexity_tokens: int
    worker_saw: WorkerSaw
    example_prompt: str
    example_text: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _SplitRun:
    tokens: list[Tensor]
    seconds: float
    worker_pid: int
    exchanges: int
    bytes_up: int
    bytes_down: int
    pad_seconds: float
    bit_exact: bool
    perplexity: float
    saw: WorkerSaw


def run_slip_demo(
    progress: Progress, prompts: int = len(PROMPTS), new_tokens: int = 64, sequences: int = 16, length: int = 256
) -> SlipDemo:
    """Run the whole demo in a temporary directory.

    Args:
        prompts, new_tokens: how much to generate, greedily, with the unsplit and both split models.
        sequences, length: size of the text for the perplexities, sampled from the original model at temperature 1.
    """
    path = demo_model_path()
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS[:prompts]]
    progress("sampling text", 0, 1)
    text = sample_text(plain, sequences, length, TEXT_SEED)
    plain_tokens, plain_seconds = _generate(plain, inputs, new_tokens, "unsplit", progress)
    with tempfile.TemporaryDirectory(prefix="cloven-demo-") as folder:
        bundles = {
            precision: prepare_slip(path, Path(folder) / precision, SlipConfig(precision=precision)) for precision in ("int8x2", "int8")
        }
        runs = {name: _run_split(bundle, Path(folder), inputs, new_tokens, text, name, progress) for name, bundle in bundles.items()}
        progress("what the exposed half is worth", 0, 1)
        scrambled = perplexity(exposed_model(bundles["int8"], knows_scramble=False), text)
        unscrambled = perplexity(exposed_model(bundles["int8"], knows_scramble=True), text)
    best, fast = runs["int8x2"], runs["int8"]
    count = sum(len(tokens) for tokens in best.tokens)
    return SlipDemo(
        tokens_identical=sum(map(torch.equal, plain_tokens, best.tokens)),
        tokens_identical_int8=sum(map(torch.equal, plain_tokens, fast.tokens)),
        prompts=len(inputs),
        new_tokens=new_tokens,
        bit_exact=best.bit_exact and fast.bit_exact,
        trusted_pid=os.getpid(),
        worker_pid=best.worker_pid,
        exchanges_per_token=best.exchanges / count,
        bytes_up_per_token=best.bytes_up / count,
        bytes_down_per_token=best.bytes_down / count,
        tokens_per_s_plain=sum(len(tokens) for tokens in plain_tokens) / plain_seconds,
        tokens_per_s_protected=count / best.seconds,
        pad_seconds_per_token=best.pad_seconds,
        secret_fraction=bundles["int8x2"].manifest.summary["secret_fraction"],
        perplexity_original=perplexity(plain, text),
        perplexity_protected=fast.perplexity,
        perplexity_protected_int8x2=best.perplexity,
        perplexity_exposed_only=scrambled,
        perplexity_exposed_unscrambled=unscrambled,
        perplexity_tokens=text[:, 1:].numel(),
        worker_saw=best.saw,
        example_prompt=PROMPTS[0],
        example_text=tokenizer.decode(best.tokens[0], skip_special_tokens=True),
    )


def _run_split(bundle: Bundle, folder: Path, inputs: list[Any], new_tokens: int, text: Tensor, name: str, progress: Progress) -> _SplitRun:
    transcript = folder / f"{name}.transcript"
    model = AutoModelForCausalLM.from_pretrained(bundle.trusted, dtype=torch.float32)
    with WorkerProcess(bundle.exposed, None, "--record", str(transcript)) as worker:
        with attach(model, worker.address) as session:
            assert isinstance(session, SlipSession)
            worker.require_running()
            exact = all_products_exact(session, bundle)
            session.telemetry.reset()
            tokens, seconds = _generate(model, inputs, new_tokens, f"split, {name}", progress)
            total = session.telemetry.total()
            pads = session.pad_seconds_per_row()
            progress(f"perplexity, {name}", 0, 1)
            measured = perplexity(model, text)
        worker.require_running()
        pid = worker.pid
    return _SplitRun(
        tokens, seconds, pid, total.exchanges, total.bytes_up, total.bytes_down, pads, exact, measured, _what_it_saw(transcript)
    )


def _generate(model: PreTrainedModel, inputs: list[Any], new_tokens: int, stage: str, progress: Progress) -> tuple[list[Tensor], float]:
    """Greedy text for every prompt: the new tokens, and the seconds for all."""
    tokens, started = [], time.perf_counter()
    for done, one in enumerate(inputs):
        progress(f"generating, {stage}", done, len(inputs))
        output = model.generate(**one, max_new_tokens=new_tokens, do_sample=False)
        tokens.append(output[0, one["input_ids"].shape[1] :])
    return tokens, time.perf_counter() - started


def all_products_exact(session: SlipSession, bundle: Bundle) -> bool:
    """Whether every group's masked product through both processes equals the same integers multiplied in this process, bit for bit."""
    copy = ExposedCopy(bundle.exposed, bundle.manifest)
    generator = torch.Generator().manual_seed(0)
    for offloaded in session.offloaded:
        x = torch.randn(3, offloaded.columns, dtype=torch.float64, generator=generator)
        x_int, _ = encode(x, offloaded.bounds)
        expected = centre(x_int.to(torch.int64) @ copy.mapped(offloaded.group).to(torch.int64).t())
        if not torch.equal(offloaded.integer_product(x_int), expected):
            return False
    return True


def _what_it_saw(transcript: Path) -> WorkerSaw:
    records = [c for _, c in read_transcript(transcript)]
    if not records:
        raise RunError("the worker recorded nothing")
    low_bytes = torch.cat([(c & 0xFF).flatten() for c in records])
    return WorkerSaw(
        vectors=sum(c.shape[0] for c in records),
        bytes_tested=low_bytes.numel(),
        chi_square_p=chi_square_of_low_bytes(low_bytes),
        example=records[-1][-1, :8].tolist(),
    )
