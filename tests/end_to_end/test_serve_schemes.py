"""The same command for the three schemes, each with its own other half: the texts are those of `generate` with the same bundle."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from cloven.cluster.adapter_process import AdapterServerProcess
from cloven.cluster.enclave_process import EnclaveProcess
from cloven.cluster.worker_process import WorkerProcess
from cloven.demo.merged import merged_model
from cloven.worker.transcript import read_transcript
from cloven.zoo.demo import demo_adapter_path, demo_model_path
from tests.end_to_end.commands import Command, one_line
from tests.end_to_end.endpoint import PROMPTS, EndpointProcess, endpoint, kv_demo, lora_demo, streamed, written
from tests.lora_bundles import copied
from tests.split_models import demo_bundle, demo_model, demo_tokenizer, greedy

TOKENS = 10
LONG = "My lord, I know not what to say of this. " * 8
F32 = ("--dtype", "float32")


def same_texts(client: openai.OpenAI, expected: dict[str, str]) -> None:
    """One by one, in pieces, and all at once."""
    first = next(iter(expected))
    assert written(client, first, TOKENS) == streamed(client, first, TOKENS) == expected[first]
    with ThreadPoolExecutor(len(expected)) as pool:
        assert list(pool.map(lambda prompt: written(client, prompt, TOKENS), expected)) == list(expected.values())


def texts(model: object = None, prompts: tuple[str, ...] = (*PROMPTS[:4], LONG)) -> dict[str, str]:
    """What an unprotected model writes; the last prompt is longer than a pass of the model here."""
    model = demo_model() if model is None else model
    return {prompt: demo_tokenizer().decode(greedy(model, prompt, TOKENS, pad_token_id=0), skip_special_tokens=True) for prompt in prompts}  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOVEN_LOG", "INFO")


def batched(process: EndpointProcess, cache: tuple[str, ...]) -> None:
    """Nobody was computed alone, but who does not fit into the cache."""
    assert "one after the other" not in process.log()
    assert process.log().count("computed alone, for its length") == process.log().count("computed alone") == (1 if cache else 0)


SMALL = ("--batch-rows", "32", "--max-running", "8")


TINY = ("--cache-tokens", "64")  # the long prompt goes alone, in another thread of the same session, beside the others
CACHES = pytest.mark.parametrize("cache", [(), pytest.param(TINY, marks=pytest.mark.long)])


@CACHES
def test_slip(cache: tuple[str, ...], demo_worker: WorkerProcess) -> None:
    assert len(demo_tokenizer()(LONG).input_ids) > 2 * 32
    with endpoint(demo_bundle("int8x2").trusted, "--worker", demo_worker.address, *F32, *SMALL, *cache) as (process, client):
        same_texts(client, texts())
        batched(process, cache)


@CACHES
@pytest.mark.parametrize("mode", ["permute", pytest.param("session", marks=pytest.mark.long)])
def test_kv_shield(mode: str, cache: tuple[str, ...]) -> None:
    out = kv_demo(mode)
    with (
        EnclaveProcess(out / "trusted") as peer,
        endpoint(out / "exposed", "--enclave", peer.address, *F32, *SMALL, *cache) as (process, client),
    ):
        assert process.ready["scheme"] == "kv-shield"
        same_texts(client, texts())
        if mode == "permute":
            batched(process, cache)
        else:
            assert "computed one after the other" in process.log()


@CACHES
def test_private_lora(cache: tuple[str, ...], tmp_path: Path) -> None:
    out = copied(lora_demo(), tmp_path / "out")
    base = ("--base", str(demo_model_path()))
    with (
        AdapterServerProcess(out / "server") as server,
        endpoint(out / "client", "--server", server.address, *base, *F32, *SMALL, *cache) as (process, client),
    ):
        assert process.ready["scheme"] == "private-lora"
        expected = texts(merged_model(demo_model_path(), demo_adapter_path()))
        assert expected != texts()
        same_texts(client, expected)
        batched(process, cache)


def passes(recording: Path) -> list[list[tuple[int, int]]]:
    """(group, rows) of what a worker received, one list for each pass of the model."""
    seen = [(group, len(c)) for group, c in read_transcript(recording)]
    groups = max(group for group, _ in seen) + 1
    return [seen[start : start + groups] for start in range(0, len(seen), groups)]


@pytest.mark.long
@pytest.mark.parametrize("running", ["4", "1"])
def test_what_a_worker_sees_with_constant_rows_and_a_fixed_length(running: str, tmp_path: Path) -> None:
    """A text that ends early and one that does not, and others at once: every pass is the same exchanges, and both take as many."""
    bundle, rows, tokens = demo_bundle("int8x2"), 8, 16
    text = texts(prompts=("ROMEO:",))["ROMEO:"]
    counts = []
    for stop in ("never there", text[2:4]):
        recording = tmp_path / f"{len(counts)}"
        arguments = ("--constant-rows", str(rows), "--fixed-length", "--max-running", running, *F32)
        with (
            WorkerProcess(bundle.exposed, None, "--record", str(recording)) as worker,
            endpoint(bundle.trusted, "--worker", worker.address, *arguments) as (_, client),
        ):
            whole = written(client, "ROMEO:", tokens, stop=stop)
            assert whole == (text + whole[len(text) :] if stop == "never there" else text[: text.index(stop)])
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda prompt: written(client, prompt, 3), ("My lord,", LONG)))
        seen = passes(recording)
        assert {rows for one in seen for _, rows in one} == {8}
        assert all([group for group, _ in one] == list(range(len(seen[0]))) for one in seen)
        counts.append(len(seen))
    if running == "1":
        assert counts[0] == counts[1]  # two at once share passes, and how many depends on when they came
    assert min(counts) >= tokens + len(demo_tokenizer()(LONG).input_ids) // rows


def test_constant_rows_are_slips(cloven_here: Command) -> None:
    exposed = str(kv_demo("permute") / "exposed")
    one_line(
        cloven_here("serve", exposed, "--enclave", "ipc:///e", "--port", "0", "--constant-rows", "16"), 2, "constant_rows.* SLIP worker"
    )
