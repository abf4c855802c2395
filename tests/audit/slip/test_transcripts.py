from __future__ import annotations

import math

import pytest
import torch

from cloven.audit.slip import transcripts as module
from cloven.audit.slip.transcripts import (
    correlation_p,
    neighbour_tests,
    plane_tests,
    rejected,
    repeat_tests,
    transcripts,
    uniform_p,
)
from cloven.field.residues import H
from tests.attacks.weakened import pads_used_again
from tests.audit.slip.subjects import named, tiny_subject
from tests.helpers import random_residues


def test_a_real_recording_is_noise() -> None:
    found = named(transcripts(tiny_subject()))
    assert set(found) == {"transcript_uniform", "transcript_repeated_prompt", "transcript_neighbours"}
    for attack in found.values():
        assert attack.verdict == "holds" and attack.value <= 0.1
    assert found["transcript_uniform"].weakened_value >= 0.5
    assert found["transcript_repeated_prompt"].weakened_value == found["transcript_neighbours"].weakened_value == 1.0


@pytest.mark.parametrize(
    ("after", "seen_by"), [(module.PROMPT + module.NEW - 1, "transcript_repeated_prompt"), (1, "transcript_neighbours")]
)
def test_pads_that_are_used_again_are_told(monkeypatch: pytest.MonkeyPatch, after: int, seen_by: str) -> None:
    """The weakened system, in real processes: the second pass under the first one's pads, and every token under one pad."""
    pads_used_again(monkeypatch, after)
    found = named(transcripts(tiny_subject()))
    assert found[seen_by].verdict == "broken" and found[seen_by].value > 0.8  # the head sees fewer rows, and its pads later
    if after > 1:
        assert found["transcript_neighbours"].verdict == "holds"


def test_unmasked_rows_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weakened system, all the way: a recording without masks, the same for the same prompt."""
    rows = {0: torch.randint(-(2**20), 2**20, (40, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)}
    monkeypatch.setattr(module, "record", lambda *_: [rows, rows])
    found = named(transcripts(tiny_subject()))
    assert found["transcript_repeated_prompt"].verdict == "broken" and found["transcript_uniform"].value >= 0.5


def test_tests_of_noise_and_of_what_is_none() -> None:
    noise, other = random_residues(200, 64, seed=1), random_residues(200, 64, seed=2)
    assert all(p > 1e-5 for p in plane_tests(noise)) and min(plane_tests(noise // 2**9)) < 1e-9
    assert correlation_p(noise, other) > 1e-5 > correlation_p(noise, noise)
    assert repeat_tests({0: noise}, {0: noise})[0] < 1e-9 < repeat_tests({0: noise}, {0: other})[0]
    assert neighbour_tests({0: noise})[0] > 1e-5 and neighbour_tests({0: noise[:1]}) == []
    assert plane_tests(torch.tensor([[-H, H, 0]], dtype=torch.int32))
    assert uniform_p(torch.arange(256).repeat(4), 256) == pytest.approx(1.0)
    assert rejected([0.5, 0.0]) == (0.5, 2) and math.isclose(correlation_p(noise, -noise), 0.0)
