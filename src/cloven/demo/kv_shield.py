"""`cloven demo kv-shield`: the shipped model with a keyed cache, in two processes; and what a thief of the cache recovers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cloven.audit.attack import Attack
from cloven.audit.kv_shield.audit import TEXT_SEED, TEXT_TOKENS, attack_cache
from cloven.audit.kv_shield.subject import MODES
from cloven.cluster.enclave_process import EnclaveProcess
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.preallocated import PreallocatedCache
from cloven.kv_shield.prepare import prepare_kv_shield
from cloven.kv_shield.session import KvSession
from cloven.model.attach import attach
from cloven.model.cache_argument import with_cache
from cloven.zoo.demo import demo_model_path
from cloven.zoo.text import PROMPTS, sample_text

Progress = Callable[[str, int, int], None]
_RECOVERED = ("table", "sorting", "norms", "gram")


@dataclass(frozen=True)
class KvDemo:
    """The demo's figures. Fractions by mode; `text_identical` counts greedy texts equal to the unprotected model's."""

    prompts: int
    new_tokens: int
    text_identical: dict[str, int]
    tokens_per_s_plain: float
    tokens_per_s: dict[str, float]
    recovered: dict[str, dict[str, float]]
    equal_pairs_found: dict[str, float]
    recovered_known_plaintext: dict[str, float]
    attacks: list[Attack]
    example_prompt: str
    example_text: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def run_kv_demo(progress: Progress, prompts: int = len(PROMPTS), new_tokens: int = 64) -> KvDemo:
    """Run the whole demo in a temporary directory.

    Args:
        prompts, new_tokens: how much to generate, greedily, with the plain model and in every mode; in mode `sealed` the cache is sealed
            and resumed in the middle of every text.
    """
    path = demo_model_path()
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS[:prompts]]
    started = time.perf_counter()
    expected = [_generate(plain, ids, new_tokens) for ids in inputs]
    plain_seconds = time.perf_counter() - started
    identical, speeds = {}, {}
    with tempfile.TemporaryDirectory(prefix="cloven-demo-") as folder:
        for mode in ("permute", "session", "sealed"):
            out = Path(folder) / mode
            config = KvShieldConfig("permute" if mode == "sealed" else mode, seal_idle=mode == "sealed")
            prepare_kv_shield(path, out, config)
            model = AutoModelForCausalLM.from_pretrained(out / "exposed", dtype=torch.float32).eval()
            with EnclaveProcess(out / "trusted") as enclave, attach(model, enclave.address) as session:
                assert isinstance(session, KvSession)
                started = time.perf_counter()
                texts = []
                for done, ids in enumerate(inputs):
                    progress(f"generating, {mode}", done, len(inputs))
                    texts.append(
                        _sealed_in_between(session, model, ids, new_tokens) if mode == "sealed" else _generate(model, ids, new_tokens)
                    )
                speeds[mode] = sum(text.shape[1] - ids.shape[1] for text, ids in zip(texts, inputs, strict=True)) / (
                    time.perf_counter() - started
                )
            identical[mode] = sum(torch.equal(a, b) for a, b in zip(texts, expected, strict=True))
    progress("attacking", 0, 1)
    attacks = attack_cache(plain, sample_text(plain, 1, TEXT_TOKENS, TEXT_SEED)[0])
    value = {(attack.name, attack.scheme.removeprefix("kv-shield/")): attack.value for attack in attacks}
    count = sum(text.shape[1] - ids.shape[1] for text, ids in zip(expected, inputs, strict=True))
    return KvDemo(
        prompts=len(inputs),
        new_tokens=new_tokens,
        text_identical=identical,
        tokens_per_s_plain=count / plain_seconds,
        tokens_per_s=speeds,
        recovered={mode: {name: value[name, mode] for name in _RECOVERED} for mode in MODES},
        equal_pairs_found={mode: value["equal_pairs", mode] for mode in MODES},
        recovered_known_plaintext={mode: value["known_plaintext", mode] for mode in MODES},
        attacks=attacks,
        example_prompt=PROMPTS[0],
        example_text=str(tokenizer.decode(expected[0][0, inputs[0].shape[1] :])),
    )


def _generate(model: Any, ids: Tensor, new_tokens: int, cache: Any = None) -> Tensor:
    output: Tensor = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, **with_cache(cache), pad_token_id=0)
    return output


def _sealed_in_between(session: KvSession, model: Any, ids: Tensor, new_tokens: int) -> Tensor:
    cache = PreallocatedCache(model.config, ids.shape[1] + new_tokens)
    first = _generate(model, ids, max(1, new_tokens // 2), cache)
    if first.shape[1] - ids.shape[1] >= new_tokens or first[0, -1] == model.config.eos_token_id:
        return first
    session.resume(session.seal(cache))
    return _generate(model, first, new_tokens - (first.shape[1] - ids.shape[1]), cache)
