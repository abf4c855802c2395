"""Drafted tokens in `cloven generate`: prompt lookup and an assistant change the number of exchanges, and no greedy token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import cloven
from cloven.cluster.worker_process import WorkerProcess
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.prepare import prepare_kv_shield
from cloven.zoo.tiny import tiny_model
from tests.end_to_end.commands import Command, Outcome, one_line
from tests.kv_bundles import enclave as enclave_thread
from tests.lora_bundles import adapted
from tests.split_models import (
    attached,
    demo_bundle,
    demo_model,
    demo_tokenizer,
    greedy,
    random_ids,
    scratch,
    tiny,
    tiny_bundle,
    tiny_folder,
)

REPEATED = "ROMEO:\nI will, I will, I will, I"
ORDINARY = "JULIET:\nO Romeo,"
DEMO = str(cloven.demo_model_path())
DRAFTS = {"prompt lookup": ("--prompt-lookup", "4"), "assistant": ("--assistant", DEMO)}
TOKENS = 12


@pytest.fixture(scope="module")
def permute() -> Path:
    out = scratch() / "drafts-permute"
    prepare_kv_shield(cloven.demo_model_path(), out, KvShieldConfig("permute"))
    return out


def generate(command: Command, worker: WorkerProcess, *arguments: str) -> Outcome:
    trusted = demo_bundle("int8x2").trusted
    return command("generate", str(trusted), "--worker", worker.address, "--dtype", "float32", "--max-new-tokens", str(TOKENS), *arguments)


def expected(prompt: str) -> list[int]:
    return greedy(demo_model(), prompt, TOKENS)


# --- SLIP


@pytest.mark.parametrize("prompt", [REPEATED, ORDINARY])
@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS)
def test_the_same_tokens(draft: tuple[str, str], prompt: str, cloven_here: Command, demo_worker: WorkerProcess) -> None:
    outcome = generate(cloven_here, demo_worker, "--prompt", prompt, "--json", *draft)
    assert outcome.code == 0 and outcome.err == "", outcome.err
    report = json.loads(outcome.out)
    assert report["tokens"] == expected(prompt)
    assert report["exchanges_per_token"] == report["exchanges"] / TOKENS
    assert report["exchanges_per_token"] <= 21  # one pass per token at most
    if draft[0] == "--assistant":  # the model itself: most drafts are right; a draft ends at a token that is not likely enough
        assert report["exchanges_per_token"] < 14


@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS)
def test_several_tokens_at_a_time_are_streamed(draft: tuple[str, str], cloven_here: Command, demo_worker: WorkerProcess) -> None:
    outcome = generate(cloven_here, demo_worker, "--prompt", REPEATED, *draft)
    text = demo_tokenizer().decode(expected(REPEATED), skip_special_tokens=True)
    assert outcome.code == 0 and outcome.out == text + "\n" and outcome.err == ""


def test_sampling_with_an_assistant(cloven_here: Command, demo_worker: WorkerProcess) -> None:
    outcomes = [
        generate(cloven_here, demo_worker, "--prompt", ORDINARY, "--temperature", "1", "--seed", "3", "--json", *DRAFTS["assistant"])
        for _ in range(2)
    ]
    first, second = (json.loads(outcome.out)["tokens"] for outcome in outcomes)
    assert first == second and len(first) == TOKENS


@pytest.mark.parametrize("family", ["gpt2", "gemma", "mistral"])
def test_other_families(family: str) -> None:
    """With an assistant of another family, whose drafts are mostly wrong and are taken back."""
    ids = random_ids(97, 1, 5).repeat(1, 3)  # the text repeats itself
    with attached(tiny_bundle(family, "int8x2")) as (model, session):
        session.telemetry.reset()
        plain = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
        exchanges = session.telemetry.total().exchanges
        for more in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny("llama")}, {"assistant_model": tiny(family)}):
            session.telemetry.reset()
            assert torch.equal(plain, model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0, **more))
            assert session.telemetry.total().exchanges <= exchanges
        assert session.telemetry.total().exchanges < exchanges


# --- KV-Shield and private LoRA


@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS)
def test_kv_shield_permute(draft: tuple[str, str], permute: Path, cloven_here: Command) -> None:
    with enclave_thread(permute / "trusted") as (address, _):
        arguments = ("--enclave", address, "--prompt", REPEATED, "--max-new-tokens", str(TOKENS), "--dtype", "float32", "--json")
        outcome = cloven_here("generate", str(permute / "exposed"), *arguments, *draft)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["tokens"] == expected(REPEATED)


def test_kv_shield_session_cannot_take_drafts_back(cloven_here: Command, tmp_path: Path) -> None:
    prepare_kv_shield(tiny_folder("llama"), tmp_path / "out", KvShieldConfig("session"))
    for draft in DRAFTS.values():
        outcome = cloven_here("generate", str(tmp_path / "out" / "exposed"), "--enclave", "ipc:///nowhere/e", "--prompt", "x", *draft)
        one_line(outcome, 2, "session mode .* cannot take a drafted token back: .*--mode permute")


def test_private_lora(tmp_path: Path) -> None:
    """It works; a drafted row is a query like any other, accepted or not."""
    ids = random_ids(97, 1, 4).repeat(1, 3)
    with adapted(tmp_path) as case:
        plain = case.merged.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        rows = []
        for more in ({}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny("llama")}):
            case.session.telemetry.reset()
            assert torch.equal(plain, case.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **more))
            rows.append(next(iter(case.session.statistics().values())).rows)
        assert rows[0] == 12 + 7 <= min(rows[1:])


# --- what is refused


def test_bad_drafts(cloven_here: Command, demo_worker: WorkerProcess, tmp_path: Path) -> None:
    def refused(match: str, *arguments: str) -> None:
        one_line(generate(cloven_here, demo_worker, "--prompt", ORDINARY, *arguments), 2, match)

    refused("not both", "--prompt-lookup", "3", "--assistant", DEMO)
    refused("no such model directory", "--assistant", str(tmp_path / "nowhere"))
    refused("no config.json", "--assistant", str(tmp_path))
    refused("its vocabulary has 97 tokens, the model's 1024", "--assistant", str(tiny_folder("llama")))
    refused("already quantised or split", "--assistant", str(demo_bundle("int8x2").trusted))
    refused("with 12 new ones and 1000 drafted ones that is more than the model's 512", "--prompt-lookup", "1000")
    for number in ("0", "-1", "many"):
        assert generate(cloven_here, demo_worker, "--prompt", ORDINARY, "--prompt-lookup", number).code == 2


def test_an_assistant_whose_weights_are_missing(cloven_here: Command, demo_worker: WorkerProcess, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((cloven.demo_model_path() / "config.json").read_bytes())
    one_line(generate(cloven_here, demo_worker, "--prompt", ORDINARY, "--assistant", str(tmp_path)), 2, "the weights cannot be loaded")


def test_an_assistant_with_fewer_positions(cloven_here: Command, demo_worker: WorkerProcess, tmp_path: Path) -> None:
    small = tiny_model("gpt2")
    small.config.vocab_size, small.config.n_positions = 1024, 16
    small.config.save_pretrained(tmp_path)
    one_line(generate(cloven_here, demo_worker, "--prompt", ORDINARY, "--assistant", str(tmp_path)), 2, "more than the assistant's 16")


def test_drafts_are_checked_before_anything_is_loaded(cloven_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    bundle, other = demo_bundle("int8x2"), tiny_folder("llama")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    arguments = ("--worker", "ipc:///nowhere/w", "--prompt", ORDINARY, "--assistant", str(other))
    one_line(cloven_here("generate", str(bundle.trusted), *arguments), 2, "its vocabulary has 97 tokens")
