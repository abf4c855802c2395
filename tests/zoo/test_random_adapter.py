from __future__ import annotations

import stat
from contextlib import closing
from pathlib import Path

import pytest
import torch

from cloven.errors import BadInput
from cloven.field.products import multiply
from cloven.field.residues import subtract
from cloven.field.selection import select_backend
from cloven.masks.public_matrix import a_pub
from cloven.private_lora.layer import deltas
from cloven.private_lora.ledger import Ledger
from cloven.private_lora.manifest import ServerManifest
from cloven.private_lora.server import server_matrices
from cloven.zoo.random_adapter import ADAPTER_SHAPES, RANK, write_random_adapter
from tests.lora_bundles import adapter_server


def test_the_servers_half_can_be_served(tmp_path: Path, socket_folder: Path) -> None:
    adapter = write_random_adapter(tmp_path, "demo", 77)
    manifest = ServerManifest.read(tmp_path / "server")
    assert bytes.fromhex(manifest.bundle) == adapter.bundle and manifest.bits == adapter.config.bits == 16
    stored = server_matrices(tmp_path / "server", manifest)
    assert len(stored) == 5 and all(torch.equal(a, b) for a, b in zip(stored, adapter.matrices, strict=True))
    with closing(Ledger(manifest.ledger_path(tmp_path / "server"), manifest.adapter)) as ledger:
        assert ledger.budget() == (77, 77) and ledger.accounts() == []
    assert stat.S_IMODE((tmp_path / "server" / "adapter.safetensors").stat().st_mode) == 0o600
    with adapter_server(tmp_path / "server", f"ipc://{socket_folder}/s") as server:
        assert list(server.adapters) == [adapter.bundle]


def test_hints_and_bounds_are_those_of_a_prepared_one(tmp_path: Path) -> None:
    adapter = write_random_adapter(tmp_path, "llama-2-7b", 10, 1)
    backend = select_backend("cpu")
    (group,), (matrix,), (hint,) = adapter.groups, adapter.matrices, adapter.hints
    assert group.rows == 2 * 2 * RANK == len(matrix) and group.columns == 4096 and matrix.shape[1] == 1280 + 4096
    errors = subtract(hint, multiply(backend, a_pub(1280 + 4096).t().contiguous(), backend.place(matrix)).t().contiguous())
    assert 0 < int(errors.abs().max()) < 128  # E_h, σ = 16
    assert 0.95 * group.l2 < float(matrix[:, 1280:].double().norm(dim=1).max()) <= group.l2


def test_the_parts_make_up_random_products(tmp_path: Path) -> None:
    adapter = write_random_adapter(tmp_path, "demo", 10, 2)
    x = torch.randn(3, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = [deltas(x @ adapter.matrices[i][:, 1280:].double().t(), adapter.scales[i], adapter.bases[i]) for i in range(2)]
    for q, v in results:
        assert q.shape == (3, 256) and v.shape == (3, 128)
        assert all(0.1 < float(part.std()) < 10 for part in (q, v))  # 0.01 · √8 · √256 = 0.45
        assert int(torch.linalg.matrix_rank(q)) == 3
    assert not torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("shape", ADAPTER_SHAPES)
def test_one_layer_of_every_shape(shape: str, tmp_path: Path) -> None:
    _, columns, outputs = ADAPTER_SHAPES[shape]
    adapter = write_random_adapter(tmp_path, shape, 10, 1)
    (group,) = adapter.groups
    assert group.columns == columns and [module.outputs for module in group.modules] == list(outputs.values())
    assert [tuple(basis.shape) for basis in adapter.bases[0]] == [(width, RANK) for width in outputs.values()]


def test_two_are_two_bundles_of_two_adapters(tmp_path: Path) -> None:
    bundles = {write_random_adapter(tmp_path / name, "demo", 10, 1).bundle for name in "ab"}
    assert len(bundles) == 2
    assert len({ServerManifest.read(tmp_path / name / "server").adapter for name in "ab"}) == 2


def test_unknown_shapes(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="choose one of chatglm2-6b, llama-2-7b, demo"):
        write_random_adapter(tmp_path / "new", "gpt-5", 10)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("layers", [0, 6])
def test_layers_that_the_shape_does_not_have(layers: int, tmp_path: Path) -> None:
    """0 does not stand for all, and none are made up."""
    with pytest.raises(BadInput, match="demo has 5"):
        write_random_adapter(tmp_path / "new", "demo", 10, layers)
