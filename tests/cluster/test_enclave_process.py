from __future__ import annotations

import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch

import cloven
from cloven.cluster.enclave_process import EnclaveProcess
from cloven.errors import ClovenError, RunError
from cloven.model.cache_argument import cache_of, with_cache
from tests.cluster.test_worker_process import gone
from tests.kv_bundles import MODES, deviation, ids_of, kv_bundle, load
from tests.split_models import logits, tiny


@pytest.mark.parametrize("mode", [MODES[0], pytest.param(MODES[1], marks=pytest.mark.long)])
def test_it_serves_and_leaves_nothing_behind(mode: str) -> None:
    out = kv_bundle("llama", mode)
    with EnclaveProcess(out / "trusted") as enclave:
        folder = Path(enclave.address.removeprefix("ipc://")).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and enclave.pid != os.getpid()
        model = load(out)
        with cloven.attach(model, enclave.address, timeout=10):
            assert deviation(logits(model, ids_of(1, 5)), logits(tiny("llama"), ids_of(1, 5))) < 1e-4
        enclave.require_running()
        assert enclave.log() == ""
    assert enclave.process.returncode == 0 and gone(enclave.pid) and not folder.exists()
    enclave.stop()  # twice is harmless


def test_an_enclave_that_cannot_start_says_why(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(kv_bundle("llama", "permute"), out)
    with (out / "trusted" / "keys.safetensors").open("ab") as file:
        file.write(b"x")
    enclave = EnclaveProcess(out / "trusted")
    with pytest.raises(RunError, match=r"enclave process ended with exit code 3: cloven: .*keys\.safetensors"), enclave:
        pass
    assert gone(enclave.pid)


@pytest.mark.long
def test_an_enclave_that_dies_ends_the_session_with_a_clear_error(socket_folder: Path) -> None:
    """And another one at the same address serves the next."""
    out, address = kv_bundle("llama", "session"), f"ipc://{socket_folder}/e"
    model, ids = load(out), ids_of(1, 4)
    with EnclaveProcess(out / "trusted", address, "--threads", "2") as first:
        with cloven.attach(model, address, timeout=1), torch.no_grad():
            cache = cache_of(model(input_ids=ids, use_cache=True))
            first.kill()
            with pytest.raises(ClovenError):
                model(input_ids=ids[:, :1], **with_cache(cache))
        assert first.process.returncode == -signal.SIGKILL
        with EnclaveProcess(out / "trusted", address) as second, cloven.attach(model, address, timeout=10):
            assert deviation(logits(model, ids), logits(tiny("llama"), ids)) < 1e-4
            assert second.pid != first.pid
