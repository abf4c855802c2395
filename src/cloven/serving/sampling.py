"""One request's choice of a token among a batch's: its own settings, its own randomness.

transformers' continuous batching takes temperature and the like from the first request for all others. Here the batch itself is greedy, and
a processor of logits lets every request that samples choose by itself: it leaves that token alone in the row.
"""

from __future__ import annotations

import secrets
from typing import Any

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

KWARG = "sampler"
# Settings of a generation config that say nothing of how a token is chosen, or that are done here.
_BATCHED = {
    *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty"),
    *("max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
    *("use_cache", "transformers_version", "_from_model_config"),
}
# Values of other settings that are the same as none; besides None, False and what is empty.
_NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_return_sequences", "num_beam_groups"), 1),
    **dict.fromkeys(("length_penalty", "typical_p", "encoder_repetition_penalty", "guidance_scale"), 1.0),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty", "min_p"), 0.0),
    "cache_implementation": "dynamic",
}


def alone_for(config: Any) -> list[str]:
    """The settings of a request's generation config for which it is computed alone; none: the batch chooses as `generate` does."""
    return sorted(
        name
        for name, value in config.to_diff_dict().items()
        if name not in _BATCHED and value not in (None, False, [], {}, "") and value != _NEUTRAL.get(name)
    )


def sampler_of(config: Any, seed: int | None) -> Sampler | None:
    """What chooses a request's tokens; None: the batch itself, greedily."""
    return Sampler(config, seed) if config.do_sample or _penalty(config) != 1.0 else None


def _penalty(config: Any) -> float:
    return 1.0 if config.repetition_penalty is None else float(config.repetition_penalty)


class Sampler:
    """Chooses tokens for one request.

    Args:
        config: its generation config.
        seed: None: a fresh one.
    """

    def __init__(self, config: Any, seed: int | None) -> None:
        self._random = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        self._samples = bool(config.do_sample)
        warpers = LogitsProcessorList()  # in the order of `generate`
        if _penalty(config) != 1.0:
            warpers.append(RepetitionPenaltyLogitsProcessor(_penalty(config)))
        if not self._samples:
            self._warpers = warpers
            return
        if config.temperature is not None and config.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p is not None and config.top_p < 1.0:
            warpers.append(TopPLogitsWarper(config.top_p))
        self._warpers = warpers

    def __deepcopy__(self, _memo: dict[int, Any]) -> Sampler:
        """A request that transformers begins anew goes on with its own randomness."""
        return self

    def choose(self, ids: list[int], scores: Tensor) -> int:
        """A token after those of the prompt and the answer so far, for logits float32 [V]."""
        warped = self._warpers(torch.tensor([ids], device=scores.device), scores[None])
        if not self._samples:
            return int(warped.argmax())
        return int(torch.multinomial(torch.softmax(warped.float().cpu(), dim=-1), 1, generator=self._random))


class PerRequest(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Lets the requests of a batch choose; rows without a sampler stay, and are greedy."""

    supported_kwargs: dict[str, type] = {KWARG: Sampler}  # noqa: RUF012  (transformers' attribute)
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._choosing: list[tuple[Sampler, list[int]] | None] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """See transformers: nothing is passed by tensor."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """See transformers: the requests whose rows the next call gets, in order."""
        self._choosing = []
        for state in (request.state for request in requests_with_new_token):
            sampler = state.logit_processor_kwargs.get(KWARG)
            self._choosing.append(None if sampler is None else (sampler, state.initial_tokens + state.generated_tokens))
        return torch.zeros(len(self._choosing), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Logits [M, V] -> the same, with one token left where a request samples."""
        del tensor_arg
        if scores.shape[0] < len(self._choosing):
            raise RuntimeError("fewer rows of logits than requests in the batch")
        for row, choosing in enumerate(self._choosing):
            if choosing is not None:
                sampler, ids = choosing
                token = sampler.choose(ids, scores[row])
                scores[row] = float("-inf")
                scores[row, token] = 0.0
        return scores


def processors() -> ContinuousBatchingLogitsProcessorList:
    """transformers' list with `PerRequest` alone."""
    made = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([PerRequest()]))
    made.tensors_required = 1
    return made
