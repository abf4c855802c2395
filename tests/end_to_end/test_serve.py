"""`cloven serve` as OpenAI's client sees it: real processes, a real bundle."""

from __future__ import annotations

import datetime
import json
import signal
import ssl
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cloven.cluster.worker_process import WorkerProcess
from tests.end_to_end.commands import Command, one_line
from tests.end_to_end.endpoint import PROMPTS, TEMPLATE, EndpointProcess, endpoint, streamed, written
from tests.helpers import free_port
from tests.split_models import demo_bundle, demo_model, demo_tokenizer, greedy, run_cloven, scratch

CHAT: Any = [{"role": "user", "content": "Good morrow."}]
TOKENS = 12


def expected(prompt: str, tokens: int = TOKENS) -> str:
    """What the unsplit model writes."""
    return str(demo_tokenizer().decode(greedy(demo_model(), prompt, tokens, pad_token_id=0), skip_special_tokens=True))


def template() -> str:
    path = scratch() / "template.jinja"
    path.write_text(TEMPLATE, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def served(demo_worker: WorkerProcess) -> Iterator[tuple[EndpointProcess, openai.OpenAI]]:
    """The demo model, int8x2, whose greedy texts are those of the unsplit one."""
    arguments = ("--worker", demo_worker.address, "--chat-template", template(), "--dtype", "float32", "--model-name", "bard")
    with endpoint(demo_bundle("int8x2").trusted, *arguments) as running:
        yield running


@pytest.fixture
def client(served: tuple[EndpointProcess, openai.OpenAI]) -> openai.OpenAI:
    return served[1]


# --- answers


def test_what_it_says_when_it_is_ready(served: tuple[EndpointProcess, openai.OpenAI]) -> None:
    process, client = served
    assert process.ready["model"] == "bard" and process.ready["scheme"] == "slip"
    assert process.health() == "ok"
    assert [model.id for model in client.models.list().data] == ["bard"]
    assert client.models.retrieve("bard").owned_by == "cloven"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_completions_are_those_of_generate(client: openai.OpenAI, prompt: str) -> None:
    assert written(client, prompt) == streamed(client, prompt) == expected(prompt)


def test_what_comes_with_a_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="bard", prompt=["ROMEO:"], max_tokens=5, temperature=0, n=1, user="me", presence_penalty=0)
    assert answer.object == "text_completion" and answer.model == "bard" and answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 5, 7)
    assert answer.choices[0].logprobs is None


def test_chat(client: openai.OpenAI) -> None:
    """The chat template makes the prompt; the rest is generate's."""
    text = expected("USER:\nGood morrow.\nROMEO:", 16)
    answer = client.chat.completions.create(model="bard", messages=CHAT, max_completion_tokens=16, temperature=0)
    assert answer.choices[0].message.content == text and answer.choices[0].message.role == "assistant"
    with client.chat.completions.create(model="bard", messages=CHAT, max_tokens=16, temperature=0, stream=True) as pieces:
        parts = list(pieces)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    assert parts[-1].choices[0].finish_reason == "length" and parts[-1].usage is not None
    parted: Any = [{"role": "user", "content": [{"type": "text", "text": "Good morrow."}]}]
    assert client.chat.completions.create(model="bard", messages=parted, max_tokens=16, temperature=0).choices[0].message.content == text


def test_a_stop_string_ends_the_text_and_is_no_part_of_it(client: openai.OpenAI) -> None:
    text = expected("ROMEO:", 40)
    stop = text[9:12]
    before = text[: text.index(stop)]
    answer = client.completions.create(model="bard", prompt="ROMEO:", max_tokens=40, temperature=0, stop=[stop, "never there"])
    assert answer.choices[0].text == before and answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens < 40
    assert streamed(client, "ROMEO:", 40, stop=stop) == before
    chat: Any = {"model": "bard", "messages": CHAT, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**chat).choices[0].message.content or ""
    cut = client.chat.completions.create(**chat, stop=whole[5:7])
    assert cut.choices[0].message.content == whole[: whole.index(whole[5:7])] and cut.choices[0].finish_reason == "stop"


def test_sampling_is_everybodys_own(client: openai.OpenAI) -> None:
    """A seed gives the same text again, whatever others ask for at the same time; another one another text; greedy stays greedy."""

    def sampled(seed: int, temperature: float = 1.0, top_p: float | None = None) -> str:
        more: dict[str, Any] = {} if top_p is None else {"top_p": top_p}
        answer = client.completions.create(model="bard", prompt="ROMEO:", max_tokens=16, temperature=temperature, seed=seed, **more)
        return answer.choices[0].text

    alone = {seed: sampled(seed) for seed in (1, 2)}
    assert alone[1] != alone[2]
    with ThreadPoolExecutor(7) as pool:
        hot = [pool.submit(sampled, seed) for seed in (1, 2, 1)]
        cold = [
            pool.submit(written, client, "ROMEO:", 16),
            pool.submit(sampled, 5, 2.0, 1e-6),
            pool.submit(sampled, 6, 1e-3),
            pool.submit(sampled, 7, 1e-300),
        ]
        assert [job.result() for job in hot] == [alone[1], alone[2], alone[1]]
        assert {job.result() for job in cold} == {expected("ROMEO:", 16)}
    assert (
        len({client.completions.create(model="bard", prompt="ROMEO:", max_tokens=16, temperature=1.5).choices[0].text for _ in range(4)})
        > 1
    )


# --- refusals


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"logprobs": 1}, "logprobs", "unsupported_value"),
        ({"logit_bias": {"5": 100}}, "logit_bias", "unsupported_value"),
        ({"echo": True}, "echo", "unsupported_value"),
        ({"n": 2}, "n", "unsupported_value"),
        ({"best_of": 3}, "best_of", "unsupported_value"),
        ({"suffix": "end"}, "suffix", "unsupported_value"),
        ({"presence_penalty": 1}, "presence_penalty", "unsupported_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**9}, "max_tokens", "invalid_value"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"prompt": ""}, None, "invalid_value"),
        ({"prompt": ["a", "b"]}, "prompt", "invalid_value"),
        ({"prompt": [1, 2]}, "prompt", "invalid_value"),
        ({"prompt": "word " * 3000}, None, "context_length_exceeded"),
        ({"model": "another"}, "model", "model_not_found"),
        ({"extra_body": {"generation_config": '{"num_beams": 4}'}}, "generation_config", "unknown_parameter"),
    ],
)
def test_bad_requests(client: openai.OpenAI, more: dict[str, Any], param: str | None, code: str) -> None:
    """400 (404 for another model) in OpenAI's form, which names the field, and never the value."""
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(**{"model": "bard", "prompt": "Sesame", "stream": stream, **more})
        error: Any = caught.value
        assert error.status_code == (404 if code == "model_not_found" else 400), error
        assert error.code == code and error.type == "invalid_request_error"
        assert (error.param or "").split(".")[0] == (param or "")
        assert "Sesame" not in error.message and "num_beams" not in error.message


@pytest.mark.parametrize(
    "more",
    [
        {"logprobs": True},
        {"top_logprobs": 3},
        {"logit_bias": {"1": 1}},
        {"response_format": {"type": "json_object"}},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        {"messages": [{"role": "nobody", "content": "x"}]},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "no json"}}]}]},
        {"extra_body": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}},
    ],
)
def test_bad_chat_requests(client: openai.OpenAI, more: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**{"model": "bard", "messages": CHAT, "max_tokens": 2, **more})


def test_what_is_not_there(served: tuple[EndpointProcess, openai.OpenAI]) -> None:
    """transformers' own server would load another model, or unload this one, for anybody."""
    process, client = served
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/systemone", "/v1/audio/transcriptions", "/docs", "/openapi.json", "/x"):
        for method in ("GET", "POST"):
            answer = httpx.request(method, process.root + path, json={"model": "gpt2"} if method == "POST" else None)
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found", path
    assert httpx.get(f"{process.root}/v1/completions").status_code == 405
    assert written(client, "ROMEO:", 2) == expected("ROMEO:", 2)


def test_malformed_bodies(served: tuple[EndpointProcess, openai.OpenAI]) -> None:
    process, _ = served
    url, header = f"{process.root}/v1/completions", {"content-type": "application/json"}
    for body in (b"", b"{", b"[1]", b"null", b'{"prompt": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"max_tokens": ' + b"9" * 5000 + b"}"):
        answer = httpx.post(url, content=body, headers=header)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error", body[:20]
    assert httpx.post(url, content=b"x" * (2**20 + 1), headers=header).status_code == 413
    assert httpx.post(url, content=iter([b"x" * 2**19] * 3), headers=header).status_code == 413
    assert httpx.post(url, content=b'{"prompt": "x"}', headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.get(f"{process.root}/v1/models", headers={"host": "evil.example"}).status_code == 421
    assert process.health() == "ok"


# --- many at once


def test_sixteen_clients_at_once(client: openai.OpenAI) -> None:
    """Everybody gets what they would get alone, and nobody waits three times as long as the median."""
    prompts = PROMPTS * 2
    alone = [expected(prompt, 16) for prompt in prompts]

    def timed(prompt: str) -> tuple[str, float]:
        started = time.monotonic()
        return written(client, prompt, 16), time.monotonic() - started

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(timed, prompts))
    assert [text for text, _ in answers] == alone
    seconds = [taken for _, taken in answers]
    assert max(seconds) < 3 * statistics.median(seconds)


def test_a_full_queue_refuses_and_goes_on(demo_worker: WorkerProcess) -> None:
    """One runs, one waits: the others get 429 at once; who leaves makes room, and is not computed to the end."""
    arguments = ("--worker", demo_worker.address, "--max-running", "1", "--max-queue", "1", "--max-tokens", "250", "--dtype", "float32")
    with endpoint(demo_bundle("int8x2").trusted, *arguments) as (process, client):
        name = client.models.list().data[0].id
        long: Any = {"model": name, "prompt": "ROMEO:", "max_tokens": 240, "temperature": 0, "stream": True}
        first = client.completions.create(**long)
        next(iter(first))
        with ThreadPoolExecutor(2) as pool:
            two = [pool.submit(written, client, "ROMEO:", 3) for _ in range(2)]
            done, waiting = wait(two, 30, FIRST_COMPLETED)
            assert len(done) == len(waiting) == 1
            error: Any = done.pop().exception()
            assert isinstance(error, openai.RateLimitError) and error.code == "queue_full"
            assert int(error.response.headers["retry-after"]) >= 1
            left = time.monotonic()
            first.close()
            assert waiting.pop().result(30) == expected("ROMEO:", 3)
            assert time.monotonic() - left < 10  # 240 tokens take longer
        assert process.health() == "ok"


# --- keys, TLS, start and end


def certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    form = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(made.public_bytes(form))
    (folder / "key.pem").write_bytes(key.private_bytes(form, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return folder / "cert.pem", folder / "key.pem"


def test_keys_and_tls(demo_worker: WorkerProcess, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# customers\nfirst-key-0123456789abcdef\n\nsecond-key-0123456789abcdef\n")
    keys.chmod(0o600)
    cert, key = certificate(tmp_path)
    arguments = ("--api-key-file", str(keys), "--tls-certificate", str(cert), "--tls-key", str(key), "--dtype", "float32")
    with EndpointProcess(demo_bundle("int8x2").trusted, "--worker", demo_worker.address, *arguments) as process:
        root = process.root.replace("127.0.0.1", "localhost")
        assert root.startswith("https://")
        trust = ssl.create_default_context(cafile=cert)
        with httpx.Client(verify=trust) as http:
            assert http.get(f"{root}/health").json() == {"status": "ok"}
            for header in ({}, {"authorization": "Bearer first-key"}, {"authorization": "Basic first-key-0123456789abcdef"}):
                answer = http.get(f"{root}/v1/models", headers=header)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        for secret in ("first-key-0123456789abcdef", "second-key-0123456789abcdef"):
            with openai.OpenAI(base_url=f"{root}/v1", api_key=secret, max_retries=0, http_client=httpx.Client(verify=trust)) as client:
                model = client.models.list().data[0].id
                assert client.completions.create(model=model, prompt="ROMEO:", max_tokens=3, temperature=0).choices[0].text == expected(
                    "ROMEO:", 3
                )
        stranger = openai.OpenAI(base_url=f"{root}/v1", api_key="third-key", max_retries=0, http_client=httpx.Client(verify=trust))
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{root}/health")  # the certificate is nobody's that this machine trusts
        assert "key-0123456789abcdef" not in process.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_ends_it_in_the_middle_of_an_answer(number: int, demo_worker: WorkerProcess) -> None:
    """Exit code 0 within seconds; who was being answered gets an end, not silence."""
    with endpoint(demo_bundle("int8x2").trusted, "--worker", demo_worker.address, "--dtype", "float32") as (process, client):
        outcome: list[object] = []

        def read() -> None:
            try:
                outcome.append(len(streamed(client, "ROMEO:", 250)))
            except openai.APIError as error:
                outcome.append(error)
            except httpx.TransportError as error:
                outcome.append(error)

        reader = threading.Thread(target=read)
        client.models.list()
        reader.start()
        time.sleep(0.5)
        started = time.monotonic()
        assert process.stop(number) == 0
        assert time.monotonic() - started < 15
        reader.join(10)
        assert not reader.is_alive() and outcome
        assert "Traceback" not in process.log()


TRUSTED = "TRUSTED"


def test_what_does_not_start(cloven_here: Command, tmp_path: Path, folder: Path) -> None:
    trusted = str(demo_bundle("int8x2").trusted)
    nobody = ("--worker", f"ipc://{folder}/nobody", "--timeout", "0.5", "--port", "0")
    loose, short, cert = tmp_path / "loose", tmp_path / "short", tmp_path / "cert"
    loose.write_text("key-0123456789abcdef0123\n")
    loose.chmod(0o644)
    short.write_text("abc\n")
    short.chmod(0o600)
    cert.write_text("no certificate\n")
    port = free_port()
    one_line(cloven_here("serve", trusted, *nobody), 1, "no worker at ipc:")
    one_line(cloven_here("serve", trusted, "--port", "0"), 2, "give --worker ADDRESS")
    one_line(cloven_here("serve", str(tmp_path), *nobody), 2, "manifest.json")
    one_line(cloven_here("serve", trusted, *nobody, "--host", "0.0.0.0"), 2, "give --api-key-file FILE, or --insecure-open")
    one_line(cloven_here("serve", trusted, *nobody, "--api-key-file", str(tmp_path / "none")), 2, "no such file")
    one_line(cloven_here("serve", trusted, *nobody, "--api-key-file", str(loose)), 3, "chmod 600")
    one_line(cloven_here("serve", trusted, *nobody, "--api-key-file", str(short)), 2, "line 1: an API key has 20 to 256")
    one_line(cloven_here("serve", trusted, *nobody, "--tls-certificate", str(cert)), 2, "both a certificate and its key")
    one_line(
        cloven_here("serve", trusted, *nobody, "--tls-certificate", str(cert), "--tls-key", str(cert)), 2, "no certificate with its key"
    )
    one_line(cloven_here("serve", trusted, *nobody, "--constant-rows", "3"), 2, "constant_rows 3: at least one row for each")
    one_line(cloven_here("serve", trusted, *nobody, "--model-name", "a b"), 2, "model_name")
    one_line(cloven_here("serve", trusted, *nobody, "--chat-template", str(tmp_path / "none")), 2, "chat template")
    with subprocess.Popen(
        [sys.executable, "-c", f"import socket; s = socket.create_server(('127.0.0.1', {port})); print(1, flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()
        one_line(
            cloven_here("serve", trusted, *nobody[:4], "--port", str(port)), 1, f"cannot listen at 127.0.0.1, port {port}: Address already"
        )
        other.stdin.write(b"\n")
        other.stdin.flush()


def test_nothing_of_a_request_is_logged(demo_worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even at the most talkative level, and not of a request that fails."""
    monkeypatch.setenv("CLOVEN_LOG", "DEBUG")
    arguments = ("--worker", demo_worker.address, "--chat-template", template(), "--dtype", "float32")
    with endpoint(demo_bundle("int8x2").trusted, *arguments) as (process, client):
        name = client.models.list().data[0].id
        client.completions.create(model=name, prompt="Xylophone", max_tokens=3)
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Xylophone"}], max_tokens=3)
        for more in ({"max_tokens": 0}, {"nonsense": "Xylophone"}, {"prompt": "Xylophone " * 500}):
            answer = httpx.post(f"{process.root}/v1/completions", json={"prompt": "Xylophone", **more})
            assert answer.status_code == 400 and "ylophone" not in json.dumps(answer.json())
        assert "ylophone" not in process.log()


@pytest.mark.long
def test_an_error_after_the_session_was_opened(demo_worker: WorkerProcess, tmp_path: Path) -> None:
    """One line and its exit code, whatever the session's threads are at: several times, for it was a race."""
    given = ("serve", str(demo_bundle("int8x2").trusted), "--worker", demo_worker.address, "--port", "0", "--compare", str(tmp_path))
    for _ in range(4):
        one_line(run_cloven(*given), 2, "no model directory")
