"""What is attacked: the narrowest group of a bundle, with the server's matrix, the client's hint, and the ledger's budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cloven.errors import ForeignBundle
from cloven.field.codec import encode
from cloven.field.products import multiply
from cloven.field.selection import select_backend
from cloven.masks.lwe import LweMasks
from cloven.masks.lwe_parameters import LweParameters
from cloven.private_lora.ledger import Ledger
from cloven.private_lora.manifest import ClientGroup, ServerManifest, read_client
from cloven.private_lora.messages import rounded, unrounded
from cloven.private_lora.names import hint_name
from cloven.private_lora.server import server_matrices
from cloven.private_lora.session import client_tensors, remote_bounds

SCHEME = "private-lora/lwe"
BEYOND = "private-lora/lwe, more answers than the budget allows"
CLIENT = "a client that wants the adapter"
SERVER = "a server that wants the input"
SEED = 0
SHOWN_COLUMNS = 1024  # of wider matrices the attacks show this many: the others are alike


def attackers_choices(seed: int = SEED) -> torch.Generator:
    """The random numbers that attackers choose, the same for the same seed: no secrets."""
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Target:
    """One group under attack: W' int8 [N, D] as the server holds it, and what a client holds.

    Args:
        budget: rows that the ledger allows all clients together.
        random: of the attackers' choices; the attacks draw from it one after another.
        seed: of these.
    """

    matrix: Tensor = field(repr=False)
    hint: Tensor = field(repr=False)
    group: ClientGroup
    parameters: LweParameters
    bits: int
    budget: int
    random: torch.Generator = field(default_factory=attackers_choices, repr=False)
    seed: int = SEED

    @property
    def codes(self) -> Tensor:
        """W, int8 [N, K]: what the client wants."""
        return self.matrix[:, self.parameters.pad_columns :]

    def answer(self, c: Tensor) -> Tensor:
        """What the server answers to residues c int32 [M, D], unrounded to the middles of the intervals: int32 [M, N]."""
        return self.rounded(multiply(select_backend("cpu"), c, select_backend("cpu").place(self.matrix)))

    def rounded(self, z: Tensor) -> Tensor:
        """What is left of residues z when they are rounded to `bits`."""
        return unrounded(rounded(z, self.bits), z.shape[0], z.shape[1], self.bits)

    def masks(self) -> LweMasks:
        """Fresh masks of an honest client."""
        return LweMasks(self.hint, self.matrix.shape[1], self.parameters, select_backend("cpu"))

    def encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows x float64 [M, K] as an honest client encodes them: residues int32 [M, D], zero on the pad columns, and their scales."""
        x_int, alpha = encode(x, remote_bounds(self.group), self.parameters.noise(self.group.l2, self.bits))
        return torch.nn.functional.pad(x_int, (self.parameters.pad_columns, 0)), alpha

    def honest(self, x: Tensor) -> Tensor:
        """What an honest client decodes for rows x float64 [M, K]: W x in the units of x, float64 [M, N]."""
        rows, alpha = self.encoded(x)
        pads = self.masks().take(len(x))
        return pads.unmask(self.answer(pads.mask(rows))).double() / alpha


def open_target(out: Path, seed: int = SEED) -> Target:
    """The narrowest group: it needs the fewest answers.

    Args:
        out: OUT of `cloven prepare private-lora`, both halves: the owner audits.

    Raises:
        BadBundle, ForeignBundle: a half is missing, or they do not belong together.  LedgerUnusable: the ledger is.
    """
    client, server = read_client(out / "client"), ServerManifest.read(out / "server")
    if client.bundle != server.bundle:
        raise ForeignBundle(f"{out}: the halves are of two bundles, {client.bundle} and {server.bundle}")
    tensors = client_tensors(out / "client", client)
    ledger = Ledger(server.ledger_path(out / "server"), server.adapter)
    budget, _ = ledger.budget()
    ledger.close()
    index = min(range(len(client.groups)), key=lambda i: client.groups[i].columns)
    matrix = server_matrices(out / "server", server)[index]
    return Target(
        matrix, tensors[hint_name(index)], client.groups[index], client.parameters, client.bits, budget, attackers_choices(seed), seed
    )
