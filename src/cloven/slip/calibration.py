"""Activation statistics from a calibration text: the root mean square of every input of every group, in the unsplit model.

They say which columns of a matrix matter: quantisation then puts its error elsewhere (see `exposed_matrix` and `absorption`). They are as
secret as the text: the file is written with mode 0600 into the unfinished bundle and removed with it; what is left of them in the exposed
half is in the norms of its columns, which are no longer equal (stated in docs/threat-model.md).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from cloven.bundle.shards import write_shard
from cloven.errors import BadInput
from cloven.model.groups import Group
from cloven.model.linears import linears_of
from cloven.model.source import Source

TOKENS, CONTEXT = 8192, 512
_MAX_TEXT_BYTES = 2**20


def read_text(path: Path) -> str:
    """The beginning of a calibration text.

    Raises:
        BadInput: it cannot be read, or holds nothing.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_TEXT_BYTES).decode("utf-8", errors="ignore")
    except OSError as error:
        raise BadInput(f"{path}: the calibration text cannot be read: {error.strerror}") from error
    if not text.strip():
        raise BadInput(f"{path}: the calibration text is empty")
    return text


def text_sha256(path: Path) -> str:
    """Names a text in the parameters of a split."""
    return hashlib.sha256(read_text(path).encode()).hexdigest()


@torch.no_grad()
def calibrate(source: Source, groups: list[Group], path: Path, out: Path) -> None:
    """Run the unsplit model over a text, and write the root mean squares. Needs the memory that the whole model takes.

    Raises:
        BadInput: the model has no tokenizer, or the text no tokens.
    """
    if source.folder is None:
        raise BadInput("calibration needs a tokenizer: give a model directory")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{source.folder}: no tokenizer there that can be used") from error
    limit = getattr(source.config, "max_position_embeddings", None) or CONTEXT
    ids: list[int] = tokenizer(read_text(path), verbose=False)["input_ids"][:TOKENS]
    if not ids:
        raise BadInput(f"{path}: the calibration text has no tokens")
    model = source.load().eval()
    linears = linears_of(model)
    squares: list[Tensor | None] = [None] * len(groups)
    hooks = [linears[group[0]].register_forward_pre_hook(_adding(squares, index), with_kwargs=True) for index, group in enumerate(groups)]
    try:
        for window in torch.tensor(ids).split(min(CONTEXT, limit)):
            model(input_ids=window.view(1, -1), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    means = {str(index): (total / len(ids)).sqrt() for index, total in enumerate(squares) if total is not None}
    write_shard(out, means, secret=True)


def _adding(squares: list[Tensor | None], index: int) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else kwargs["input"]).detach()
        total = x.reshape(-1, x.shape[-1]).to(torch.float64).square().sum(0)
        before = squares[index]
        squares[index] = total if before is None else before + total

    return hook
