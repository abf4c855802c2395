"""`cloven.evaluate`: what splitting a model costs in accuracy, and what its exposed half is worth alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from cloven.audit.accuracy import ModelAccuracy, Progress, measure
from cloven.audit.exposed_only import exposed_only as exposed_only_model
from cloven.audit.original import load_like, same_kind, vocabulary_of
from cloven.audit.windows import DEFAULT_CONTEXT, DEFAULT_TOKENS, windows_of
from cloven.bundle.exposed_copy import ExposedCopy
from cloven.bundle.trusted_manifest import TrustedManifest
from cloven.bundle.verification import verify_files
from cloven.cluster.worker_process import WorkerProcess
from cloven.errors import BadBundle, BadInput
from cloven.model.attach import attach
from cloven.model.source import open_source

ORIGINAL, SPLIT, SCRAMBLED, UNSCRAMBLED = "original", "split", "exposed-only", "exposed-only, scramble known"
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Evaluation:
    """The figures of all models on the same windows; no tokens, no text.

    Args:
        bundle: its id.
        precision: of the bundle's exposed matrices.
        dtype: what original and split computed in.
        context, windows, tokens, predicted: size of a window, and how many windows, tokens and predicted tokens there were.
        own_worker: whether a worker process was started for this.
        reference: "original" if it was given, else "split": what agreement, changes and differences refer to.
        original: None if it was not given.
        split: through the real protocol.
        exposed_only, exposed_only_unscrambled: the exposed half alone, to a thief without and with the scramble's keys (what else the
            thief is given: `cloven.audit.exposed_only`); None if not asked for.
    """

    bundle: str
    precision: str
    dtype: str
    context: int
    windows: int
    tokens: int
    predicted: int
    own_worker: bool
    reference: str
    original: ModelAccuracy | None
    split: ModelAccuracy
    exposed_only: ModelAccuracy | None
    exposed_only_unscrambled: ModelAccuracy | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def evaluate(
    trusted: str | Path,
    text: str,
    *,
    original: str | Path | None = None,
    worker: str | None = None,
    keys: str | Path | None = None,
    exposed: str | Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    context: int | None = None,
    exposed_only: bool = True,
    dtype: str = "float32",
    progress: Progress = lambda stage, done, total: None,
    **options: Any,
) -> Evaluation:
    """Perplexity of a split model beside the original and the exposed half alone, and how often their next tokens agree.

    Args:
        trusted: OUT/trusted of a SLIP bundle.
        text: what is predicted; its first 32 · `tokens` characters are looked at.
        original: the unsplit model, a directory or a Hub id; all of it is held in memory.
        worker, keys, exposed: as for `cloven.attach`. worker=None: one is started in a process of its own, on the copy of exposed/.
        tokens: how many tokens of the text at most.
        context: tokens of a window; by default 512, or the model's limit if that is smaller.
        exposed_only: also evaluate the exposed half alone.
        dtype: "float32", so that rounding to bfloat16 does not cover the split's own error; "bfloat16"; "auto": the bundle's.
        progress: called with (stage, done, total).
        options: more for `cloven.attach`.

    Raises:
        BadInput: the text, a number, or an original of another architecture or vocabulary.  BadBundle: no SLIP bundle, no tokenizer.
        TamperedBundle, ForeignBundle, PeerRefused, WorkerUnreachable, WorkerTimeout: as for `cloven.attach`.

    Guarantee: the text goes to the worker one-time-padded like every prompt, and nothing of it is kept or returned. Not hidden: the number
    of its tokens.
    """
    trusted = Path(trusted)
    if dtype not in DTYPES:
        raise BadInput(f"dtype {dtype!r}: choose {', '.join(DTYPES)}")
    manifest = TrustedManifest.read(trusted)
    folder = Path(exposed) if exposed is not None else trusted.parent / "exposed"
    copy = ExposedCopy(folder, manifest)
    verify_files(trusted, {name: digest for name, digest in manifest.files.items() if not name.endswith(".safetensors")})
    config = AutoConfig.from_pretrained(trusted, trust_remote_code=False)
    context = _context(config, context, tokens)
    tokenizer = _tokenizer(trusted, manifest)
    windows = windows_of(text, tokenizer, tokens, context)
    if max(int(window.max()) for window in windows) >= vocabulary_of(config):
        raise BadBundle(f"{trusted}: the tokenizer has tokens that the model has not; prepare again from a complete model directory")
    source = same_kind(open_source(original), config, tokenizer) if original is not None else None

    progress("loading", 0, 1)
    split = AutoModelForCausalLM.from_pretrained(trusted, dtype=DTYPES[dtype], trust_remote_code=False)
    computes_in = split.get_input_embeddings().weight.dtype
    models: dict[str, PreTrainedModel] = {ORIGINAL: load_like(source, split, computes_in)} if source is not None else {}
    models[SPLIT] = split
    if exposed_only:
        models[SCRAMBLED] = exposed_only_model(split, copy, knows_scramble=False)
        models[UNSCRAMBLED] = exposed_only_model(split, copy, knows_scramble=True)
    if worker is None:
        options = {"look_ahead": 0} | options  # it shares the cores: pads made while it works would slow it down
    with _address(worker, folder) as address, attach(split, address, keys, exposed=folder, **options):
        results = measure(models, windows, progress)
    return Evaluation(
        bundle=manifest.bundle,
        precision=str(manifest.parameters.get("precision", "")),
        dtype=str(computes_in).removeprefix("torch."),
        context=context,
        windows=len(windows),
        tokens=_count(windows),
        predicted=_count(windows) - len(windows),
        own_worker=worker is None,
        reference=next(iter(results)),
        original=results.get(ORIGINAL),
        split=results[SPLIT],
        exposed_only=results.get(SCRAMBLED),
        exposed_only_unscrambled=results.get(UNSCRAMBLED),
    )


@contextlib.contextmanager
def _address(worker: str | None, exposed: Path) -> Iterator[str]:
    if worker is not None:
        yield worker
        return
    with WorkerProcess(exposed.absolute()) as process:
        yield process.address


def _count(windows: list[Tensor]) -> int:
    return sum(map(len, windows))


def _context(config: PretrainedConfig, context: int | None, tokens: int) -> int:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if tokens < 2:
        raise BadInput(f"tokens {tokens}: give at least 2")
    if context is None:
        return DEFAULT_CONTEXT if limit is None else min(DEFAULT_CONTEXT, int(limit))
    if context < 2:
        raise BadInput(f"context {context}: give at least 2")
    if limit is not None and context > limit:
        raise BadInput(f"context {context}: the model's limit is {limit} tokens")
    return context


def _tokenizer(trusted: Path, manifest: TrustedManifest) -> Any:
    if not any(name.startswith(("tokenizer.", "vocab.")) for name in manifest.files):
        raise BadBundle(f"{trusted}: has no tokenizer; prepare again from a model directory that has one")
    try:
        return AutoTokenizer.from_pretrained(trusted, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadBundle(f"{trusted}: the tokenizer cannot be loaded ({type(error).__name__})") from error
