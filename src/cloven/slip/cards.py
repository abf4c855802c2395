"""The README.md of each half: what it is, what it holds, under which licence, and what is not hidden."""

from __future__ import annotations

from cloven.slip.config import SlipConfig
from cloven.slip.summary import Summary

_FRONT = """---
license: {licence}
library_name: cloven
base_model: {name}
---
"""

_TRUSTED = """# {name}: the trusted half of a SLIP split

**Secret. Keep this folder on the machine that you trust; never copy it to a worker.**

It holds the embeddings, norms, biases, scales, the secret low-rank part of every linear layer ({fraction:.2%} of their
parameters, {energy:.1%} of their energy) and the keys of the scramble. The matrix products run on the exposed half, at a worker.

    import cloven
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("trusted")   # with CLOVEN_WORKER=ADDRESS in the environment

Parameters: precision {precision}, scramble {scramble}. Licence of the base model: {licence}.

Not hidden from the worker: the number of rows of every product and their times, the shapes of the groups, and what the exposed half
itself gives away of the weights (measured, not proved: see the threat model in cloven's documentation).
"""

_EXPOSED = """# {name}: the exposed half of a SLIP split

For the untrusted worker: `cloven worker exposed --listen ADDRESS`.

It holds one int8 matrix per group of linear layers ({precision}{scrambled}), without scales, names or keys. It is no model and
cannot be loaded as one. Licence of the base model, of which these matrices are a part: {licence}.

What is not hidden from whoever holds this folder: the shapes and the order of the groups, and what the codes give away of the
weights beyond the secret part.
"""


def trusted_card(name: str, licence: str, config: SlipConfig, summary: Summary) -> str:
    """README.md of OUT/trusted."""
    figures = summary.to_dict()
    return (_FRONT + _TRUSTED).format(
        name=name,
        licence=licence,
        precision=config.precision,
        scramble=config.scramble,
        fraction=figures["secret_fraction"],
        energy=figures["secret_energy"],
    )


def exposed_card(name: str, licence: str, config: SlipConfig) -> str:
    """README.md of OUT/exposed."""
    scrambled = f", rows and columns scrambled by a secret {config.scramble}" if config.scramble != "none" else ", NOT scrambled"
    return (_FRONT + _EXPOSED).format(name=name, licence=licence, precision=config.precision, scrambled=scrambled)
