"""Every exception that cloven raises.

    ClovenError
    ├── BadInput                  what the user gave is wrong                       exit 2
    │   ├── UnsupportedModel      the model has layers that cannot be protected
    │   └── BadBundle             a bundle directory is missing, incomplete or of another version
    ├── RunError                  something failed while running                    exit 1
    │   ├── NotAttached           a split model was called without a worker
    │   ├── WorkerUnreachable     nobody answers at the address
    │   ├── WorkerTimeout         an answer did not come in time
    │   ├── WorkerRefused         the worker answered with an error message
    │   │   └── BudgetExhausted   the adapter server's budget for these answers is used up
    │   ├── LedgerUnusable        the ledger of an adapter is missing, locked, corrupt, or not the one it was
    │   ├── StoreUnusable         a pad store is missing, corrupt, a copy, restored, or of another machine or bundle
    │   ├── StoreEmpty            a pad store has run dry
    │   └── SessionClosed         the session has ended, and why
    ├── Interrupted               by the user, and the same command goes on         exit 130
    └── SecurityError             somebody may be cheating                          exit 3
        ├── VerificationFailed    an answer or a pad failed its Freivalds check
        ├── TamperedBundle        bytes differ from what the manifest promises
        ├── ForeignBundle         two halves that do not belong together
        ├── PadMisuse             a pad was about to be used twice, or after a fork
        └── PeerRefused           keys or permissions do not allow this connection

Messages name layers, files, ids and addresses; never a secret, a prompt or an activation.
"""

from __future__ import annotations


class ClovenError(Exception):
    """Base of all; `exit_code` is what the command line returns for it."""

    exit_code = 1


class BadInput(ClovenError):
    """What the user gave is wrong; the message says what, where, and what to do."""

    exit_code = 2


class UnsupportedModel(BadInput):
    """The model has layers that this scheme cannot protect."""


class BadBundle(BadInput):
    """A bundle directory is missing, incomplete, malformed or of another version."""


class RunError(ClovenError):
    """Something failed while running."""


class Interrupted(ClovenError):
    """By the user; nothing is lost."""

    exit_code = 130


class NotAttached(RunError):
    """A split model was called before a worker was attached to it."""


class WorkerUnreachable(RunError):
    """Nobody answers at the worker's address."""


class WorkerTimeout(RunError):
    """The worker's answer did not come within the timeout."""


class WorkerRefused(RunError):
    """The worker answered with an error message."""


class BudgetExhausted(WorkerRefused):
    """The budget of answers is used up, for this client or for all; no answer was given, and none is owed."""


class LedgerUnusable(RunError):
    """The ledger of an adapter cannot be trusted or reached, so nothing is served; the message says what to do."""


class StoreUnusable(RunError):
    """A pad store cannot be trusted or reached, so no pad of it is used; the message says what to do."""


class StoreEmpty(RunError):
    """A pad store has run dry; nothing was sent, and no pad was used twice."""


class SessionClosed(RunError):
    """The session has ended; the message says why."""


class SecurityError(ClovenError):
    """Somebody may be cheating; nothing of the suspect data was used."""

    exit_code = 3


class VerificationFailed(SecurityError):
    """An answer or a pad failed its Freivalds check; the message names the layer, `worker` who answered ("" for a pad)."""

    worker: str = ""


class TamperedBundle(SecurityError):
    """Bytes on disk differ from what the manifest promises; the message names the file."""


class ForeignBundle(SecurityError):
    """Two halves that do not belong together; the message names both ids."""


class PadMisuse(SecurityError):
    """A pad was about to be used twice, out of order, or in a forked process."""


class PeerRefused(SecurityError):
    """Keys or file permissions do not allow this connection."""
