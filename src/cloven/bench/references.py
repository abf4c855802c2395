"""The product of private LoRA, one row and one layer, by other libraries: client and server in this process, where they are installed."""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cloven.errors import BadInput
from cloven.field.codec import encode
from cloven.private_lora.fhe import FheClient, FheMatrix
from cloven.private_lora.session import remote_bounds
from cloven.zoo.random_adapter import RandomAdapter


class Reference(Protocol):
    """Something that multiplies; every `measure` adds to the seconds."""

    client_seconds: list[float]
    server_seconds: list[float]
    bytes_up: float
    bytes_down: float

    def measure(self, x: Tensor) -> None:
        """One row x float64 [K] through one layer."""


class _Timed:
    def __init__(self) -> None:
        self.client_seconds: list[float] = []
        self.server_seconds: list[float] = []
        self.bytes_up = self.bytes_down = 0.0

    def _record(self, started: float, asked: float, answered: float, sizes: tuple[int, int]) -> None:
        self.client_seconds.append(asked - started + time.perf_counter() - answered)
        self.server_seconds.append(answered - asked)
        self.bytes_up, self.bytes_down = sizes


class Fhe(_Timed):
    """SEAL's BFV: `cloven.private_lora.fhe`; two int8 terms per weight, as with lwe."""

    def __init__(self, adapter: RandomAdapter) -> None:
        super().__init__()
        self._group = adapter.groups[0]
        self._keys = FheClient()
        self._matrix = FheMatrix(adapter.matrices[0][:, adapter.config.parameters.pad_columns :])

    def measure(self, x: Tensor) -> None:
        """See `Reference`."""
        started = time.perf_counter()
        x_int, _ = encode(x[None], remote_bounds(self._group))
        query = self._keys.query(x_int[0])
        asked = time.perf_counter()
        answer = self._matrix.answer(memoryview(query))
        answered = time.perf_counter()
        self._keys.result(memoryview(answer), self._group.rows, self._group.columns)
        self._record(started, asked, answered, (len(query), len(answer)))


class TenSeal(_Timed):
    """TenSEAL's CKKS: encrypted vector times plain matrix [K, r]."""

    def __init__(self, adapter: RandomAdapter) -> None:
        super().__init__()
        import tenseal

        self._library: Any = tenseal
        self._context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[60, 40, 40, 60])
        self._context.global_scale = 2**40
        self._context.generate_galois_keys()
        group = adapter.groups[0]
        ranks = sum(module.rank for module in group.modules)
        self._matrix = np.random.default_rng(0).standard_normal((group.columns, ranks)).tolist()

    def measure(self, x: Tensor) -> None:
        """See `Reference`."""
        started = time.perf_counter()
        query = self._library.ckks_vector(self._context, x.tolist()).serialize()
        asked = time.perf_counter()
        answer = self._library.ckks_vector_from(self._context, query).matmul(self._matrix).serialize()
        answered = time.perf_counter()
        self._library.ckks_vector_from(self._context, answer).decrypt()
        self._record(started, asked, answered, (len(query), len(answer)))


class ConcreteMl(_Timed):
    """concrete-ml-extensions' encrypted matrix times clear matrix, on the CPU, with 7-bit numbers."""

    def __init__(self, adapter: RandomAdapter) -> None:
        super().__init__()
        import concrete_ml_extensions

        self._library: Any = concrete_ml_extensions
        self._parameters = self._library.MatmulCryptoParameters.deserialize(self._library.default_params())
        self._key, self._compression = self._library.create_private_key(self._parameters)
        group = adapter.groups[0]
        ranks = sum(module.rank for module in group.modules)
        self._matrix = np.random.default_rng(0).integers(0, 2**7, (group.columns, ranks), dtype=np.uint64)

    def measure(self, x: Tensor) -> None:
        """See `Reference`."""
        library = self._library
        row = ((x / x.abs().max() + 1) * 63).round().to(torch.int64).numpy().astype(np.uint64)[None]
        started = time.perf_counter()
        query = library.encrypt_matrix(pkey=self._key, crypto_params=self._parameters, data=row).serialize()
        asked = time.perf_counter()
        received = library.EncryptedMatrix.deserialize(query)
        product = library.matrix_multiplication(encrypted_matrix=received, data=self._matrix, compression_key=self._compression)
        answer = product.serialize()
        answered = time.perf_counter()
        result = library.CompressedResultEncryptedMatrix.deserialize(answer)
        library.decrypt_matrix(result, self._key, self._parameters, num_valid_glwe_values_in_last_ciphertext=self._matrix.shape[1])
        self._record(started, asked, answered, (len(query), len(answer)))


def references(adapter: RandomAdapter) -> tuple[dict[str, Reference], list[str]]:
    """The references that are installed, and the names of those that are not."""
    there: dict[str, Reference] = {}
    missing: list[str] = []
    kinds: tuple[tuple[str, Any], ...] = (("fhe", Fhe), ("tenseal", TenSeal), ("concrete-ml-extensions", ConcreteMl))
    for name, kind in kinds:
        try:
            there[name] = kind(adapter)
        except (ImportError, BadInput):
            missing.append(name)
    return there, missing
