"""Write the list of attacks in docs/threat-model.md from the docstrings of the modules that make them."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

from cloven.audit.kv_shield import audit as kv_shield
from cloven.audit.private_lora import audit as private_lora
from cloven.audit.slip import audit as slip
from cloven.audit.slip.guessed_subspace import inside_a_guess
from cloven.audit.slip.learned_scramble import learned_scramble
from cloven.audit.slip.recovery import recovery

PAGE = Path(__file__).parents[1] / "docs" / "threat-model.md"
BEGIN, END = "<!-- begin: docstrings of src/cloven/audit -->", "<!-- end: docstrings -->"
ATTACKS = {
    "SLIP": (*slip.ATTACKS, recovery, inside_a_guess, learned_scramble),
    "KV-Shield": kv_shield.ATTACKS,
    "private LoRA": private_lora.ATTACKS,
}
FIELDS = ("Adversary", "Method", "Success", "Weakened", "Source")


def entry(module: ModuleType) -> str:
    """One attack in Markdown: the question, then what the docstring says."""
    text = inspect.getdoc(module) or ""
    question, _, rest = text.partition("\n\n")
    found = re.findall(rf"^({'|'.join(FIELDS)}): (.*?)(?=^(?:{'|'.join(FIELDS)}):|\Z)", rest, re.S | re.M)
    if [name for name, _ in found] != list(FIELDS):
        raise ValueError(f"{module.__name__}: its docstring says {[name for name, _ in found]}, not {list(FIELDS)}")
    lines = [f"- {name}: {' '.join(words.split())}" for name, words in found]
    return "\n".join([f"**{' '.join(question.split())}** (`{module.__name__.removeprefix('cloven.')}`)", "", *lines])


def section() -> str:
    """All of them, between the marks, under a heading for every scheme."""
    parts = [BEGIN]
    for scheme, attacks in ATTACKS.items():
        parts += [f"### Attacks on {scheme}", *(entry(sys.modules[attack.__module__]) for attack in attacks)]
    return "\n\n".join([*parts, END])


def written(page: str) -> str:
    """The page with the section anew."""
    before, _, rest = page.partition(BEGIN)
    return before + section() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
