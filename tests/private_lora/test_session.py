"""The client's session: adapted models against PEFT's, and how a session ends."""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cloven
from cloven.errors import (
    BadBundle,
    BadInput,
    BudgetExhausted,
    ForeignBundle,
    NotAttached,
    PeerRefused,
    RunError,
    SessionClosed,
    TamperedBundle,
    WorkerUnreachable,
)
from cloven.model.cache_argument import cache_of, with_cache
from cloven.private_lora.manifest import fingerprint
from cloven.private_lora.messages import ADAPTER, Query
from cloven.private_lora.names import CLIENT_FILE, hint_name
from cloven.private_lora.query import CheckFailed
from cloven.private_lora.session import client_tensors
from cloven.wire.keys import generate_client, generate_keys, worker_keys
from cloven.wire.schema import Hello, Serve
from tests.helpers import free_port
from tests.lora_bundles import (
    FAMILIES,
    Adapted,
    adapted,
    adapter_server,
    base_model,
    charged,
    client_manifest,
    connect,
    copied,
    ids_of,
    ledger_of,
    lora_bundle,
    merged,
    own_bundle,
    plain,
)
from tests.split_models import logits, relative_error, tiny_folder

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def llama(tmp_path: Path) -> Iterator[Adapted]:
    with adapted(tmp_path) as a:
        yield a


def error(a: Adapted, ids: Tensor | None = None, **more: Any) -> float:
    """Of the logits, against PEFT's merged model."""
    ids = ids_of(2, 9) if ids is None else ids
    return relative_error(logits(a.model, ids, **more).float(), logits(a.merged, ids, **more))


# --- the adapted model is PEFT's


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_as_pefts(family: str, tmp_path: Path) -> None:
    with adapted(tmp_path, family) as a:
        assert error(a) < 1e-3
        assert relative_error(logits(plain(family), ids_of(2, 9)), logits(a.merged, ids_of(2, 9))) > 0.5  # the adapter does something


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_with_the_statistical_hint(family: str, tmp_path: Path) -> None:
    with adapted(tmp_path, family, hint="statistical") as a:
        assert error(a) < 1e-3


def test_the_error_grows_as_bits_fall(tmp_path: Path) -> None:
    errors = []
    for bits in (16, 12, 10, 8):
        with adapted(tmp_path / str(bits), bits=bits) as a:
            errors.append(error(a))
    assert errors == sorted(errors) and errors[1] > 4 * errors[0] and errors[2] > 2 * errors[1] and errors[3] > 2 * errors[2]
    assert errors[3] < 0.5


def test_a_bf16_model(tmp_path: Path) -> None:
    with adapted(tmp_path, dtype=torch.bfloat16) as a:
        assert a.model.dtype == torch.bfloat16
        reference = copy.deepcopy(a.merged).to(torch.bfloat16)
        rounding = relative_error(logits(reference, ids_of(2, 9)).float(), logits(a.merged, ids_of(2, 9)))
        assert error(a) < 2 * rounding + 0.01


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_cached_decoding(family: str, tmp_path: Path) -> None:
    with adapted(tmp_path, family) as a:
        ids = ids_of(1, 14)
        cache = None
        parts: list[Tensor] = []
        with torch.no_grad():
            for part in ids.split([8, 1, 1, 3, 1], 1):
                output = a.model(input_ids=part, **with_cache(cache), use_cache=True)
                cache, parts = cache_of(output), [*parts, output.logits]
        assert relative_error(torch.cat(parts, 1), logits(a.merged, ids)) < 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_batch_padded_on_the_left(family: str, tmp_path: Path) -> None:
    with adapted(tmp_path, family) as a:
        ids, mask = ids_of(2, 9), torch.ones(2, 9, dtype=torch.long)
        ids[0, :4] = mask[0, :4] = 0
        found, expected = (logits(model, ids, attention_mask=mask)[mask.bool()] for model in (a.model, a.merged))
        assert relative_error(found, expected) < 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_generation_as_pefts(family: str, tmp_path: Path) -> None:
    with adapted(tmp_path, family) as a:
        ids = ids_of(2, 6)
        expected = a.merged.generate(ids, max_new_tokens=8, **GREEDY)
        assert torch.equal(a.model.generate(ids, max_new_tokens=8, **GREEDY), expected)
        assert not torch.equal(plain(family).generate(ids, max_new_tokens=8, **GREEDY), expected)


def test_two_threads(llama: Adapted) -> None:
    errors: list[float] = []
    threads = [threading.Thread(target=lambda i=i: errors.append(error(llama, ids_of(1, 4 + i, i)))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(errors) == 3 and max(errors) < 1e-3


# --- what the server sees


def test_one_query_per_group_and_its_rows(llama: Adapted) -> None:
    logits(llama.model, ids_of(2, 5))
    messages = [ADAPTER.unpack(list(frames))[0] for frames in llama.server.received]
    assert isinstance(messages[0], Hello) and isinstance(messages[1], Serve)
    assert [(message.group, message.rows) for message in messages[2:]] == [(group, 10) for group in range(8)]
    statistics = llama.session.statistics()
    assert list(statistics) == [group.name for group in client_manifest(llama.out).groups]
    assert all(record.rows == 10 and record.exchanges == 1 for record in statistics.values())


def test_the_same_tokens_twice_look_different(llama: Adapted) -> None:
    for _ in range(2):
        logits(llama.model, ids_of(1, 3))
    frames = [frames[1] for frames in llama.server.received if len(frames) == 2]
    rows = [frame[i * len(frame) // 3 : (i + 1) * len(frame) // 3] for frame in frames for i in range(3)]
    assert len(set(rows)) == len(rows) == 48


def test_masks_are_made_ahead_and_dropped(tmp_path: Path) -> None:
    out = copied(lora_bundle(), tmp_path / "out")
    with contextlib.ExitStack() as stack:
        a = stack.enter_context(adapted(tmp_path / "a", look_ahead=6))
        waiting = threading.Event()
        for _ in range(500):
            if all(source.ready == 6 for source in a.session.masks):
                break
            waiting.wait(0.02)
        assert all(source.ready == 6 for source in a.session.masks)
        a.session.make_masks(9)
        assert all(source.ready >= 9 for source in a.session.masks) and a.session.mask_seconds_per_row() > 0
        sources = list(a.session.masks)
        a.session.close()
        assert not a.session.masks and all(source.ready == 0 for source in sources)
    assert out.exists()


# --- attaching


def test_attached_later() -> None:
    model = base_model()
    assert cloven.adapt(model, lora_bundle() / "client") is None
    with pytest.raises(NotAttached, match="no adapter server is attached"):
        logits(model, ids_of(1, 2))
    with pytest.raises(BadInput, match="adapted already"):
        cloven.adapt(model, lora_bundle() / "client")


def test_a_copy_of_a_model_can_have_a_session_of_its_own(llama: Adapted) -> None:
    from cloven.model.runtime import RuntimeOptions
    from cloven.private_lora.session import open_session

    clone = copy.deepcopy(llama.model)
    with pytest.raises(NotAttached):
        logits(clone, ids_of(1, 2))
    with open_session(clone, RuntimeOptions(llama.address, look_ahead=0)):
        assert relative_error(logits(clone, ids_of(2, 4)), logits(llama.merged, ids_of(2, 4))) < 1e-3
        assert error(llama) < 1e-3


def test_a_closed_session(llama: Adapted) -> None:
    llama.session.close()
    with pytest.raises(SessionClosed):
        logits(llama.model, ids_of(1, 2))


def test_another_base(tmp_path: Path) -> None:
    """Of the same shapes, with other weights: by hash."""
    other = plain()
    model = copy.deepcopy(other)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ForeignBundle, match="not the weights of the base"):
        cloven.adapt(model, lora_bundle() / "client", base=tmp_path / "base")
    assert not hasattr(model, "cloven_lora")
    with pytest.raises(ForeignBundle):
        cloven.adapt(base_model("qwen2"), lora_bundle() / "client")


def test_a_base_that_is_not_known() -> None:
    with pytest.raises(BadInput, match="the base model is needed"):
        cloven.adapt(copy.deepcopy(plain()), lora_bundle() / "client", base="")


def test_a_model_that_is_another_architecture() -> None:
    """The directory is the right one, the model is not."""
    model = base_model("gpt2")
    with pytest.raises(BadBundle, match="the adapter is for another base"):
        cloven.adapt(model, lora_bundle() / "client", base=tiny_folder("llama"))
    logits(model, ids_of(1, 2))  # and is left as it was


def test_pins(tmp_path: Path) -> None:
    out = lora_bundle() / "client"
    assert cloven.adapt(base_model(), out, pin=fingerprint(out)) is None
    with pytest.raises(ForeignBundle, match="do not use it"):
        cloven.adapt(base_model(), out, pin="0" * 64)
    with pytest.raises(BadInput, match="no fingerprint"):
        cloven.adapt(base_model(), out, pin="0x12")


def test_unknown_options() -> None:
    with pytest.raises(BadInput, match="unknown option among colour"):
        cloven.adapt(base_model(), lora_bundle() / "client", "ipc:///nowhere/s", colour="red")


def test_no_server(socket_folder: Path) -> None:
    model = base_model()
    with pytest.raises(WorkerUnreachable, match="no adapter-server at"):
        cloven.adapt(model, lora_bundle() / "client", f"ipc://{socket_folder}/s", timeout=0.3)


def test_the_server_of_another_bundle(tmp_path: Path, socket_folder: Path) -> None:
    """Of the same adapter, even."""
    one = own_bundle(tmp_path / "one")
    two = own_bundle(tmp_path / "two", ledger=one / "server" / "ledger.sqlite")
    with adapter_server(two / "server", f"ipc://{socket_folder}/s"), pytest.raises(ForeignBundle, match="does not serve that bundle"):
        connect(one, f"ipc://{socket_folder}/s", timeout=5)


def test_a_half_of_another_bundle(tmp_path: Path) -> None:
    """The signed manifest of one with the tensors of another: a hint of another version."""
    one = own_bundle(tmp_path / "one")
    two = own_bundle(tmp_path / "two", ledger=one / "server" / "ledger.sqlite")
    shutil.copyfile(two / "client" / CLIENT_FILE, one / "client" / CLIENT_FILE)
    with pytest.raises(TamperedBundle, match=CLIENT_FILE):
        cloven.adapt(base_model(), one / "client")


def test_an_altered_hint(tmp_path: Path) -> None:
    out = copied(lora_bundle(), tmp_path / "out")
    path = out / "client" / CLIENT_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(TamperedBundle, match=CLIENT_FILE):
        cloven.adapt(base_model(), out / "client")
    path.unlink()
    with pytest.raises(BadBundle, match="cannot be read"):
        cloven.adapt(base_model(), out / "client")


def signed_again(tmp_path: Path, change: Any) -> Path:
    """A bundle with other tensors, rightly hashed and signed by its owner: the owner's mistake, or malice."""
    import json
    from dataclasses import replace

    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from safetensors.torch import save_file

    from cloven.bundle.verification import sha256_file
    from cloven.private_lora.manifest import client_bundle_id
    from tests.lora_bundles import tensors

    folder = copied(lora_bundle(), tmp_path / "out") / "client"
    held = tensors(folder / CLIENT_FILE)
    save_file({name: value for name, value in (held | change(held)).items() if value is not ...}, folder / CLIENT_FILE)
    key: Any = load_pem_private_key((folder.parent / "server" / "signing-key.pem").read_bytes(), None)
    manifest = client_manifest(folder.parent)
    files = {**manifest.files, CLIENT_FILE: sha256_file(folder / CLIENT_FILE)}
    draft = replace(manifest, files={CLIENT_FILE: files[CLIENT_FILE]})
    bundle = client_bundle_id(draft)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["bundle"] = bundle
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    replace(draft, bundle=bundle, files={**files, "config.json": sha256_file(folder / "config.json")}).write(folder, key)
    return folder


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: {hint_name(0): t[hint_name(0)][:-1].contiguous()}, "hint is missing, or of another shape"),
        (lambda t: {hint_name(1): ...}, "hint is missing"),
        (lambda t: {hint_name(0): t[hint_name(0)].long()}, "hint is missing, or of another shape"),
        (lambda t: {hint_name(0): torch.full_like(t[hint_name(0)], 2**30)}, "hint holds values out of range"),
        (lambda t: {"cloven.0.scales": t["cloven.0.scales"] * math.nan}, "scales holds values out of range"),
        (lambda t: {"cloven.0.scales": t["cloven.0.scales"].float()}, "scales is missing, or of another shape"),
        (lambda t: {"cloven.0.1.basis": t["cloven.0.1.basis"] * math.inf}, "basis holds values out of range"),
        (lambda t: {"cloven.0.1.basis": t["cloven.0.1.basis"].t().contiguous()}, "basis is missing, or of another shape"),
    ],
)
def test_signed_tensors_are_checked_all_the_same(change: Any, match: str, tmp_path: Path) -> None:
    folder = signed_again(tmp_path, change)
    model = base_model()
    with pytest.raises(BadBundle, match=match):
        cloven.adapt(model, folder)
    assert not hasattr(model, "cloven_lora")
    assert relative_error(logits(model, ids_of(1, 2)), logits(plain(), ids_of(1, 2))) == 0


def test_the_tensors_of_a_right_bundle_pass() -> None:
    out = lora_bundle()
    assert len(client_tensors(out / "client", client_manifest(out))) > 20


# --- CURVE


def test_two_clients_with_a_share_each(tmp_path: Path) -> None:
    generate_keys(tmp_path / "keys")
    generate_client(tmp_path / "second", tmp_path / "keys")
    generate_keys(tmp_path / "stranger")
    out, address = own_bundle(tmp_path / "out", budget=20, share=12), f"tcp://127.0.0.1:{free_port()}"
    with adapter_server(out / "server", address, keys=worker_keys(tmp_path / "keys")) as server:
        first, one = connect(out, address, keys=tmp_path / "keys")
        second, two = connect(out, address, keys=tmp_path / "second")
        with one, two:
            logits(first, ids_of(1, 12))
            with pytest.raises(BudgetExhausted, match="this client's share"):
                logits(first, ids_of(1, 1))
            assert relative_error(logits(second, ids_of(1, 8)), logits(merged(), ids_of(1, 8))) < 1e-3
            with pytest.raises(BudgetExhausted, match="the budget of answers is used up"):
                logits(second, ids_of(1, 1))
            accounts = {account.client: account.rows for account in ledger_of(server).accounts() if "q_proj" in account.matrix}
            assert sorted(accounts.values()) == [8, 12]
        with pytest.raises(BadInput, match="tcp needs keys"):
            connect(out, address)
        with pytest.raises(PeerRefused):
            connect(out, address, keys=tmp_path / "stranger", timeout=3)


# --- endings


def test_the_budget_ends_in_mid_generation(tmp_path: Path, socket_folder: Path) -> None:
    """A clear error at the client; the server goes on with others; the ledger shows the budget used."""
    address = f"ipc://{socket_folder}/s"
    out, other = own_bundle(tmp_path / "out", budget=10), own_bundle(tmp_path / "other", seed=1)
    server = cloven.private_lora.server.AdapterServer([out / "server", other / "server"], address)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        model, session = connect(out, address)
        with session:
            tokens: list[int] = []
            with pytest.raises(BudgetExhausted, match=r"q_proj.*answered 'budget': the budget of answers is used up"):
                for _ in range(20):
                    ids = torch.cat([ids_of(1, 4), torch.tensor([tokens], dtype=torch.long)], 1) if tokens else ids_of(1, 4)
                    cache_free = model.generate(ids, max_new_tokens=4, **GREEDY)
                    tokens = cache_free[0, 4:].tolist()
            assert len(tokens) == 4  # 4 + 3 rows were answered; 8 more were too many
            assert not session.closed
            accounts = server.adapters[bytes.fromhex(client_manifest(out).bundle)].ledger.accounts()
            assert {account.rows for account in accounts} <= {7, 10}  # reserved, or given back when they were not enough
        model, session = connect(other, address)
        with session:
            assert relative_error(logits(model, ids_of(1, 12)), logits(merged("llama", 1), ids_of(1, 12))) < 1e-3
    finally:
        server.stop()
        thread.join(10)


BAD = {"nan": math.nan, "infinity": math.inf, "a norm that overflows": 3e38}


@pytest.mark.parametrize("name", BAD)
def test_a_failed_check_ends_the_session_and_nothing_is_sent(name: str, llama: Adapted) -> None:
    """One generic error whatever it was; the connection stays open until `close`: nothing is told to the server."""
    before = len(llama.server.received)
    linear: Any = llama.model.model.layers[0].mlp.down_proj
    x = torch.ones(2, 3, 80)
    x[1, 2, 5] = BAD[name]
    if name == "a norm that overflows":
        x = x.double()
        x[1, 2, 5] = 1e200
    with pytest.raises(CheckFailed) as caught:
        linear(x)
    assert str(caught.value) == "a check of the client failed: the session has ended"
    for _ in range(2):
        with pytest.raises(SessionClosed, match="a check of the client failed: the session has ended"):
            logits(llama.model, ids_of(1, 2))
        with pytest.raises(SessionClosed):
            linear(torch.ones(1, 80))
    assert len(llama.server.received) == before
    assert charged(llama.server) == 0
    assert not llama.session.closed  # as far as the server can see
    llama.session.close()
    assert llama.session.closed


def test_in_the_middle_of_a_model(llama: Adapted) -> None:
    with torch.no_grad():
        llama.model.model.layers[1].input_layernorm.weight[3] = math.inf
    with pytest.raises(CheckFailed):
        logits(llama.model, ids_of(1, 3))
    groups = [ADAPTER.unpack(list(frames))[0] for frames in llama.server.received]
    assert [message.group for message in groups if isinstance(message, Query)] == [0, 1, 2, 3]


def test_a_server_that_changes_its_number_of_groups(llama: Adapted) -> None:
    (adapter,) = llama.server.adapters.values()
    adapter.matrices.pop()
    with pytest.raises(BadBundle, match="another number of groups"):
        connect(llama.out, llama.address)


def test_a_server_that_is_gone_and_back(tmp_path: Path, socket_folder: Path) -> None:
    out, address = copied(lora_bundle(), tmp_path / "out"), f"ipc://{socket_folder}/s"
    with adapter_server(out / "server", address):
        model, session = connect(out, address, timeout=5)
        logits(model, ids_of(1, 2))
    with session, adapter_server(out / "server", address) as again:
        assert relative_error(logits(model, ids_of(1, 4)), logits(merged(), ids_of(1, 4))) < 1e-3
        assert charged(again) >= 6


def test_nothing_secret_in_a_repr(llama: Adapted) -> None:
    shown = repr(llama.session) + repr(llama.session.remote) + repr(llama.session.masks) + repr(llama.model.cloven_lora)
    assert "tensor" not in shown
    assert repr(llama.session).startswith("Session(")


# --- what an adapted model does not do silently


def test_a_model_whose_server_was_absent_is_attached_later(tmp_path: Path, socket_folder: Path) -> None:
    """`adapt` without an address, or with one where nobody answers, leaves a model that `attach` connects."""
    out, address = copied(lora_bundle(), tmp_path / "out"), f"ipc://{socket_folder}/s"
    model = base_model()
    with pytest.raises(WorkerUnreachable):
        cloven.adapt(model, out / "client", address, base=tiny_folder("llama"), timeout=0.3)
    with pytest.raises(NotAttached):
        logits(model, ids_of(1, 3))
    with pytest.raises(BadInput, match=r"connect it with cloven\.attach"):
        cloven.adapt(model, out / "client", address, base=tiny_folder("llama"))
    with adapter_server(out / "server", address), cloven.attach(model, address):
        assert relative_error(logits(model, ids_of(1, 3)), logits(merged(), ids_of(1, 3))) < 1e-3


@pytest.mark.parametrize(("name", "text"), [("generation_config.json", "{}"), ("chat_template.jinja", "x"), ("tokenizer.json", "{}")])
def test_files_that_steer_the_model_are_hashed_or_refused(name: str, text: str, tmp_path: Path) -> None:
    out = copied(lora_bundle(), tmp_path / "out")
    (out / "client" / name).write_text(text, encoding="utf-8")
    with pytest.raises(TamperedBundle, match=name):
        cloven.adapt(base_model(), out / "client", base=tiny_folder("llama"))


def test_the_adapter_cannot_fall_off_silently(llama: Adapted) -> None:
    linear = llama.model.get_submodule(llama.session.remote[0].name.split("+")[0])
    kept = linear.forward
    try:
        linear.forward = kept._group._plain[0]
        with pytest.raises(RunError, match="the adapter was not asked"):
            for sibling in kept._group.modules:
                sibling.forward = kept._group._plain[kept._group.modules.index(sibling)]
            logits(llama.model, ids_of(1, 3))
    finally:
        for position, sibling in enumerate(kept._group.modules):
            sibling.forward = type(kept)(kept._group, position)
    assert relative_error(logits(llama.model, ids_of(1, 3)), logits(merged(), ids_of(1, 3))) < 1e-3
