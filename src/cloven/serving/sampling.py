"""One request's choice of a token among a batch's: its own settings, its own randomness.

transformers' continuous batching takes temperature and the like from the first request for all others. Here the batch itself is greedy, and
a processor of logits lets every request that samples choose by itself: it leaves that token alone in the row.
"""

from __future__ import annotations

import secrets
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

KWARG = "sampler"
# Settings of a generation config that say nothing of how a token is chosen, or that are done here. A request with any other goes alone.
_BATCHED = {
    *("do_sample", "temperature", "top_k", "top_p"),
    *("max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
    *("use_cache", "transformers_version", "_from_model_config", "cache_implementation"),
}


def can_be_batched(config: Any) -> bool:
    """Whether the batch would choose the tokens that `generate` chooses, by a request's generation config."""
    return set(config.to_diff_dict()) <= _BATCHED and config.cache_implementation in (None, "dynamic")


class Sampler:
    """Chooses tokens for one request.

    Args:
        config: its generation config; sampling is on.
        seed: None: a fresh one.
    """

    def __init__(self, config: Any, seed: int | None) -> None:
        self._random = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        warpers = LogitsProcessorList()  # in the order of `generate`
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

    def choose(self, scores: Tensor) -> int:
        """A token for logits float32 [V]."""
        warped = self._warpers(None, scores[None])
        return int(torch.multinomial(torch.softmax(warped.float().cpu(), dim=-1), 1, generator=self._random))


class PerRequest(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Lets the requests of a batch choose; rows without a sampler stay, and are greedy."""

    supported_kwargs: dict[str, type] = {KWARG: Sampler}  # noqa: RUF012  (transformers' attribute)
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._samplers: list[Sampler | None] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """See transformers: nothing is passed by tensor."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """See transformers: the requests whose rows the next call gets, in order."""
        self._samplers = [request.state.logit_processor_kwargs.get(KWARG) for request in requests_with_new_token]
        return torch.zeros(len(self._samplers), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Logits [M, V] -> the same, with one token left where a request samples."""
        del tensor_arg
        if scores.shape[0] < len(self._samplers):
            raise RuntimeError("fewer rows of logits than requests in the batch")
        for row, sampler in enumerate(self._samplers):
            if sampler is not None:
                token = sampler.choose(scores[row])
                scores[row] = float("-inf")
                scores[row, token] = 0.0
        return scores


def processors() -> ContinuousBatchingLogitsProcessorList:
    """transformers' list with `PerRequest` alone."""
    made = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([PerRequest()]))
    made.tensors_required = 1
    return made
