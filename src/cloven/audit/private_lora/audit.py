"""All attacks on a private-LoRA bundle."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from cloven.audit.attack import Attack
from cloven.audit.findings import Findings
from cloven.audit.private_lora.averaging import averaging
from cloven.audit.private_lora.distinguishing import distinguishing
from cloven.audit.private_lora.division import division
from cloven.audit.private_lora.extraction import extraction
from cloven.audit.private_lora.hint_inversion import hint_inversion
from cloven.audit.private_lora.packing import packing
from cloven.audit.private_lora.regression import regression
from cloven.audit.private_lora.subject import SCHEME, SEED, Target, open_target
from cloven.audit.private_lora.unit_queries import unit_queries
from cloven.private_lora.manifest import ServerManifest

ATTACKS: tuple[Callable[[Target], list[Attack]], ...] = (
    regression,
    averaging,
    unit_queries,
    packing,
    hint_inversion,
    distinguishing,
    division,
)
NOT_TESTED = (
    "All groups but the narrowest, which needs the fewest answers; of wide matrices, queries about columns behind the first 1,024.",
    "Lattice reduction against queries and hint: that they withstand it is an estimate for their parameters, not an experiment.",
    "Clients that know more of the weights than that they are 8-bit numbers, from a related adapter, say: they need fewer answers.",
    "Decoding that makes use of the weights being whole numbers: least squares does not round.",
    "Wrong answers: clients cannot check them, and a server that lies can steer what the model says.",
    "The ledger itself: crashes, backups that are put back, accounts. A machine that is set back as a whole forgets what it answered.",
    "The fhe backend's clients that cheat: with a key or noise of their own they have the weights after one query.",
    "Side channels of the machines: timing, memory access, power.",
)
_NO_SEAL = "Division of the fhe backend's ciphertexts: SEAL is not installed (cloven[fhe])."


def audit_private_lora(out: Path, seed: int = SEED) -> Findings:
    """Attack the narrowest group of a bundle.

    Args:
        out: OUT of `cloven prepare private-lora`, both halves: the owner audits.
        seed: of the attackers' choices.

    Raises:
        BadBundle, ForeignBundle: a half is missing, or they do not belong together.  LedgerUnusable: the ledger is.
    """
    target = open_target(out, seed)
    attacks = [outcome for attack in ATTACKS for outcome in attack(target)]
    parameters = {
        "bundle": ServerManifest.read(out / "server").bundle,
        "bits": target.bits,
        "hint": target.parameters.hint,
        "budget_tokens": target.budget,
        "group": target.group.name,
        "columns": target.group.columns,
        "rank": max(module.rank for module in target.group.modules),
        "seed": seed,
        "scheme": SCHEME,
        "cloven": version("cloven"),
        "torch": torch.__version__,
        "masks": "drawn anew by every audit, and with them the last digits of what depends on them",
    }
    skipped = () if any(attack.name == "division" for attack in attacks) else (_NO_SEAL,)
    return Findings("private-lora", attacks, [extraction(target)], parameters, (*skipped, *NOT_TESTED))
