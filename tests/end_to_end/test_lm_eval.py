"""lm-eval works in process, on a loaded and attached model: the endpoint gives no log-probabilities, and is not needed for it.

Skipped where lm-eval is not installed (`pip install lm-eval`); nothing else of cloven uses it.
"""

from __future__ import annotations

import importlib.util
import json

import pytest

from cloven.cluster.worker_process import WorkerProcess
from cloven.zoo.demo import demo_model_path
from tests.split_models import demo_bundle, run_python

# What docs/serve.md shows, and the same on the unsplit model.
SCRIPT = """
import json, sys, torch, cloven
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

def ask(model, tokenizer):
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    pairs = [("ROMEO:", " I"), ("The king is", " dead, my lord"), ("My lord,", " xyz")]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    written = Instance("generate_until", {}, ("ROMEO:", {"until": ["never there"], "max_gen_toks": 8, "do_sample": False}), 0)
    return harness.loglikelihood(asked), harness.generate_until([written])

trusted, worker, original = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(trusted, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(trusted)
with cloven.attach(model, worker):
    split = ask(model, tokenizer)
print(json.dumps([split, ask(AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32), tokenizer)]))
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_in_process(demo_worker: WorkerProcess) -> None:
    """Log-likelihoods within 1 % of the unsplit model's, the same texts."""
    result = run_python(SCRIPT, str(demo_bundle("int8x2").trusted), demo_worker.address, str(demo_model_path()), timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    (split, split_text), (plain, plain_text) = json.loads(result.stdout.splitlines()[-1])
    assert split_text == plain_text and len(split_text[0]) > 8
    assert len(split) == len(plain) == 3
    for (mine, my_greedy), (theirs, their_greedy) in zip(split, plain, strict=True):
        assert mine == pytest.approx(theirs, rel=0.01) and my_greedy == their_greedy
    assert len({round(value, 3) for value, _ in plain}) == 3
