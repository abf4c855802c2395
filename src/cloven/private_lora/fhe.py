"""The same product by standard homomorphic encryption: SEAL's BFV, N = 4096, 109-bit q (128 bits of security), plaintext modulus p.

Coefficient packing, no rotations. With K columns, B = ⌊N / K⌋ rows of W go into one plaintext polynomial (chunks of N columns if K > N):

    x(X) = Σ_j x_j X^j         w(X) = Σ_i Σ_j W_ij X^{(i+1)K − 1 − j}         (x·w)_{(i+1)K − 1} = Σ_j W_ij x_j  mod p

The server multiplies, adds a random polynomial on all coefficients that are not answers, and a fresh encryption of zero under the client's
public key. The reference to compare `lwe` with, and a cross-check in the tests.

INSECURE against a client that does not follow the protocol: with a public key of its own making, or with noise that it chose in the
ciphertext, one query gives W exactly (tests/attacks shows both). The input is hidden from the server as BFV promises. Needs `cloven[fhe]`.
"""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cloven.errors import BadInput
from cloven.field.residues import P, centre
from cloven.wire.schema import MalformedMessage

DEGREE = 4096
CIPHERTEXT_BYTES = 131_185
KEY_BYTES = 196_721
BANNER = (
    "INSECURE: the fhe backend gives the adapter away to a client that chooses its own key or noise, in one query. "
    "For comparisons, with clients that follow the protocol."
)


def _seal() -> Any:
    try:
        import seal
    except ImportError as error:
        raise BadInput("the fhe backend needs SEAL: pip install 'cloven[fhe]'") from error
    return seal


def context() -> Any:
    """The BFV context of the specification.

    Raises:
        BadInput: SEAL is not installed.
    """
    seal = _seal()
    parameters = seal.EncryptionParameters(seal.scheme_type.bfv)
    parameters.set_poly_modulus_degree(DEGREE)
    parameters.set_coeff_modulus(seal.CoeffModulus.BFVDefault(DEGREE))
    parameters.set_plain_modulus(P)
    return seal.SEALContext(parameters)


def _plaintext(seal: Any, coefficients: npt.NDArray[np.int64]) -> Any:
    """Centred coefficients int64 [≤ N], not all zero, as a plaintext."""
    terms = [f"{value % P:X}x^{power}" for power, value in enumerate(coefficients.tolist()) if value]
    return seal.Plaintext(" + ".join(reversed(terms)) or "0")  # SEAL wants descending powers


def _coefficients(plaintext: Any) -> npt.NDArray[np.int64]:
    """The coefficients of a plaintext, int64 [N] in [0, p)."""
    result = np.zeros(DEGREE, np.int64)
    for term in plaintext.to_string().split(" + "):
        value, _, power = term.partition("x^")
        result[int(power) if power else 0] = int(value, 16)
    return result


def rows_per_polynomial(columns: int) -> int:
    """B, the rows of W that share one answer."""
    return max(1, DEGREE // min(columns, DEGREE))


def answers(rows: int, columns: int) -> int:
    """Ciphertexts of an answer."""
    return -(-rows // rows_per_polynomial(columns))


class FheClient:
    """A key pair, fresh, and the client's half of the protocol."""

    def __init__(self) -> None:
        self._seal, self._context = _seal(), context()
        generator = self._seal.KeyGenerator(self._context)
        key = generator.create_public_key()
        self.public_key = bytes(key.to_string())
        self._encryptor = self._seal.Encryptor(self._context, key)
        self._decryptor = self._seal.Decryptor(self._context, generator.secret_key())

    def __repr__(self) -> str:
        return "FheClient(<secret>)"

    def query(self, x_int: Tensor) -> bytes:
        """The public key and the encryption of one row x_int, residues int32 [K]."""
        chunks = x_int.numpy().astype(np.int64)
        parts = [chunks[start : start + DEGREE] for start in range(0, len(chunks), DEGREE)]
        encrypted = [bytes(self._encryptor.encrypt(_plaintext(self._seal, part)).to_string()) for part in parts]
        return b"".join([self.public_key, *encrypted])

    def result(self, answer: memoryview, rows: int, columns: int) -> Tensor:
        """W x_int mod p, exactly, from an answer: residues int32 [rows].

        Raises:
            MalformedMessage: the answer is of the wrong size, or no ciphertexts.
        """
        if answer.nbytes != CIPHERTEXT_BYTES * answers(rows, columns):
            raise MalformedMessage("size", f"an answer of {answer.nbytes} bytes")
        step, width = rows_per_polynomial(columns), min(columns, DEGREE)
        values: list[int] = []
        for start in range(0, answer.nbytes, CIPHERTEXT_BYTES):
            ciphertext = load_ciphertext(self._seal, self._context, bytes(answer[start : start + CIPHERTEXT_BYTES]))
            values += _coefficients(self._decryptor.decrypt(ciphertext))[width - 1 : step * width : width].tolist()
        return centre(torch.tensor(values[:rows]))


def load_ciphertext(seal: Any, within: Any, data: bytes) -> Any:
    """A ciphertext of two polynomials, checked by SEAL.

    Raises:
        MalformedMessage: it is none.
    """
    ciphertext = seal.Ciphertext()
    try:
        ciphertext.load_bytes(within, data)
    except (RuntimeError, ValueError) as error:
        raise MalformedMessage("malformed", "no ciphertext of this scheme") from error
    if ciphertext.size() != 2 or ciphertext.is_ntt_form() or ciphertext.parms_id() != within.first_parms_id():
        raise MalformedMessage("malformed", "no fresh ciphertext of this scheme")
    return ciphertext


class FheMatrix:
    """The server's half for one integer matrix W int8 [rows, columns], without pad columns.

    Args:
        sanitise: mask the other coefficients and add a fresh encryption of zero; off only in tests, which show what follows.
    """

    def __init__(self, codes: Tensor, *, sanitise: bool = True) -> None:
        self._seal, self._context = _seal(), context()
        self._evaluator = self._seal.Evaluator(self._context)
        self._sanitise = sanitise
        self.rows, self.columns = codes.shape
        self._step, self._width = rows_per_polynomial(self.columns), min(self.columns, DEGREE)
        w = codes.numpy().astype(np.int64)
        self._polynomials = [
            [_plaintext(self._seal, self._packed(block[:, start : start + DEGREE])) for start in range(0, self.columns, DEGREE)]
            for block in np.split(w, range(self._step, self.rows, self._step))
        ]

    def _packed(self, block: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """w(X) of some rows and at most N columns; shorter chunks are filled with zeros at the end."""
        padded = np.zeros((len(block), self._width), np.int64)
        padded[:, : block.shape[1]] = block
        return padded[:, ::-1].reshape(-1)

    def _mask(self) -> Any:
        """Uniform coefficients where no answer is."""
        words = (np.frombuffer(secrets.token_bytes(8 * DEGREE), "<u8") % np.uint64(P)).astype(np.int64)  # off from uniform by 2^-33
        words[self._width - 1 : self._step * self._width : self._width] = 0
        return _plaintext(self._seal, words)

    def require_size(self, query: memoryview) -> None:
        """Refuse a query of the wrong size.

        Raises:
            MalformedMessage: it is.
        """
        if query.nbytes != KEY_BYTES + CIPHERTEXT_BYTES * len(self._polynomials[0]):
            raise MalformedMessage("size", f"a query of {query.nbytes} bytes")

    def answer(self, query: memoryview) -> bytes:
        """The encrypted products of one row.

        Raises:
            MalformedMessage: the query is of the wrong size, or no key and ciphertexts.
        """
        self.require_size(query)
        try:
            key = self._context.from_public_str(bytes(query[:KEY_BYTES]))
        except (RuntimeError, ValueError, TypeError) as error:
            raise MalformedMessage("malformed", "no public key of this scheme") from error
        starts = range(KEY_BYTES, query.nbytes, CIPHERTEXT_BYTES)
        x = [load_ciphertext(self._seal, self._context, bytes(query[start : start + CIPHERTEXT_BYTES])) for start in starts]
        try:
            encryptor = self._seal.Encryptor(self._context, key)
            return b"".join(self._product(x, block, encryptor) for block in self._polynomials)
        except (RuntimeError, ValueError) as error:  # a transparent ciphertext, say
            raise MalformedMessage("malformed", "SEAL refuses this query") from error

    def _product(self, x: list[Any], polynomials: list[Any], encryptor: Any) -> bytes:
        products = [self._evaluator.multiply_plain(c, w) for c, w in zip(x, polynomials, strict=True) if not w.is_zero()]
        if self._sanitise or not products:
            products.append(encryptor.encrypt_zero())
        total = self._evaluator.add_many(products) if len(products) > 1 else products[0]
        if self._sanitise:
            total = self._evaluator.add_plain(total, self._mask())
        return bytes(total.to_string())
