from __future__ import annotations

import json

import pytest

from cloven.bench import kv_shield
from cloven.bench.kv_shield import KvBench, bench_kv_shield
from cloven.errors import BadInput

SLOWDOWNS = ("decode_slowdown_permute", "decode_slowdown_session", "prefill_slowdown_permute", "prefill_slowdown_session")


@pytest.mark.long
def test_a_small_run() -> None:
    steps: list[str] = []
    result = bench_kv_shield("tiny", lambda stage, done, total: steps.append(stage), layers=1, rounds=1, tokens=2)
    record = json.loads(json.dumps(result.to_dict()))
    assert set(record) == set(KvBench.__dataclass_fields__)
    assert (result.shape, result.layers, result.rounds, result.tokens_per_round) == ("tiny", 1, 1, 2) and result.layers_of_shape == 5
    assert all(record[name] > 0 for name in (*SLOWDOWNS, "tokens_per_s_stock", "prefill_512_s_stock", "seal_gb_per_s"))
    assert result.calls_per_token == 3  # key and restore, for one layer, and what authorises them
    for figures in (result.call_us, result.bytes_per_token, result.tokens_per_s, result.prefill_512_s):
        assert set(figures) == {"permute", "session"} and all(figure > 0 for figure in figures.values())
    assert result.bytes_per_token["session"] > result.bytes_per_token["permute"]  # v, and the noise
    assert result.decode_slowdown_permute == pytest.approx(result.tokens_per_s_stock / result.tokens_per_s["permute"])
    assert result.prefill_slowdown_session == pytest.approx(result.prefill_512_s["session"] / result.prefill_512_s_stock)
    assert steps.count("rounds") == 2 and {"preparing, permute", "preparing, session", "loading"} <= set(steps)


def test_what_cannot_be_measured_is_refused_before_anything_is_written() -> None:
    steps: list[str] = []
    with pytest.raises(BadInput, match="choose one of tiny"):
        bench_kv_shield("gpt-5", lambda stage, done, total: steps.append(stage))
    assert steps == []
    with pytest.raises(BadInput):
        bench_kv_shield("tiny", lambda stage, done, total: None, layers=9)
    with pytest.raises(BadInput):
        bench_kv_shield("tiny", lambda stage, done, total: None, layers=1, noise_dims=3)


def test_sealing_is_measured_on_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_shield, "MAX_BLOCK_BYTES", 2**16)
    assert kv_shield._sealing_speed() > 0.01
