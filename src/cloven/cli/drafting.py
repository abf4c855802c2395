"""What `cloven generate` drafts ahead: tokens that the protected model then checks in one pass, so that a token costs fewer exchanges.

Drafts come from the text itself (prompt lookup) or from a small unprotected model in the trusted process. They change no greedy token,
up to rounding: a pass over several rows rounds differently from a pass over one. Not hidden: how many tokens were drafted and how many
accepted; with prompt lookup that tells how much the text repeats itself. Every drafted token costs a pad (SLIP) or a row of the budget
(private LoRA), accepted or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from cloven.bundle.manifest import manifest_format
from cloven.errors import BadInput
from cloven.kv_shield.manifest import EXPOSED, KvManifest
from cloven.model.assistant import open_assistant
from cloven.model.source import Source


@dataclass(frozen=True)
class Drafting:
    """How tokens are drafted: not at all, by prompt lookup, or by an assistant."""

    prompt_lookup: int | None = None
    assistant: Source | None = None

    def check_length(self, prompt: int, new: int, config: PretrainedConfig) -> None:
        """Whether the models have that many positions; a look-up can draft beyond the last token that is wanted.

        Raises:
            BadInput: they have not.
        """
        drafted = self.prompt_lookup or 0
        also = f" and {drafted} drafted ones" if drafted else ""
        for whose, limits in (("model", config), ("assistant", self.assistant.config if self.assistant is not None else None)):
            limit = getattr(limits, "max_position_embeddings", None)
            if limit is not None and prompt + new + drafted > limit:
                raise BadInput(f"the prompt has {prompt} tokens; with {new} new ones{also} that is more than the {whose}'s {limit}")

    def arguments(self) -> dict[str, Any]:
        """Arguments for `generate`; loads the assistant, in the dtype of its checkpoint.

        Raises:
            BadInput: it cannot be loaded.
        """
        if self.assistant is not None:
            return {"assistant_model": self.assistant.load().eval()}
        return {"prompt_lookup_num_tokens": self.prompt_lookup} if self.prompt_lookup is not None else {}


def open_drafting(half: Path, prompt_lookup: int | None, assistant: str | None) -> Drafting:
    """Check the options before anything large is loaded.

    Args:
        half: the half of the bundle that `generate` was given, already verified.
        prompt_lookup: tokens to draft by looking up the last ones earlier in the text.
        assistant: a model directory or a model on the Hub.

    Raises:
        BadInput: both are given, the assistant is no model with this vocabulary, or the scheme cannot take drafts back.
    """
    if prompt_lookup is None and assistant is None:
        return Drafting()
    if prompt_lookup is not None and assistant is not None:
        raise BadInput("give --prompt-lookup or --assistant, not both")
    if manifest_format(half) == EXPOSED and KvManifest.read(half, EXPOSED).config.mode == "session":
        raise BadInput(
            f"{half}: KV-Shield's session mode keys a position once and cannot take a drafted token back: "
            "generate without --prompt-lookup and --assistant, or prepare with --mode permute"
        )
    if assistant is None:
        return Drafting(prompt_lookup)
    return Drafting(assistant=open_assistant(assistant, AutoConfig.from_pretrained(half, trust_remote_code=False)))
