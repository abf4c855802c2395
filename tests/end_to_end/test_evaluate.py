"""`cloven evaluate`: the real protocol with real workers, beside the original and the exposed half alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import cloven
from cloven.cluster.worker_process import WorkerProcess
from cloven.errors import BadInput
from cloven.zoo.text import sample_text
from tests.end_to_end.commands import Command, Outcome, one_line
from tests.split_models import copied, demo_bundle, demo_model, demo_tokenizer, logits, tiny, tiny_bundle, tiny_folder

ORIGINAL = str(cloven.demo_model_path())
SHORT = "KING RICHARD III:\nNow is the winter of our discontent, said the king, and laughed at it.\n" * 6
MODEL_KEYS = {"perplexity", "perplexity_change", "perplexity_change_error", "agreement", "largest_logit_difference"}
KEYS = {
    "bundle", "precision", "dtype", "context", "windows", "tokens", "predicted", "own_worker", "reference", "original", "split",
    "exposed_only", "exposed_only_unscrambled",
}  # fmt: skip


@pytest.fixture(scope="module")
def long_text() -> str:
    """A little more than 2,000 tokens, sampled from the unsplit demo model."""
    return "\n".join(demo_tokenizer().batch_decode(sample_text(demo_model(), 9, 256)[:, 1:]))


@pytest.fixture
def short(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(SHORT)
    return path


@pytest.fixture(scope="module")
def fast_worker() -> Any:
    """`cloven worker` with the demo model, int8."""
    with WorkerProcess(demo_bundle("int8").exposed) as worker:
        yield worker


@pytest.mark.parametrize(
    ("precision", "target", "tokens"),
    [
        ("int8", 1e-3, 500),
        pytest.param("int8", 5e-4, 2000, marks=pytest.mark.long),
        pytest.param("int8x2", 2e-5, 2000, marks=pytest.mark.long),
    ],
)
def test_the_targets_on_the_demo_model(precision: str, target: float, tokens: int, long_text: str, request: pytest.FixtureRequest) -> None:
    """On 2,000 tokens int8's change varies by about 0.025 % from split to split: what is beyond four errors would be more than chance.
    (On a quarter of the tokens errors are twice as large; int8x2's in the short form: see `test_as_json`.)"""
    worker = request.getfixturevalue("fast_worker" if precision == "int8" else "demo_worker")
    trusted = demo_bundle(precision).trusted
    options: dict[str, Any] = {"tokens": tokens, "exposed_only": precision == "int8", "timeout": 60, "look_ahead": 0}
    result = cloven.evaluate(trusted, long_text, original=ORIGINAL, worker=worker.address, **options)
    assert result.original is not None and result.predicted == tokens - -(-tokens // 512) and not result.own_worker
    assert result.split.perplexity_change_error < target
    assert abs(result.split.perplexity_change) < target + 4 * result.split.perplexity_change_error
    assert precision == "int8" or abs(result.split.perplexity_change) < target
    assert result.split.agreement > (0.98 if precision == "int8" else 0.9985)
    assert result.split.largest_logit_difference < (0.1 if precision == "int8" else 1e-3)
    if precision == "int8x2":
        assert result.exposed_only is result.exposed_only_unscrambled is None
        return
    assert result.exposed_only is not None and result.exposed_only_unscrambled is not None
    assert 3 * result.original.perplexity < result.exposed_only_unscrambled.perplexity < result.exposed_only.perplexity
    assert result.exposed_only.agreement < result.exposed_only_unscrambled.agreement < 0.5


def evaluate(command: Command, text: Path, worker: WorkerProcess, *arguments: str) -> Outcome:
    return command("evaluate", str(demo_bundle("int8x2").trusted), "--text", str(text), "--worker", worker.address, *arguments)


def test_as_json(cloven_here: Command, demo_worker: WorkerProcess, short: Path) -> None:
    outcome = evaluate(cloven_here, short, demo_worker, "--original", ORIGINAL, "--tokens", "100", "--context", "32", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert set(report) == KEYS and outcome.out.count("\n") == 1
    assert all(set(report[model]) == MODEL_KEYS for model in ("original", "split", "exposed_only", "exposed_only_unscrambled"))
    assert report["bundle"] == demo_bundle("int8x2").id and report["precision"] == "int8x2" and report["dtype"] == "float32"
    assert (report["context"], report["windows"], report["tokens"], report["predicted"]) == (32, 4, 100, 96)
    assert report["reference"] == "original" and report["own_worker"] is False
    ids = torch.tensor(demo_tokenizer()(SHORT)["input_ids"][:100])
    likelihood = []
    for window in ids.split(32):
        probabilities = torch.softmax(logits(demo_model(), window[None])[0].double(), -1)
        likelihood += [math.log(float(probabilities[t, window[t + 1]])) for t in range(len(window) - 1)]
    assert report["original"]["perplexity"] == pytest.approx(math.exp(-sum(likelihood) / 96), rel=1e-6)
    assert (report["original"]["perplexity_change"], report["original"]["agreement"]) == (0.0, 1.0)
    assert report["split"]["perplexity"] == pytest.approx(report["original"]["perplexity"], rel=1e-3)


def test_the_table(cloven_here: Command, demo_worker: WorkerProcess, short: Path) -> None:
    outcome = evaluate(cloven_here, short, demo_worker, "--tokens", "64")
    assert outcome.code == 0 and outcome.err == ""
    assert "split" in outcome.out and "scramble known" in outcome.out and "63 predicted tokens of 64" in outcome.out
    assert "│ original" not in outcome.out and "compared with the split" in outcome.out and "--worker" not in outcome.out
    assert "RICHARD" not in outcome.out and "winter" not in outcome.out


def test_a_worker_of_its_own(cloven_here: Command, short: Path, tmp_path: Path) -> None:
    """On the trusted side's copy of exposed/, wherever that is."""
    bundle = copied(demo_bundle(), tmp_path / "out")
    elsewhere = bundle.exposed.rename(tmp_path / "copy")
    base = ("evaluate", str(bundle.trusted), "--text", str(short), "--tokens", "40", "--no-exposed-only")
    outcome = cloven_here(*base, "--exposed", str(elsewhere))
    assert outcome.code == 0 and "no --worker was given" in outcome.out and "scramble known" not in outcome.out
    one_line(cloven_here(*base), 2, "its own copy of exposed/ there; give its place with --exposed PATH")


def test_the_sizes_of_windows() -> None:
    bundle = demo_bundle("int8x2")
    for context in (1, 0, -3):
        with pytest.raises(BadInput, match=f"context {context}: give at least 2"):
            cloven.evaluate(bundle.trusted, SHORT, context=context)
    with pytest.raises(BadInput, match="context 513: the model's limit is 512 tokens"):
        cloven.evaluate(bundle.trusted, SHORT, context=513)
    with pytest.raises(BadInput, match="tokens 1: give at least 2"):
        cloven.evaluate(bundle.trusted, SHORT, tokens=1)


def failing(command: Command, trusted: Path, text: Path, *arguments: str) -> Outcome:
    return command("evaluate", str(trusted), "--text", str(text), *arguments)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "the text is empty"),
        (b" \n ", "the text is empty"),
        (b"a", "fewer than 2 tokens"),
        (b"caf\xe9 au lait", "is not UTF-8 text"),
        (None, "cannot be read"),
    ],
)
def test_bad_texts(content: bytes | None, match: str, tmp_path: Path, cloven_here: Command) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    one_line(failing(cloven_here, demo_bundle().trusted, text), 2, match)


def test_bad_values(cloven_here: Command, short: Path, folder: Path) -> None:
    trusted = demo_bundle().trusted
    one_line(failing(cloven_here, trusted, short, "--context", "1"), 2, "context 1: give at least 2")
    one_line(failing(cloven_here, trusted, short, "--context", "600"), 2, "the model's limit is 512")
    one_line(failing(cloven_here, trusted, short, "--tokens", "-5"), 2, "tokens -5: give at least 2")
    one_line(failing(cloven_here, trusted, short, "--dtype", "int4"), 2, "choose auto, float32, bfloat16")
    one_line(failing(cloven_here, trusted, short, "--worker", "here"), 2, "address")
    nobody = ("--worker", f"ipc://{folder}/w", "--timeout", "0.5", "--no-exposed-only")
    one_line(failing(cloven_here, trusted, short, *nobody), 1, "is `cloven worker` running there")


def test_no_bundle_or_another_half(cloven_here: Command, short: Path, tmp_path: Path) -> None:
    bundle = demo_bundle()
    one_line(failing(cloven_here, bundle.exposed, short), 2, "is this the exposed half")
    one_line(failing(cloven_here, bundle.path, short), 2, "is no bundle half")
    one_line(failing(cloven_here, Path(ORIGINAL), short), 2, "is no bundle half")
    one_line(failing(cloven_here, bundle.trusted, short, "--exposed", str(tmp_path)), 2, "give its place with --exposed PATH")
    other = str(tiny_bundle("llama").exposed)
    one_line(failing(cloven_here, bundle.trusted, short, "--exposed", other), 3, f"{tiny_bundle('llama').id}.*{bundle.id}")
    one_line(failing(cloven_here, tiny_bundle("llama").trusted, short), 2, "has no tokenizer")  # the tiny models have none


def test_originals_that_cannot_be_it(cloven_here: Command, short: Path, tmp_path: Path) -> None:
    def against(original: object) -> Outcome:
        return failing(cloven_here, demo_bundle().trusted, short, "--original", str(original))

    one_line(against(tmp_path / "nowhere"), 2, "no such model directory")
    one_line(against(demo_bundle().trusted), 2, "already quantised or split")
    one_line(against(tiny_folder("gpt2")), 2, "is a gpt2, the bundle a llama; give the model that the bundle was made of")
    one_line(against(tiny_folder("llama")), 2, "has a vocabulary of 97, the bundle of 1024")
    wider = type(tiny("llama").config)(**tiny("llama").config.to_dict() | {"vocab_size": 1024})
    type(tiny("llama"))(wider).save_pretrained(tmp_path / "wider")
    one_line(against(tmp_path / "wider"), 2, r"its model\.embed_tokens\.weight has another shape than the bundle's")
    tokenizer = json.loads((cloven.demo_model_path() / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, second = sorted(words, key=words.get)[400:402]
    words[first], words[second] = words[second], words[first]
    (tmp_path / "wider" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "wider" / "tokenizer_config.json").write_bytes((cloven.demo_model_path() / "tokenizer_config.json").read_bytes())
    one_line(against(tmp_path / "wider"), 2, "its tokenizer has another vocabulary")


def test_it_explains_itself(cloven_here: Command) -> None:
    outcome = cloven_here("evaluate", "--help")
    assert outcome.code == 0 and all(option in outcome.out for option in ("--text", "--original", "--context", "--no-exposed-only"))
    assert cloven_here("evaluate", str(demo_bundle().trusted)).code == 2  # no text
