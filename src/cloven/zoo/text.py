"""Text for demo, tests and audits, where no file is given: sampled from the model itself at temperature 1 with a fixed seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cloven.model.cache_argument import cache_of, with_cache

PROMPTS = (
    "ROMEO:",
    "JULIET:\nO Romeo,",
    "KING RICHARD III:",
    "First Citizen:\nBefore we proceed",
    "The king is dead,",
    "My lord, I have",
    "What, art thou mad?",
    "MENENIUS:\nI tell you, friends,",
    "To be, or not to be:",
    "HERMIONE:",
    "Good morrow, cousin.",
    "GLOUCESTER:\nNow is the winter",
    "O, speak again,",
    "DUKE VINCENTIO:\nLook where he comes.",
    "Enter the ghost",
    "Come, come, you",
    "LEONTES:\nToo hot, too hot!",
    "Away with him!",
    "I pray thee, good Mercutio,",
    "The heavens forbid",
)


@torch.no_grad()
def sample_text(model: PreTrainedModel, sequences: int, tokens: int, seed: int = 0) -> Tensor:
    """Text sampled from a model at temperature 1, without top-k or top-p: token ids [sequences, tokens], from its BOS token on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((sequences, 1), int(model.config.bos_token_id or 0))
    cache = None
    for _ in range(tokens - 1):
        output = model(input_ids=ids[:, -1:] if cache is not None else ids, **with_cache(cache), use_cache=True)
        cache = cache_of(output)
        probabilities = torch.softmax(output.logits[:, -1].double(), dim=-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return ids


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor, batch: int = 4) -> float:
    """exp of the mean negative log-likelihood of tokens 1 … of every sequence: ids int64 [sequences, tokens]."""
    total, count = 0.0, 0
    for part in ids.split(batch):
        total += float(negative_log_likelihood(model(input_ids=part).logits[:, :-1].flatten(0, 1), part[:, 1:].flatten()).sum())
        count += part[:, 1:].numel()
    return math.exp(min(total / count, 700.0))


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """−log p(target) of every position, float64 [T]: logits [T, vocabulary], targets int64 [T]."""
    return torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
