"""Train the demo model: a small Llama on a plain text file.

The text is split in order: 85 % to train on, 5 % to choose the checkpoint by, 10 % held out and read once, at the end, for the
perplexity that the model card states. Only the weights and the tokenizer are written; the text is not.

    python scripts/train_demo_model.py --text tinyshakespeare.txt --out src/cloven/zoo/demo_model

Takes about fifteen minutes on two cores. The seeds are fixed, but the bits depend on the machine and the PyTorch version.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024
CONTEXT = 256
BATCH = 12
EVALUATE_EVERY = 100


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose alphabet holds all 256 bytes, so that any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=2 * CONTEXT,
    )


def demo_config() -> LlamaConfig:
    """4.1 M parameters; grouped-query attention, SwiGLU, an untied head."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=672,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2 * CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def dropout(rate: float):  # type: ignore[no-untyped-def]
    """A forward hook: drop parts of what a block adds to the residual stream, in training only."""

    def hook(module, _args, output):  # type: ignore[no-untyped-def]
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (torch.nn.functional.dropout(output[0], rate), *output[1:])
        return torch.nn.functional.dropout(output, rate)

    return hook


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood over non-overlapping windows of CONTEXT tokens."""
    model.eval()
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(input_ids=w, labels=w).loss.item() * len(w) for w in windows.split(16)]
    model.train()
    return math.exp(sum(losses) / len(windows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--dropout", type=float, default=0.15)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    text = arguments.text.read_text(encoding="utf-8")
    train_text = text[: int(len(text) * 0.85)]
    choose_text = text[int(len(text) * 0.85) : int(len(text) * 0.90)]
    held_out_text = text[int(len(text) * 0.90) :]
    tokenizer = train_tokenizer(train_text)
    train, choose, held_out = (torch.tensor(tokenizer(t)["input_ids"]) for t in (train_text, choose_text, held_out_text))
    print(f"tokens: train {len(train)}, choose {len(choose)}, held out {len(held_out)}", flush=True)

    model = LlamaForCausalLM(demo_config())
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(dropout(arguments.dropout))
        layer.mlp.register_forward_hook(dropout(arguments.dropout))
    model.model.embed_tokens.register_forward_hook(dropout(arguments.dropout))
    decay = [p for p in model.parameters() if p.dim() > 1]
    no_decay = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.2}, {"params": no_decay, "weight_decay": 0.0}], lr=arguments.rate, betas=(0.9, 0.95)
    )

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / arguments.steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    best, best_state, started = math.inf, None, time.monotonic()
    for step in range(1, arguments.steps + 1):
        starts = torch.randint(0, len(train) - CONTEXT - 1, (BATCH,))
        batch = torch.stack([train[s : s + CONTEXT] for s in starts.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % EVALUATE_EVERY == 0 or step == arguments.steps:
            now = perplexity(model, choose)
            if now < best:
                best, best_state = now, copy.deepcopy(model.state_dict())
            print(f"step {step}: loss {loss.item():.3f}, perplexity {now:.2f}, {time.monotonic() - started:.0f} s", flush=True)

    assert best_state is not None
    model.load_state_dict(best_state)
    model = model.to(torch.bfloat16)
    print(f"held-out perplexity of the bf16 weights, run in float32: {perplexity(copy.deepcopy(model).float(), held_out):.2f}")
    model.eval()
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
