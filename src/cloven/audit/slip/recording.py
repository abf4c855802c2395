"""What a real worker process receives in real passes of the model: recorded, for the attacks that read transcripts."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cloven.audit.slip.subject import Subject
from cloven.cluster.worker_process import WorkerProcess
from cloven.model.attach import attach
from cloven.worker.transcript import read_transcript


def record(subject: Subject, ids: Tensor, passes: int, new_tokens: int = 0) -> list[dict[int, Tensor]]:
    """What a worker process receives in passes over ids [B, T]: for each pass by group, int32 [B·T, K].

    Args:
        new_tokens: generate so many after the ids in every pass, greedily: rows of these are recorded too, all but the last token's; the
            head then sees one row for every new token.
    """
    with tempfile.TemporaryDirectory(prefix="cloven-audit-") as folder:
        path = Path(folder) / "transcript"
        model = AutoModelForCausalLM.from_pretrained(subject.bundle.trusted, dtype=torch.float32, trust_remote_code=False)
        with (
            WorkerProcess(subject.bundle.exposed.absolute(), None, "--record", str(path)) as worker,
            attach(model, worker.address, exposed=subject.bundle.exposed, look_ahead=0),
        ):
            for _ in range(passes):
                if new_tokens:
                    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
                    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)
                else:
                    model(input_ids=ids, use_cache=False)
        rows = list(read_transcript(path))
    by_group = {group.group.index: torch.cat([c for index, c in rows if index == group.group.index]) for group in subject.groups}
    return [{index: c.view(passes, -1, c.shape[1])[number] for index, c in by_group.items()} for number in range(passes)]
