"""The key of a split: written first, for nobody else's eyes, good for one split of one model."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cloven
from cloven.errors import BadInput, ClovenError
from cloven.field.prg import SecretStream
from cloven.slip.config import SlipConfig
from cloven.slip.prepare import prepare_slip
from cloven.slip.split_key import SplitKey, read_split_key
from tests.preparations import again, edit_weights, fine_tune, hashes, key_of, own_folder, record, reference
from tests.split_models import tiny, tiny_folder

VECTOR = ["982ab1e4d95a4033", "c14a22fce6de4a9b"]
PARAMETERS = {"rank": None, "precision": "int8"}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    key = SplitKey.fresh(PARAMETERS).bound_to("abc")
    key.write(tmp_path / "split.key")
    assert read_split_key(tmp_path / "split.key") == key
    assert list(tmp_path.iterdir()) == [tmp_path / "split.key"]


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_nobody_else_may_read_it_from_the_first_byte_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int) -> None:
    seen = []

    def dump(value: Any, file: Any) -> None:
        seen.append(stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        file.write(json.dumps(value))

    monkeypatch.setattr("cloven.slip.split_key.json.dump", dump)
    before = os.umask(umask)
    try:
        SplitKey.fresh(PARAMETERS).write(tmp_path / "split.key")
    finally:
        os.umask(before)
    assert seen == [0o600 & ~umask] and stat.S_IMODE((tmp_path / "split.key").stat().st_mode) & 0o077 == 0


def test_what_an_interruption_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "split.key.partial").write_text("hal")
    (tmp_path / "split.key.partial").chmod(0o666)
    SplitKey.fresh(PARAMETERS).write(tmp_path / "split.key")
    assert list(tmp_path.iterdir()) == [tmp_path / "split.key"]
    assert stat.S_IMODE((tmp_path / "split.key").stat().st_mode) == 0o600


def test_it_does_not_write_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("dear")
    (tmp_path / "split.key.partial").symlink_to(tmp_path / "victim")
    SplitKey.fresh(PARAMETERS).write(tmp_path / "split.key")
    assert (tmp_path / "victim").read_text() == "dear"


def test_repr_shows_nothing() -> None:
    key = SplitKey.fresh(PARAMETERS)
    for shown in (repr(key), str(key), f"{key}", repr([key]), repr(key.stream(0))):
        assert key.key not in shown and key.key[:8] not in shown and "secret" in shown


def test_keys_are_fresh() -> None:
    assert len({SplitKey.fresh(PARAMETERS).key for _ in range(50)}) == 50


def test_streams_are_hkdf_of_key_and_group() -> None:
    key = SplitKey("ab" * 32, PARAMETERS)
    words = [key.stream(group).words(4).tolist() for group in (0, 1, 10, 0)]
    assert words[0] == words[3] == SecretStream(bytes.fromhex("ab" * 32), "slip/group/0").words(4).tolist()
    assert len({tuple(four) for four in words}) == 3
    # A test vector: a change of the derivation would make another bundle from an old key.
    assert [f"{word:016x}" for word in words[0][:2]] == VECTOR
    assert SplitKey("ab" * 31 + "ac", PARAMETERS).stream(0).words(4).tolist() != words[0]


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"rank": 3, "precision": "int8"}, "rank None"),
        ({"rank": None, "precision": "int8x2"}, "precision 'int8'"),
        ({"rank": None}, "precision 'int8'"),
        ({**PARAMETERS, "new": 1}, "new None"),
        ({"rank": 3, "precision": "x"}, "precision 'int8', rank None"),
    ],
)
def test_other_parameters_are_refused(parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=rf"belongs to a split with {said}: two different splits"):
        SplitKey.fresh(PARAMETERS).used_for(parameters)


def test_the_same_parameters_and_model() -> None:
    key = SplitKey.fresh(PARAMETERS)
    assert key.used_for(dict(reversed(PARAMETERS.items()))) is key
    assert key.bound_to("a").bound_to("a").model == "a"
    with pytest.raises(BadInput, match="another model"):
        key.bound_to("a").bound_to("b")


VALID = {"format": "cloven-split-key", "version": 2, "key": "0" * 64, "parameters": {}, "model": ""}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"}, {"version": 1}, {"version": "2"}, {"key": "0" * 63}, {"key": "0" * 66}, {"key": "G" * 64}, {"key": "A" * 64},
        {"key": 0}, {"key": None}, {"parameters": []}, {"parameters": None}, {"model": None}, {"more": 1},
    ],
)  # fmt: skip
def test_a_malformed_file(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "split.key"
    path.write_text(json.dumps(VALID))
    assert read_split_key(path).key == "0" * 64
    path.write_text(json.dumps(VALID | change))
    with pytest.raises(BadInput, match="not a key file of this version"):
        read_split_key(path)


@pytest.mark.parametrize("name", VALID)
def test_a_missing_field(tmp_path: Path, name: str) -> None:
    (tmp_path / "split.key").write_text(json.dumps({field: value for field, value in VALID.items() if field != name}))
    with pytest.raises(BadInput, match="not a key file"):
        read_split_key(tmp_path / "split.key")


@given(content=st.one_of(st.binary(max_size=200), st.sampled_from([b"[" * 60_000, b" " * 70_000, b"null", b"3", b'"x"', b"[]"])))
def test_anything_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "split.key").write_bytes(content)
    with pytest.raises(ClovenError, match="key file") as caught:
        read_split_key(tmp_path / "split.key")
    assert isinstance(caught.value, BadInput)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"an earlier bundle has it in OUT/trusted/split\.key"):
        read_split_key(tmp_path / "split.key")
    with pytest.raises(BadInput, match="not readable"):
        read_split_key(tmp_path)


# --- in a preparation


def test_it_is_there_before_anything_else_is_written(tmp_path: Path) -> None:
    """Whatever depends on a key that was lost could not be made again."""
    seen: list[list[str]] = []

    def progress(stage: str, done: int, total: int) -> None:
        del stage, total
        if done == 0 and not seen:
            partial = tmp_path / ".out.partial"
            seen.append(sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file()))
            assert stat.S_IMODE((partial / "trusted" / "split.key").stat().st_mode) == 0o600
            assert stat.S_IMODE((partial / "trusted").stat().st_mode) == 0o700
            assert read_split_key(partial / "trusted" / "split.key").model == ""

    bundle = prepare_slip(tiny_folder("llama"), tmp_path / "out", progress=progress)
    assert seen == [[".cloven-partial", ".work/plan.json", "trusted/split.key"]]
    assert stat.S_IMODE(key_of(bundle).stat().st_mode) == 0o600 and read_split_key(key_of(bundle)).model != ""
    assert "trusted/split.key" not in str(list(bundle.exposed.rglob("*"))) and "split.key" in bundle.manifest.files


def test_the_key_itself_is_in_no_other_file(tmp_path: Path) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        del done, total
        if stage == "write":
            look(tmp_path / ".out.partial")

    def look(folder: Path) -> None:
        (place,) = folder.rglob("split.key")
        key = read_split_key(place).key
        for path in folder.rglob("*"):
            if path.is_file() and path != place:
                content = path.read_bytes()
                assert key.encode() not in content and bytes.fromhex(key) not in content, path

    look(prepare_slip(tiny_folder("llama"), tmp_path / "out", progress=progress).path)


def test_the_same_key_the_same_bundle(tmp_path: Path) -> None:
    bundle = again(tmp_path / "out")
    assert bundle.id == reference().id and hashes(bundle.path) == hashes(reference().path)


def test_a_lost_exposed_half_is_made_again(tmp_path: Path) -> None:
    """The trusted half of the old bundle works with the exposed half of the new one."""
    new = again(tmp_path / "out")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "trusted").symlink_to(reference().trusted)
    (tmp_path / "mixed" / "exposed").symlink_to(new.exposed)
    cloven.open_bundle(tmp_path / "mixed").verify()


def test_a_directory_and_the_model_in_memory_are_the_same_model(tmp_path: Path) -> None:
    bundle = again(tmp_path / "out", model=tiny("llama"))
    assert bundle.id == reference().id


@pytest.mark.parametrize(
    "settings",
    [{"precision": "int8"}, {"rank": 3}, {"secret_fraction": 0.05}, {"scramble": "none"}],
    ids=lambda settings: next(iter(settings)),
)
def test_other_parameters_under_one_key(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = SlipConfig(**{"precision": "int8x2", **settings})
    with pytest.raises(BadInput, match="two different splits under one key give the secret part away"):
        prepare_slip(tiny_folder("llama"), tmp_path / "out", config, key=key_of(reference()))
    assert list(tmp_path.iterdir()) == []


def test_another_device_is_another_split(tmp_path: Path) -> None:
    """Its singular vectors may have other signs, so that the same O makes another decoy."""
    content = record(key_of(reference()))
    assert content["parameters"]["device"] == "cpu"
    (tmp_path / "key").write_text(json.dumps(content | {"parameters": content["parameters"] | {"device": "cuda"}}))
    with pytest.raises(BadInput, match="belongs to a split with device 'cuda'"):
        again(tmp_path / "out", key=tmp_path / "key")


def test_another_model_under_one_key(tmp_path: Path) -> None:
    """One weight differs, by one bit."""
    folder = own_folder(tmp_path / "model")
    edit_weights(folder, lambda held: held["lm_head.weight"].view(torch.int32)[5, 5].bitwise_xor_(1))
    with pytest.raises(BadInput, match="another model, or of another version of its weights"):
        again(tmp_path / "out", model=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]  # and no group was split


def test_another_public_base_under_one_key(tmp_path: Path) -> None:
    tuned, other = fine_tune(tmp_path / "tuned"), fine_tune(tmp_path / "other", seed=8)
    config = SlipConfig(origin="public-base", scramble="none")
    first = prepare_slip(tuned, tmp_path / "first", config, public_base=tiny_folder("llama"))
    same = prepare_slip(tuned, tmp_path / "same", config, public_base=tiny_folder("llama"), key=key_of(first))
    assert hashes(first.path) == hashes(same.path)
    with pytest.raises(BadInput, match="another model"):
        prepare_slip(tuned, tmp_path / "out", config, public_base=other, key=key_of(first))


def test_what_is_not_linear_may_differ(tmp_path: Path) -> None:
    """The key says nothing about embeddings and norms: they are not split."""
    folder = own_folder(tmp_path / "model")
    edit_weights(folder, lambda held: held["model.norm.weight"].add_(1))
    assert again(tmp_path / "out", model=folder).id == reference().id


def test_no_such_key(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such key file"):
        again(tmp_path / "out", key=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
