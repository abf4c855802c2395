from __future__ import annotations

import functools
import json

from cloven.audit.kv_shield.subject import MODES
from cloven.demo.kv_shield import KvDemo, run_kv_demo

STEPS: list[str] = []


@functools.cache
def demo() -> KvDemo:
    """Two prompts of twelve tokens, run once."""
    return run_kv_demo(lambda stage, done, total: STEPS.append(stage), 2, 12)


def test_the_text_is_the_plain_models_in_every_mode() -> None:
    result = demo()
    assert (result.prompts, result.new_tokens) == (2, 12)
    assert result.text_identical == {"permute": 2, "session": 2, "sealed": 2}
    assert result.tokens_per_s_plain > 0 and all(result.tokens_per_s[mode] > 0 for mode in ("permute", "session", "sealed"))
    assert result.example_prompt == "ROMEO:" and result.example_text
    assert {"generating, permute", "generating, session", "generating, sealed", "attacking"} <= set(STEPS)


def test_what_a_thief_recovers() -> None:
    result = demo()
    assert set(result.recovered) == set(result.equal_pairs_found) == set(result.recovered_known_plaintext) == set(MODES)
    assert all(set(found) == {"table", "sorting", "norms", "gram"} for found in result.recovered.values())
    assert all(result.recovered["none"][name] >= 0.95 for name in ("table", "sorting", "norms", "gram"))
    assert result.recovered["permute"]["sorting"] >= 0.95 and result.recovered["permute"]["table"] < 0.1
    assert all(result.recovered["session"][name] < 0.1 for name in ("table", "sorting", "norms"))
    assert all(result.recovered["sealed"][name] < 0.15 for name in ("table", "sorting", "norms", "gram"))
    assert result.recovered_known_plaintext["session"] >= 0.9 and result.recovered_known_plaintext["sealed"] < 0.15
    assert result.equal_pairs_found["session"] >= 0.5 and result.equal_pairs_found["sealed"] < 0.1


def test_as_json() -> None:
    record = json.loads(json.dumps(demo().to_dict()))
    assert set(record) == set(KvDemo.__dataclass_fields__)
    assert len(record["attacks"]) == 4 * len({attack["name"] for attack in record["attacks"]}) - 1  # sealing changes no weights
