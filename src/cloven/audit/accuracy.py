"""How near models are to a reference, token by token, on the same text.

Of every window the last position is left out: it predicts what is not there. Memory: the logits of one window for two models, and
float64 copies of some rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cloven.errors import RunError
from cloven.zoo.text import negative_log_likelihood

Progress = Callable[[str, int, int], None]  # stage, done, total
_ROWS_AT_A_TIME = 64
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class ModelAccuracy:
    """One model on a text.

    Args:
        perplexity: exp of the mean negative log-likelihood of the predicted tokens.
        perplexity_change: the same as a share of the reference's, less 1.
        perplexity_change_error: its standard error, as if the tokens' changes in likelihood were independent. Those of one text are not:
            splits of one model (each is random) differ by up to three times as much (measured).
        agreement: share of predicted positions where the likeliest token is the reference's.
        largest_logit_difference: the largest ‖logits − reference's‖ / ‖reference's‖ of all predicted positions, over the vocabulary.
    """

    perplexity: float
    perplexity_change: float
    perplexity_change_error: float
    agreement: float
    largest_logit_difference: float


@torch.no_grad()
def measure(
    models: Mapping[str, PreTrainedModel], windows: list[Tensor], progress: Progress = lambda stage, done, total: None
) -> dict[str, ModelAccuracy]:
    """Run the same windows through all models.

    Args:
        models: by name; the first one is the reference.
        windows: token ids, int64 [T] each, T ≥ 2.
        progress: called with ("windows", done, total).

    Raises:
        RunError: a model's logits are not numbers.
    """
    tallies = {name: _Tally() for name in models}
    for done, window in enumerate(windows):
        progress("windows", done, len(windows))
        reference: Tensor | None = None
        for name, model in models.items():
            logits: Tensor = model(input_ids=window[None], use_cache=False).logits[0, :-1]  # [T - 1, vocabulary]
            reference = logits if reference is None else reference
            tallies[name].add(logits, reference, window[1:])
    first = next(iter(tallies.values()))
    return {name: tally.result(name, first) for name, tally in tallies.items()}


class _Tally:
    """Sums over positions."""

    def __init__(self) -> None:
        self._positions, self._likelihood, self._same, self._difference = 0, 0.0, 0, 0.0
        self._gain, self._gain_squares = 0.0, 0.0  # of the negative log-likelihood over the reference's

    def add(self, logits: Tensor, reference: Tensor, targets: Tensor) -> None:
        """Logits [T, V] of a window, the reference's, and the tokens that follow, int64 [T]."""
        for ours, theirs, tokens in zip(*(tensor.split(_ROWS_AT_A_TIME) for tensor in (logits, reference, targets)), strict=True):
            likelihood = negative_log_likelihood(ours, tokens)
            gain = likelihood - negative_log_likelihood(theirs, tokens)
            self._likelihood += float(likelihood.sum())
            self._gain += float(gain.sum())
            self._gain_squares += float(gain.square().sum())
            self._same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            distance = torch.linalg.vector_norm(ours.double() - theirs.double(), dim=-1)
            size = torch.linalg.vector_norm(theirs.double(), dim=-1).clamp_min(1e-300)
            self._difference = max(self._difference, float((distance / size).max()))
        self._positions += len(targets)

    @property
    def mean(self) -> float:
        """Mean negative log-likelihood, no larger than its exp can be held."""
        return min(self._likelihood / self._positions, _LARGEST_EXPONENT)

    def result(self, name: str, reference: _Tally) -> ModelAccuracy:
        if math.isnan(self._likelihood):
            raise RunError(f"{name}: the logits are not numbers; try another dtype")
        n, change = self._positions, math.expm1(min(self.mean - reference.mean, _LARGEST_EXPONENT))
        variance = max(self._gain_squares / n - (self._gain / n) ** 2, 0.0)
        error = (1 + change) * math.sqrt(variance / n)
        return ModelAccuracy(math.exp(self.mean), change, error, self._same / n, self._difference)
