from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

import cloven
from cloven.cluster.adapter_process import AdapterServerProcess
from cloven.errors import RunError
from cloven.private_lora.ledger import Ledger
from cloven.private_lora.manifest import ServerManifest
from cloven.private_lora.prepare import LEDGER_FILE
from tests.cluster.test_worker_process import gone
from tests.lora_bundles import connect, copied, ids_of, lora_bundle, merged
from tests.split_models import logits, relative_error


def test_it_serves_and_leaves_nothing_behind(tmp_path: Path) -> None:
    out = copied(lora_bundle(), tmp_path / "out")
    with cloven.AdapterServerProcess(out / "server") as server:
        folder = Path(server.address.removeprefix("ipc://")).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and server.pid != os.getpid()
        model, session = connect(out, server.address)
        with session:
            assert relative_error(logits(model, ids_of(1, 5)), logits(merged(), ids_of(1, 5))) < 1e-3
        server.require_running()
        assert server.log() == ""
    assert server.process.returncode == 0 and gone(server.pid) and not folder.exists()
    server.stop()  # twice is harmless
    ledger = Ledger(out / "server" / LEDGER_FILE, ServerManifest.read(out / "server").adapter)
    # what it reserved is given back: the five rows of each of fourteen matrices stay
    assert [account.rows for account in ledger.accounts()] == [5] * 14
    ledger.close()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    out = copied(lora_bundle(), tmp_path / "out")
    (out / "server" / LEDGER_FILE).unlink()
    server = AdapterServerProcess(out / "server")
    with pytest.raises(RunError, match=r"adapter-server process ended with exit code 1: cloven: .*the ledger is missing"), server:
        pass
    assert gone(server.pid)
