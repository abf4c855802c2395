"""The quantisation method "cloven" of transformers: how a bundle loads through stock `from_pretrained`.

Imported by the hook in `cloven/__init__.py` as soon as transformers' quantizers are. A scheme registers a `Scheme`; the quantizer reads
the scheme's name from config.json and calls it

    before the weights are loaded   modules are swapped in place on the meta device; files are hashed, tensor names compared
    after                           a session is attached, where the worker's address is known

transformers only warns about missing and unexpected tensors and then runs on uninitialised memory; here both are errors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cloven import registration_hook
from cloven.bundle.verification import verify_files
from cloven.errors import BadBundle, BadInput, ForeignBundle
from cloven.model.runtime import RuntimeOptions
from cloven.telemetry import logger

METHOD = "cloven"
CONFIG_VERSION = 1
_DESCRIPTION = ("scheme", "version", "bundle", "model")
_RUNTIME = ("worker", "enclave", "server", "keys", "exposed", "timeout", "base", "pin")


class Manifest(Protocol):
    """What the loader asks of a half's manifest: the bundle's id, and the SHA-256 of its files."""

    @property
    def bundle(self) -> str:
        """The bundle id, 32 hexadecimal digits."""

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 by file name."""


class Scheme(Protocol):
    """What a scheme does with a model that is being loaded.

    `peer` names what a session connects to: the setting of `ClovenConfig`, and CLOVEN_… in the environment. `places` names the devices
    that `device_map` may give, as beginnings; none: the CPU only.
    """

    peer: str
    places: tuple[str, ...]

    def manifest(self, folder: Path) -> Manifest:
        """Read and check the manifest of the half that is being loaded."""

    def weights(self, folder: Path, config: ClovenConfig) -> list[Path] | None:
        """The files with the model's weights, checked, where they are not those of the folder; None: they are."""

    def swap(self, model: nn.Module, description: dict[str, Any]) -> None:
        """Replace modules, on the meta device."""

    def finish(self, model: nn.Module) -> None:
        """What there is to do once the weights are there."""

    def attach(self, model: nn.Module, options: RuntimeOptions) -> Any:
        """Open a session and connect the modules to it."""


_schemes: dict[str, Scheme] = {}


def register_scheme(name: str, scheme: Scheme) -> None:
    """Make a scheme known under the name that config.json uses."""
    _schemes[name] = scheme


def scheme_named(name: object) -> Scheme:
    """The scheme that config.json names.

    Raises:
        BadBundle: unknown.
    """
    if not isinstance(name, str) or name not in _schemes:
        raise BadBundle(f"config.json: unknown scheme {name!r}; this cloven knows {', '.join(sorted(_schemes))}")
    return _schemes[name]


class ClovenConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a bundle, and the way to give run-time settings to `from_pretrained`:

        AutoModelForCausalLM.from_pretrained("OUT/trusted", quantization_config=ClovenConfig(worker="ipc:///run/me/worker"))

    Args:
        worker, enclave, server: the address of what the scheme connects to; never stored. The environment's CLOVEN_WORKER,
            CLOVEN_ENCLAVE and CLOVEN_SERVER fill what is not given.
        keys, exposed, timeout: see `cloven.attach`; never stored. The environment's CLOVEN_KEYS and CLOVEN_EXPOSED fill in.
        base, pin: private LoRA's base model, and the fingerprint of OUT/client; never stored. CLOVEN_BASE and CLOVEN_PIN fill in.
        description: what config.json holds; only the loader gives it.
    """

    def __init__(
        self,
        worker: str | None = None,
        keys: str | None = None,
        exposed: str | None = None,
        timeout: float | None = None,
        enclave: str | None = None,
        server: str | None = None,
        base: str | None = None,
        pin: str | None = None,
        **description: Any,
    ) -> None:
        self.quant_method = METHOD
        self.enclave, self.server, self.base, self.pin = enclave, server, base, pin
        self.worker, self.keys, self.exposed, self.timeout = worker, keys, exposed, timeout
        description.pop("quant_method", None)
        unknown = set(description) - set(_DESCRIPTION)
        if unknown:
            raise BadInput(f"ClovenConfig: unknown setting {sorted(unknown)[0]!r}")
        self.description = {name: description.get(name) for name in _DESCRIPTION}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Parse what config.json holds.

        Raises:
            BadBundle: it names a worker, keys or a copy: a bundle must not choose them.
        """
        named = sorted(set(config_dict) & set(_RUNTIME))
        if named:
            raise BadBundle(f"config.json: holds the run-time setting {named[0]!r}; bundles never do, so somebody else wrote it")
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets: the description, never an address."""
        return {"quant_method": METHOD, **self.description}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a configuration given to `from_pretrained` adds to the stored one."""
        return {name: getattr(self, name) for name in _RUNTIME if getattr(self, name) is not None}

    def __repr__(self) -> str:
        return f"ClovenConfig(scheme={self.description['scheme']!r}, bundle={self.description['bundle']!r})"

    def options(self, peer: str) -> RuntimeOptions | None:
        """Run-time settings for a scheme's peer, or None where its address is not known."""
        address = getattr(self, peer) or os.environ.get(f"CLOVEN_{peer.upper()}")
        if not address:
            return None
        keys = self.keys or os.environ.get("CLOVEN_KEYS") or None
        exposed = self.exposed or os.environ.get("CLOVEN_EXPOSED") or None
        given = RuntimeOptions(address, Path(keys) if keys else None, Path(exposed) if exposed else None, pin=self.given("pin"))
        return given if self.timeout is None else given.with_timeout(self.timeout)

    def given(self, name: str) -> str | None:
        """A setting, or what the environment says: CLOVEN_…"""
        value: str | None = getattr(self, name) or os.environ.get(f"CLOVEN_{name.upper()}") or None
        return value


class ClovenQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps modules before loading, checks what was loaded, attaches the session."""

    requires_calibration = True
    requires_parameters_quantization = False

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """The trusted side is the CPU; offloading to disk would leave secret tensors in files."""
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        allowed = scheme_named(self.quantization_config.description["scheme"]).places
        if not allowed and any(str(place).startswith(("cuda", "disk", "mps")) or isinstance(place, int) for place in places):
            raise BadInput(
                "device_map: the trusted half of a split model runs on the CPU; leave device_map out (the worker takes --device)"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Everything stays on the CPU, where the scheme says so."""
        if scheme_named(self.quantization_config.description["scheme"]).places:
            return device_map
        return None if device_map is None else {"": "cpu"}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        description = self.quantization_config.description
        if description["version"] != CONFIG_VERSION:
            raise BadBundle(f"config.json: version {description['version']!r}, this cloven reads {CONFIG_VERSION}")
        checkpoint = [Path(path) for path in kwargs.get("checkpoint_files") or []]
        if not checkpoint:
            raise BadBundle("a cloven bundle is loaded from its directory, with its safetensors files")
        self._folder = checkpoint[0].parent
        scheme = scheme_named(description["scheme"])
        manifest = scheme.manifest(self._folder)
        if manifest.bundle != description["bundle"]:
            raise ForeignBundle(f"{self._folder}: config.json is of bundle {description['bundle']}, manifest.json of {manifest.bundle}")
        verify_files(self._folder, {name: manifest.files.get(name, "") for name in (*(path.name for path in checkpoint), "config.json")})
        elsewhere = scheme.weights(self._folder, self.quantization_config)
        scheme.swap(model, description["model"])
        if elsewhere is None:
            _require_same_names(model, checkpoint)
        else:
            kwargs["checkpoint_files"][:] = map(str, elsewhere)  # the loader's own list

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        model.cloven_folder = self._folder
        scheme = scheme_named(self.quantization_config.description["scheme"])
        scheme.finish(model)
        options = self.quantization_config.options(scheme.peer)
        if options is not None:
            scheme.attach(model, options)

    def is_serializable(self) -> bool:
        """`save_pretrained` is refused: a manifest binds OUT/trusted to its exposed half. Copy the directory instead."""
        logger.warning("a split model is not saved with save_pretrained: copy its OUT/trusted directory")
        return False

    @property
    def is_trainable(self) -> bool:
        """The split weights cannot be trained."""
        return False


def _require_same_names(model: nn.Module, checkpoint: list[Path]) -> None:
    stored: set[str] = set()
    for path in checkpoint:
        try:
            with safe_open(path, framework="pt") as shard:
                stored.update(shard.keys())
        except (OSError, SafetensorError) as error:
            raise BadBundle(f"{path}: not a safetensors file: {error}") from error
    expected = set(model.state_dict()) - set(getattr(model, "all_tied_weights_keys", None) or ())
    for names, what in ((expected - stored, "is missing"), (stored - expected, "is unexpected")):
        if names:
            raise BadBundle(f"{checkpoint[0].parent}: tensor {sorted(names)[0]} {what}; copy the bundle again")


def _register() -> None:
    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config(METHOD)(ClovenConfig)
    auto.register_quantizer(METHOD)(ClovenQuantizer)
    types = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", None)
    if isinstance(types, tuple):  # private; without it, settings come from the environment or `cloven.attach`
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*types, ClovenConfig)


_register()
registration_hook.register()
