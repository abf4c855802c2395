"""The demo model and the demo adapter that ship with the package."""

from __future__ import annotations

from pathlib import Path


def demo_model_path() -> Path:
    """The directory of the demo model: a Llama of 4.1 M parameters trained on Shakespeare's plays; a complete Hugging Face directory."""
    return Path(__file__).parent / "demo_model"


def demo_adapter_path() -> Path:
    """The PEFT directory of the demo adapter: a LoRA (r = 8) of the demo model for the prose of an encyclopedia."""
    return Path(__file__).parent / "demo_adapter"
