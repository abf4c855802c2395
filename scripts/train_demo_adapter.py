"""Train the demo adapter: a LoRA (r = 8) of the demo model on a plain text file of another style.

The text is split in order: 85 % to train on, 5 % to choose the checkpoint by, 10 % held out and read once, at the end, for the
perplexities that the card states. Only the adapter is written; the text is not.

    python scripts/train_demo_adapter.py --text wikitext2-valid.txt --out src/cloven/zoo/demo_adapter

Takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from train_demo_model import BATCH, CONTEXT, EVALUATE_EVERY, perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer

RANK = 8
BASE = Path(__file__).resolve().parent.parent / "src" / "cloven" / "zoo" / "demo_model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=3e-3)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    text = arguments.text.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    cuts = [0, int(len(text) * 0.85), int(len(text) * 0.90), len(text)]
    train, choose, held_out = (torch.tensor(tokenizer(text[a:b])["input_ids"]) for a, b in itertools.pairwise(cuts))
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    print(f"held-out perplexity of the base: {perplexity(base, held_out):.2f}")
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=arguments.rate, weight_decay=0.01)

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / arguments.steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    best, best_state, started = math.inf, None, time.monotonic()
    model.train()
    for step in range(1, arguments.steps + 1):
        starts = torch.randint(0, len(train) - CONTEXT - 1, (BATCH,))
        batch = torch.stack([train[s : s + CONTEXT] for s in starts.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % EVALUATE_EVERY == 0 or step == arguments.steps:
            now = perplexity(model, choose)
            if now < best:
                best, best_state = now, copy.deepcopy(get_peft_model_state_dict(model))
            print(f"step {step}: loss {loss.item():.3f}, perplexity {now:.2f}, {time.monotonic() - started:.0f} s", flush=True)

    assert best_state is not None
    set_peft_model_state_dict(model, best_state)
    print(f"held-out perplexity with the adapter: {perplexity(model, held_out):.2f}")
    model.peft_config["default"].base_model_name_or_path = "cloven-demo"  # never a path of the machine that trained it
    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
