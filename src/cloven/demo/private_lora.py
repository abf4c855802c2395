"""`cloven demo private-lora`: the shipped adapter at a server, the shipped base at the client, in two processes; beside PEFT's model."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cloven.bench.ledgers import ledgers_in
from cloven.cluster.adapter_process import AdapterServerProcess
from cloven.demo.merged import merged_model
from cloven.private_lora.config import PrivateLoraConfig
from cloven.private_lora.ledger import Ledger
from cloven.private_lora.manifest import ServerManifest
from cloven.private_lora.prepare import LEDGER_FILE, prepare_private_lora
from cloven.private_lora.session import adapt
from cloven.zoo.demo import demo_adapter_path, demo_model_path
from cloven.zoo.text import perplexity, sample_text

Progress = Callable[[str, int, int], None]
PROMPTS = (
    "The castle was built in",
    "In 1998 , the team",
    "He was born in",
    "The song was written by",
    "The ship was",
    "During the war ,",
    "The film received",
    "The species is found in",
    "She played the role of",
    "The city of",
    "After the battle ,",
    "The album was released",
    "The first season of",
    "It was the second",
    "The river flows",
    "Critics praised the",
    "The bird is a",
    "The church was",
    "The game was developed",
    "The government of",
)
BITS = (16, 12, 10, 8)
TEXT_SEQUENCES, TEXT_TOKENS, TEXT_SEED = 4, 200, 5


@dataclass(frozen=True)
class LoraDemo:
    """The demo's figures; `tokens_identical_to_peft` counts greedy texts equal to those of PEFT's merged model.

    `error_by_bits`: ‖logits − PEFT's‖ / ‖PEFT's‖ for answers of so many bits.
    """

    prompts: int
    new_tokens: int
    tokens_identical_to_peft: int
    tokens_different_from_base: int
    error_by_bits: dict[str, float]
    perplexity_base: float
    perplexity_private: float
    perplexity_peft: float
    perplexity_tokens: int
    queries_used: int
    budget: int
    queries_per_token: int
    bytes_up_per_token: float
    bytes_down_per_token: float
    tokens_per_s_peft: float
    tokens_per_s_private: float
    mask_ms_per_token: float
    example_prompt: str
    example_text: str
    example_base: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def run_lora_demo(progress: Progress, prompts: int = len(PROMPTS), new_tokens: int = 64) -> LoraDemo:
    """Run the whole demo in a temporary directory.

    Args:
        prompts, new_tokens: how much to generate, greedily, with PEFT's merged model, privately, and with the base alone.
    """
    path, adapter = demo_model_path(), demo_adapter_path()
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    merged = merged_model(path, adapter)
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS[:prompts]]
    text = sample_text(merged, TEXT_SEQUENCES, TEXT_TOKENS, TEXT_SEED)
    started = time.perf_counter()
    expected = [_generate(merged, ids, new_tokens) for ids in inputs]
    peft_seconds = time.perf_counter() - started
    alone = [_generate(base, ids, new_tokens) for ids in inputs]
    perplexities = {"base": perplexity(base, text), "peft": perplexity(merged, text)}
    budget = sum(ids.shape[1] for ids in expected) + text.numel() + len(BITS) * inputs[0].shape[1]
    with tempfile.TemporaryDirectory(prefix="cloven-demo-") as name, ledgers_in(Path(name)):
        outs = {bits: Path(name) / f"out{bits}" for bits in BITS}
        out = outs[BITS[0]]
        for done, bits in enumerate(BITS):  # all of one adapter, so all with one ledger
            progress("preparing", done, len(BITS))
            config = PrivateLoraConfig(budget, bits=bits)
            prepare_private_lora(path, adapter, outs[bits], config, ledger=None if bits == BITS[0] else out / "server" / LEDGER_FILE)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with AdapterServerProcess(out / "server", None, *(str(outs[bits] / "server") for bits in BITS[1:])) as server:
            session = adapt(model, out / "client", server.address)
            assert session is not None
            with session:
                texts, started = [], time.perf_counter()
                for done, ids in enumerate(inputs):
                    progress("generating", done, len(inputs))
                    texts.append(_generate(model, ids, new_tokens))
                seconds = time.perf_counter() - started
                total, groups = session.telemetry.total(), len(session.remote)
                progress("perplexity", 0, 1)
                perplexities["private"] = perplexity(model, text)
                mask_ms = 1000 * session.mask_seconds_per_row()
            errors = {str(bits): _error(path, outs[bits] / "client", server.address, merged, inputs[0]) for bits in BITS}
        manifest = ServerManifest.read(out / "server")
        with contextlib.closing(Ledger(manifest.ledger_path(out / "server"), manifest.adapter)) as ledger:
            used = max(account.rows for account in ledger.accounts())
    new = sum(ids.shape[1] - prompt.shape[1] for ids, prompt in zip(texts, inputs, strict=True))
    rows = total.rows / groups
    length = inputs[0].shape[1]
    return LoraDemo(
        prompts=len(inputs),
        new_tokens=new_tokens,
        tokens_identical_to_peft=sum(torch.equal(a, b) for a, b in zip(texts, expected, strict=True)),
        tokens_different_from_base=sum(not torch.equal(a, b) for a, b in zip(texts, alone, strict=True)),
        error_by_bits=errors,
        perplexity_base=perplexities["base"],
        perplexity_private=perplexities["private"],
        perplexity_peft=perplexities["peft"],
        perplexity_tokens=text.numel() - len(text),
        queries_used=used,
        budget=budget,
        queries_per_token=groups,
        bytes_up_per_token=total.bytes_up / rows,
        bytes_down_per_token=total.bytes_down / rows,
        tokens_per_s_peft=sum(ids.shape[1] - p.shape[1] for ids, p in zip(expected, inputs, strict=True)) / peft_seconds,
        tokens_per_s_private=new / seconds,
        mask_ms_per_token=mask_ms,
        example_prompt=PROMPTS[0],
        example_text=str(tokenizer.decode(texts[0][0, length:])),
        example_base=str(tokenizer.decode(alone[0][0, length:])),
    )


@torch.no_grad()
def _error(base: Path, client: Path, address: str, merged: Any, ids: Tensor) -> float:
    """Relative error of the logits with a bundle of its own."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    session = adapt(model, client, address, look_ahead=0)
    assert session is not None
    with session:
        expected = merged(input_ids=ids).logits
        return float((model(input_ids=ids).logits - expected).norm() / expected.norm())


def _generate(model: Any, ids: Tensor, new_tokens: int) -> Tensor:
    output: Tensor = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return output
