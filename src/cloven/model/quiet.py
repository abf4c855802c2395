"""Less noise from transformers, for commands that print their own lines."""

from __future__ import annotations

import transformers


def quiet_transformers() -> None:
    """No loading bars and no hints of transformers between our own lines."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
