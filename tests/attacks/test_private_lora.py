"""Attacks on private LoRA that succeed where a rule of the design is broken, and on the fhe backend, which has two that always succeed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cloven.audit.linear_algebra import solve_left
from cloven.audit.private_lora.ciphertexts import primes, residues, with_residues
from cloven.audit.private_lora.division import weights_of
from cloven.field.gaussian import gaussians
from cloven.field.products import multiply
from cloven.field.residues import subtract
from cloven.field.selection import select_backend
from cloven.masks import lwe
from cloven.masks.lwe import LweMasks
from cloven.masks.lwe_parameters import lwe_parameters
from cloven.masks.public_matrix import a_pub
from cloven.private_lora import prepare
from cloven.private_lora.fhe import DEGREE, KEY_BYTES, FheClient, FheMatrix

seal = pytest.importorskip("seal")
COLUMNS = 64
PARAMETERS = lwe_parameters("lwe")
WIDTH = PARAMETERS.pad_columns + COLUMNS


def codes(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-127, 128, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


# A query's randomness is used once.


def inputs() -> torch.Tensor:
    """Two inputs, residues int32 [2, WIDTH], zero on the pad columns."""
    x = torch.randint(-(2**20), 2**20, (2, COLUMNS), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.pad(x, (PARAMETERS.pad_columns, 0))


def two_queries() -> torch.Tensor:
    masks = LweMasks(torch.zeros(2, PARAMETERS.n, dtype=torch.int32), WIDTH, PARAMETERS, select_backend("cpu"))
    return masks.take(2).mask(inputs())


def difference_of(queries: torch.Tensor) -> torch.Tensor:
    return subtract(queries[:1].contiguous(), queries[1:].contiguous())[0]


def test_the_same_randomness_twice_gives_the_difference_of_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs()
    assert not torch.equal(difference_of(two_queries()), x[0] - x[1])
    monkeypatch.setattr(lwe.os, "urandom", lambda count: bytes(count))
    assert torch.equal(difference_of(two_queries()), x[0] - x[1])


def test_the_same_secret_with_fresh_errors_gives_it_up_to_the_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def same_secret(keys: list[bytes], count: int, sigma: str) -> npt.NDArray[np.int8]:
        samples = gaussians(keys, count, sigma)
        samples[:, : PARAMETERS.n] = samples[0, : PARAMETERS.n]
        return samples

    x = inputs()
    monkeypatch.setattr(lwe, "gaussians", same_secret)
    error = (difference_of(two_queries()) - (x[0] - x[1])).abs().max()
    assert 0 < error < 2**7


# R and E_h are one-time keys of W.


def hint_of(w: torch.Tensor) -> torch.Tensor:
    transposed = a_pub(WIDTH).t().contiguous()
    return prepare.with_pad(w, PARAMETERS, transposed)[1]


def recovered_from(difference: torch.Tensor) -> torch.Tensor:
    a = a_pub(WIDTH)[PARAMETERS.pad_columns :, :COLUMNS].contiguous()
    return solve_left(a, difference[:, :COLUMNS].contiguous())


def test_two_hints_with_the_same_pad_give_the_difference_of_two_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = codes(4, COLUMNS), codes(4, COLUMNS, seed=1)
    wanted = first.long() - second.long()
    assert (recovered_from(subtract(hint_of(first), hint_of(second))) == wanted).double().mean() < 0.01
    counter = iter(range(1000))

    def same_every_time(count: int) -> bytes:
        return (next(counter) % 8).to_bytes(1, "big") * count  # four rows of R, four of E_h, then again

    monkeypatch.setattr(prepare.os, "urandom", same_every_time)
    assert torch.equal(recovered_from(subtract(hint_of(first), hint_of(second))), wanted)


def test_without_its_error_the_hint_is_still_masked_but_not_by_lwe() -> None:
    """What E_h is for: H − R A = W A is exact linear algebra for whoever learns R, and with it is not."""
    w = codes(4, COLUMNS)
    matrix, hint = prepare.with_pad(w, PARAMETERS, a_pub(WIDTH).t().contiguous())
    pad, rows = matrix[:, : PARAMETERS.pad_columns].contiguous(), a_pub(PARAMETERS.pad_columns)
    backend = select_backend("cpu")
    of_pad = multiply(backend, rows.t().contiguous(), backend.place(pad)).t().contiguous()
    assert (recovered_from(subtract(hint, of_pad)) == w.long()).double().mean() < 0.05
    exact = multiply(backend, a_pub(WIDTH).t().contiguous(), backend.place(matrix)).t().contiguous()
    assert torch.equal(recovered_from(subtract(exact, of_pad)), w.long())


def test_the_pad_rows_come_first_so_that_the_client_cannot_choose_them() -> None:
    """With an A whose pad rows are zero, R A vanishes: A is the specification's, never the client's. Here: what would follow."""
    w = codes(4, COLUMNS)
    chosen = a_pub(WIDTH).clone()
    chosen[: PARAMETERS.pad_columns] = 0
    _, hint = prepare.with_pad(w, lwe_parameters("statistical"), _statistical(chosen))
    assert torch.equal(recovered_from(hint), w.long())


def _statistical(chosen: torch.Tensor) -> torch.Tensor:
    pad = lwe_parameters("statistical").pad_columns
    matrix = torch.zeros(pad + COLUMNS, PARAMETERS.n, dtype=torch.int32)
    matrix[pad:] = chosen[PARAMETERS.pad_columns :]
    return matrix.t().contiguous()


# The fhe backend: semi-honest clients only. Both attacks succeed in one query.

LARGE = 2**31  # a chosen error: times a weight it stays below Δ/2 = q/2p


def phase_weights(phase: list[list[int]], rows: int, columns: int) -> torch.Tensor:
    """The weights from a phase Δ·m + LARGE·w + small, given modulo both primes: [rows, columns]."""
    first, second = primes()
    q = first * second
    inverse = pow(first, -1, second)
    found = np.zeros(DEGREE, np.int64)
    for index, (a, b) in enumerate(zip(*phase, strict=True)):
        value = a + first * ((b - a) * inverse % second)
        message = (value * (2**31 - 1) + q // 2) // q
        rest = value - (message * q + (2**31 - 1) // 2) // (2**31 - 1)
        found[index] = round(rest / LARGE)
    return weights_of(found, columns)[:rows]


def test_a_client_with_a_zero_key_gets_the_weights_in_one_query() -> None:
    w = codes(8, 128)
    server = FheMatrix(w)
    honest = FheClient().query(torch.ones(128, dtype=torch.int32))
    key, ciphertext = bytearray(honest[:KEY_BYTES]), honest[KEY_BYTES:]
    key[-2 * 3 * DEGREE * 8 : -3 * DEGREE * 8] = bytes(3 * DEGREE * 8)  # b = −(a s + e) with s = 0, e = 0
    numbers = residues(ciphertext)
    numbers[0] = 0
    numbers[0, :, 0] = LARGE  # with s = 0, c₀ is the phase
    answer = server.answer(memoryview(bytes(key) + with_residues(ciphertext, numbers)))
    phase = residues(answer)[0]
    assert torch.equal(phase_weights([list(map(int, part)) for part in phase], 8, 128), w.long())


def test_a_client_that_chooses_its_noise_gets_the_weights_in_one_query() -> None:
    w = codes(8, 128, seed=3)
    server, client = FheMatrix(w), FheClient()
    generator = seal.KeyGenerator(client._context)
    secret, public = generator.secret_key(), generator.create_public_key()
    encrypted = bytes(seal.Encryptor(client._context, public).encrypt_zero().to_string())
    numbers = residues(encrypted)
    for place, prime in enumerate(primes()):
        numbers[0, place, 0] = (int(numbers[0, place, 0]) + LARGE) % prime
    answer = server.answer(memoryview(bytes(public.to_string()) + with_residues(encrypted, numbers)))
    assert torch.equal(phase_weights(phase_of(answer, bytes(secret.to_string())), 8, 128), w.long())


def phase_of(ciphertext: bytes, secret: bytes) -> list[list[int]]:
    """c₀ + c₁ s modulo both primes."""
    client = FheClient()
    evaluator = seal.Evaluator(client._context)
    loaded = seal.Ciphertext()
    loaded.load_bytes(client._context, ciphertext)
    transformed = bytes(evaluator.transform_to_ntt(loaded).to_string())
    numbers = residues(transformed)
    s = np.frombuffer(secret, "<u8", offset=len(secret) - 3 * DEGREE * 8).reshape(3, DEGREE)  # in NTT form already
    for place, prime in enumerate(primes()):
        pairs = zip(numbers[0, place].tolist(), numbers[1, place].tolist(), s[place].tolist(), strict=True)
        numbers[0, place] = [(a + b * key) % prime for a, b, key in pairs]
    back = seal.Ciphertext()
    back.load_bytes(client._context, with_residues(transformed, numbers, ntt=True))
    result = residues(bytes(evaluator.transform_from_ntt(back).to_string()))[0]
    return [list(map(int, part)) for part in result]
