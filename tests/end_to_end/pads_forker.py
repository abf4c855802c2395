"""Processes that generate with a pad store, or fill it, to be killed: importing takes seconds, a fork none.

Reads jobs from standard input, one JSON object per line; prints the processes' numbers, and their exit codes when all have ended.

    {"task": "generate", "count": 2, "state": …, "address": …, "store": …, "die_at": n or null, "seed": n}
    {"task": "fill", "count": 1, "state": …, "store": …, "tokens": n, "die_at": n or null}
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import cloven
from cloven.slip import pads
from tests.pad_stores import Ending

PROMPT = 12  # rows at most


def generate(job: dict[str, Any], model: PreTrainedModel, number: int) -> None:
    chance = random.Random(f"{job['seed']} {number}")
    with cloven.attach(model, job["address"], pads=job["store"], timeout=20.0):
        while True:
            ids = torch.tensor([[chance.randrange(1, 97) for _ in range(chance.randrange(1, PROMPT + 1))]])
            tokens = chance.randrange(1, 30)
            model.generate(input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def fill(job: dict[str, Any], trusted: Path) -> None:
    pads._ROUND = 8  # many commits
    pads.fill(pads.fill_job(trusted, job["tokens"], Path(job["store"])))


def child(job: dict[str, Any], model: PreTrainedModel, trusted: Path, number: int) -> None:
    code = 0
    try:
        os.environ["CLOVEN_STATE"] = job["state"]
        if job["die_at"] is not None and number == 0:
            Ending(setattr, job["die_at"] // 2, job["die_at"] % 2 == 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
        fill(job, trusted) if job["task"] == "fill" else generate(job, model, number)
    except cloven.ClovenError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = 99
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    trusted = Path(sys.argv[1])
    torch.set_num_threads(1)  # no threads that a fork would leave behind
    model = AutoModelForCausalLM.from_pretrained(trusted, dtype=torch.float32)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        children = []
        for number in range(job["count"]):
            one = os.fork()
            if one == 0:
                child(job, model, trusted, number)
            children.append(one)
        print(*children, flush=True)
        print(*(os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in children), flush=True)


if __name__ == "__main__":
    main()
