from __future__ import annotations

import torch

from cloven.audit.slip.recording import record
from tests.audit.slip.subjects import tiny_subject


def test_what_is_recorded() -> None:
    subject = tiny_subject()
    first, second = record(subject, subject.text[:2, :9], 2)
    assert list(first) == list(second) == [group.group.index for group in subject.groups]
    for group in subject.groups:
        ours, theirs = first[group.group.index], second[group.group.index]
        assert ours.shape == theirs.shape == (18, group.codes.shape[1]) and not torch.equal(ours, theirs)
