"""Perplexity on held-out text of the demo adapter's style: the base, private LoRA in two processes, and PEFT's merged model.

The text is the last 10 % of the file that `train_demo_adapter.py` was given, in windows of 256 tokens.

    python scripts/evaluate_demo_adapter.py --text wikitext2-valid.txt
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from train_demo_model import perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer

import cloven
from cloven.bench.ledgers import ledgers_in
from cloven.demo.merged import merged_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    path, adapter = cloven.demo_model_path(), cloven.demo_adapter_path()
    held_out = torch.tensor(AutoTokenizer.from_pretrained(path)(text[int(len(text) * 0.90) :])["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    print(f"{len(held_out)} tokens; base {perplexity(model, held_out):.2f}", flush=True)
    print(f"PEFT, merged {perplexity(merged_model(path, adapter), held_out):.2f}", flush=True)
    with tempfile.TemporaryDirectory() as folder, ledgers_in(Path(folder)):
        out = Path(folder) / "out"
        cloven.prepare_private_lora(path, adapter, out, cloven.PrivateLoraConfig(len(held_out) + 256))
        with cloven.AdapterServerProcess(out / "server") as server, cloven.adapt(model, out / "client", server.address):
            print(f"private {perplexity(model, held_out):.2f}", flush=True)


if __name__ == "__main__":
    main()
