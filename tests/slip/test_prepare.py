from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel, T5Config

import cloven
from cloven.bundle import shards
from cloven.errors import BadInput, ClovenError, RunError, UnsupportedModel
from cloven.slip.config import SlipConfig
from cloven.slip.prepare import prepare_slip
from cloven.zoo.tiny import tiny_config, tiny_model
from tests.split_models import copied, demo_bundle, tiny, tiny_bundle, tiny_folder


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            found.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118 (no mapping)
    return found


def test_what_is_written() -> None:
    bundle = tiny_bundle("llama")
    assert listing(bundle.path) == [
        "exposed",
        "exposed/README.md",
        *(f"exposed/exposed-{number:05d}.safetensors" for number in range(1, 10)),  # one per group: 4 a layer, and the head
        "exposed/manifest.json",
        "trusted",
        "trusted/README.md",
        "trusted/config.json",
        "trusted/generation_config.json",
        "trusted/manifest.json",
        *(f"trusted/model-{number:05d}.safetensors" for number in range(1, 10)),
        "trusted/model.safetensors.index.json",
        "trusted/other-00001.safetensors",  # what is not linear: embeddings, norms
        "trusted/split.key",
    ]
    bundle.verify()
    listed = set(bundle.manifest.files) | {"manifest.json"}
    assert listed == {path.name for path in bundle.trusted.iterdir()}  # every trusted file has its hash


def test_modes() -> None:
    bundle = tiny_bundle("llama")
    assert stat.S_IMODE(bundle.trusted.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in bundle.trusted.iterdir()} == {0o600}
    assert stat.S_IMODE(bundle.exposed.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in bundle.exposed.iterdir()} == {0o644}


def test_modes_while_it_is_written(tmp_path: Path) -> None:
    """An interruption between two files must not leave a secret readable either: nobody else gets past the partial folder."""
    seen = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "write":
            partial = tmp_path / ".out.partial"
            seen.append(stat.S_IMODE(partial.stat().st_mode))
            seen.extend(stat.S_IMODE(folder.stat().st_mode) for folder in (partial / ".work", partial / "trusted"))
            secret = [path for name in (".work", "trusted") for path in (partial / name).rglob("*") if path.is_file()]
            assert {"plan.json", "ranks.json", "split.key", "model-00001.safetensors"} <= {path.name for path in secret}
            public = {"config.json", "model.safetensors.index.json"}
            seen.extend(stat.S_IMODE(path.stat().st_mode) for path in secret if path.name not in public)

    before = os.umask(0)
    try:
        prepare_slip(tiny("llama"), tmp_path / "out", progress=progress)
    finally:
        os.umask(before)
    assert seen[:3] == [0o700] * 3 and set(seen[3:]) == {0o600}


def test_the_exposed_half_holds_codes_and_nothing_else() -> None:
    bundle = tiny_bundle("llama", "int8x2")
    held = tensors(bundle.exposed)
    assert sorted(held) == [f"group-{i:05d}" for i in range(len(held))]
    assert all(tensor.dtype == torch.int8 for tensor in held.values())
    for path in bundle.exposed.iterdir():
        content = path.read_bytes()
        for word in (b"proj", b"lm_head", b"layers", b"scale", b"gather", b"secret_a", b"embed", b"llama"):
            if path.name != "README.md":  # which names the base model
                assert word not in content, (path.name, word)


def test_the_two_halves_hold_the_model_and_no_more() -> None:
    """Exposed + B A = W up to the quantisation, for every linear; embeddings and norms are there; W itself is nowhere."""
    from cloven.audit.exposed_only import exposed_model

    bundle, model = tiny_bundle("llama", "int8x2"), tiny("llama")
    held = tensors(bundle.trusted)
    unscrambled = exposed_model(bundle, knows_scramble=True)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            exposed = unscrambled.get_submodule(name)(torch.eye(module.in_features)).t()
            rebuilt = exposed + held[f"{name}.secret_b"] @ held[f"{name}.secret_a"]
            weight = module.weight.detach()
            assert torch.allclose(rebuilt, weight, atol=2e-4 * float(weight.abs().max())), name
            assert held[f"{name}.weight"].numel() == 0
    rest = {name for name in model.state_dict() if "norm" in name or "embed" in name}
    assert rest <= set(held)
    assert all(torch.equal(held[name], model.state_dict()[name]) for name in rest)


def test_the_source_is_not_changed() -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    tiny_bundle("llama")  # of a model with the same seed
    prepare_slip(model, tiny_bundle("llama").path.parent / "unchanged")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config


def test_from_a_directory_and_from_memory_alike(tmp_path: Path) -> None:
    bundle = prepare_slip(tiny_folder("llama"), tmp_path / "out", SlipConfig(secret_fraction=0, scramble="none"))
    other = prepare_slip(tiny("llama"), tmp_path / "other", SlipConfig(secret_fraction=0, scramble="none"))
    assert bundle.id == other.id  # without secrets there is nothing random: the same codes


def test_two_splits_of_one_model_share_nothing(tmp_path: Path) -> None:
    first, second = tiny_bundle("llama"), prepare_slip(tiny("llama"), tmp_path / "out")
    assert first.id != second.id
    one, two = tensors(first.exposed), tensors(second.exposed)
    # Agreement at chance level: codes are small integers.
    assert all(float((one[name] == two[name]).double().mean()) < 0.05 for name in one)


@pytest.mark.parametrize(
    ("settings", "scramble"), [({"scramble": "none"}, "none"), ({"scramble": "permutation"}, "permutation"), ({}, "mixing")]
)
def test_the_scramble_can_be_chosen(tmp_path: Path, settings: dict[str, Any], scramble: str) -> None:
    bundle = prepare_slip(tiny("llama"), tmp_path / "out", SlipConfig(**settings))
    gather = tensors(bundle.trusted)["model.layers.0.mlp.down_proj.column_gather"]
    assert torch.equal(gather[0], torch.arange(gather.shape[1], dtype=torch.int32)) is (scramble == "none")
    assert len(gather) == (4 if scramble == "mixing" else 1) and bundle.manifest.parameters["scramble"] == scramble


def test_a_fixed_rank_is_capped_at_half(tmp_path: Path) -> None:
    bundle = prepare_slip(tiny("llama"), tmp_path / "out", SlipConfig(rank=13))
    held = tensors(bundle.trusted)
    assert held["model.layers.0.self_attn.q_proj.secret_a"].shape == (13, 48)
    assert held["model.layers.0.self_attn.k_proj.secret_a"].shape == (12, 48)  # min(24, 48) / 2
    bundle.verify()


def test_no_secret_part(tmp_path: Path) -> None:
    bundle = prepare_slip(tiny("llama"), tmp_path / "out", SlipConfig(secret_fraction=0))
    assert bundle.manifest.summary["secret_fraction"] == 0


def test_tied_embeddings_stay_trusted_and_are_untied() -> None:
    bundle = tiny_bundle("llama-tied")
    held = tensors(bundle.trusted)
    assert torch.equal(held["model.embed_tokens.weight"], tiny("llama-tied").get_input_embeddings().weight)
    assert held["lm_head.weight"].numel() == 0 and held["lm_head.secret_b"].shape[0] == 97
    assert json.loads((bundle.trusted / "config.json").read_text())["tie_word_embeddings"] is False


def test_biases_stay_trusted() -> None:
    held = tensors(tiny_bundle("gpt2").trusted)
    assert torch.equal(held["transformer.h.0.attn.c_attn.bias"], tiny("gpt2").state_dict()["transformer.h.0.attn.c_attn.bias"])


def test_no_remote_code_and_no_path_in_the_configuration() -> None:
    bundle = demo_bundle()
    record = json.loads((bundle.trusted / "config.json").read_text())
    assert "auto_map" not in record and "_name_or_path" not in record
    assert record["dtype"] == "bfloat16" and record["architectures"] == ["LlamaForCausalLM"]
    assert set(record["quantization_config"]) == {"quant_method", "scheme", "version", "bundle", "model"}


def test_the_tokenizer_comes_along() -> None:
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {p.name for p in demo_bundle().trusted.iterdir()}
    assert not list(demo_bundle().exposed.glob("tokenizer*"))


# --- licences


def source_with(tmp_path: Path, readme: str | None, name: str = "my-model") -> Path:
    folder = tmp_path / name
    tiny("llama").save_pretrained(folder)
    if readme is not None:
        (folder / "README.md").write_text(readme)
    return folder


def test_licence_and_readmes(tmp_path: Path) -> None:
    folder = source_with(tmp_path, "---\ntags: [a]\nlicense: cc-by-nc-4.0\n---\n# my model\n")
    (folder / "LICENSE").write_text("the terms")
    (folder / "NOTICE.txt").write_text("who made it")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "tokenizer.py").write_text("raise SystemExit")
    bundle = prepare_slip(folder, tmp_path / "out")
    for half in (bundle.trusted, bundle.exposed):
        text = (half / "README.md").read_text()
        assert text.startswith("---\nlicense: cc-by-nc-4.0\n") and "base_model: my-model" in text
        assert "Licence of the base model" in text and str(tmp_path) not in text
        assert (half / "LICENSE").read_text() == "the terms" and (half / "NOTICE.txt").read_text() == "who made it"
        assert not list(half.glob("*.py"))
    assert "secret" in (bundle.trusted / "README.md").read_text().lower()
    bundle.verify()


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        (None, "not stated"),
        ("# no front matter", "not stated"),
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicence: mit\n---\n", "mit"),
        ('---\nlicense: "mit"\n---\n', "mit"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "other"),
    ],
)
def test_the_licence_that_is_stated(tmp_path: Path, readme: str | None, licence: str) -> None:
    bundle = prepare_slip(source_with(tmp_path, readme), tmp_path / "out", SlipConfig(rank=0))
    assert f"\nlicense: {licence}\n" in (bundle.exposed / "README.md").read_text()


def test_the_name_of_a_model_given_as_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source_with(tmp_path, None))
    bundle = prepare_slip(".", tmp_path / "out", SlipConfig(rank=0))
    assert (bundle.trusted / "README.md").read_text().splitlines()[5] == "# my-model: the trusted half of a SLIP split"


# --- bad input: an error that says what is wrong, before anything is written


def refused(tmp_path: Path, model: Any, kind: type[ClovenError] = BadInput, match: str = "", **settings: Any) -> None:
    before = listing(tmp_path)
    with pytest.raises(kind, match=match) as caught:
        prepare_slip(model, tmp_path / "folder" / "out", SlipConfig(**settings) if settings else None)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert [name for name in listing(tmp_path) if name not in (*before, "folder")] == []


def test_no_such_directory(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "nowhere", match="no such model directory")
    refused(tmp_path, "./nowhere", match="no such model directory")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    refused(tmp_path, tmp_path / "file", match="no such model directory")


def test_a_directory_without_configuration(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path, tmp_path / "empty", match=r"no config\.json")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "no-such-type"}'])
def test_a_broken_configuration(tmp_path: Path, content: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(content)
    refused(tmp_path, tmp_path / "model", match=r"config\.json cannot be used")


def test_no_weights(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path / "model")
    refused(tmp_path, tmp_path / "model", match="the weights cannot be loaded")


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path / "model")
    torch.save(tiny("llama").state_dict(), tmp_path / "model" / "pytorch_model.bin")
    refused(tmp_path, tmp_path / "model", match="the weights cannot be loaded")


def test_broken_weights(tmp_path: Path) -> None:
    folder = source_with(tmp_path, None)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(tmp_path, folder, match="the weights cannot be loaded")


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    """transformers fills what a checkpoint lacks with random numbers, and warns; a split of random numbers is worse than no split."""
    from safetensors.torch import load_file, save_file

    folder = source_with(tmp_path, None)
    held = load_file(folder / "model.safetensors")
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, folder, match="up_proj")


@pytest.mark.parametrize("config", [T5Config(d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=32, vocab_size=64)])
def test_an_encoder_and_decoder(tmp_path: Path, config: Any) -> None:
    config.save_pretrained(tmp_path / "model")
    refused(tmp_path, tmp_path / "model", UnsupportedModel, "t5: is not a causal language model")


def test_an_encoder(tmp_path: Path) -> None:
    """transformers would run BERT as a language model that sees the future."""
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64)
    BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    refused(tmp_path, tmp_path / "model", UnsupportedModel, "not a causal language model")


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    tiny_config("mixtral").save_pretrained(tmp_path / "model")
    refused(tmp_path, tmp_path / "model", UnsupportedModel, "mixtral: .*mixture-of-experts models are not supported")


def test_a_split_of_a_split(tmp_path: Path) -> None:
    refused(tmp_path, tiny_bundle("llama").trusted, UnsupportedModel, "already quantised or split")
    refused(tmp_path, tiny_bundle("llama").exposed, BadInput, r"no config\.json")
    refused(tmp_path, tiny_bundle("llama").path, BadInput, r"no config\.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    refused(tmp_path, model, BadInput, r"model\.layers\.1\.mlp\.up_proj: the weight holds NaN or infinity")


def test_secret_fraction_out_of_range(tmp_path: Path) -> None:
    refused(tmp_path, tiny("llama"), match="secret fraction", secret_fraction=0.6)


def test_out_exists(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(BadInput, match="exists already; choose another OUT"):
        prepare_slip(tiny("llama"), out)
    assert listing(tmp_path) == ["out", "out/precious"]
    with pytest.raises(BadInput, match="exists already"):
        prepare_slip(tiny("llama"), out / "precious")


def test_out_is_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare_slip(tiny("llama"), tmp_path / "out").verify()


def test_out_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        prepare_slip(tiny("llama"), tmp_path / "file" / "out")


# --- interruption: nothing that loads is left, and a second run succeeds


class Interruption(BaseException):
    """As KeyboardInterrupt: no Exception."""


@pytest.mark.parametrize("kind", [Interruption, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["spectra", "split", "write"])
def test_an_error_in_the_middle_leaves_nothing_of_a_model_in_memory(tmp_path: Path, stage: str, kind: type[BaseException]) -> None:
    def progress(now: str, done: int, total: int) -> None:
        if now == stage and done >= total // 2:
            raise kind("stop")

    with pytest.raises(kind, match="stop"):
        prepare_slip(tiny("llama"), tmp_path / "out", progress=progress)
    assert listing(tmp_path) == []
    prepare_slip(tiny("llama"), tmp_path / "out").verify()


KILLED = """
import sys, time, cloven
from cloven.zoo.tiny import tiny_model
def progress(stage, done, total):
    if stage == sys.argv[2]:
        print("there", flush=True)
        time.sleep(60)
cloven.prepare_slip(tiny_model("llama"), sys.argv[1], progress=progress)
"""


def start_and_stop_at(stage: str, out: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out), stage], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    return process


def end(process: subprocess.Popen[str], number: int) -> int:
    process.send_signal(number)
    code = process.wait(20)
    assert process.stdout is not None
    process.stdout.close()
    return code


def test_two_at_once_and_then_sigkill(tmp_path: Path) -> None:
    """A second run waits for nobody and touches nothing; when the first one is killed, what it left behind is in nobody's way."""
    out = tmp_path / "out"
    process = start_and_stop_at("write", out)
    try:
        before = listing(tmp_path)
        with pytest.raises(BadInput, match="another `cloven prepare` is writing there"):
            prepare_slip(tiny("llama"), out)
        assert listing(tmp_path) == before
    finally:
        code = end(process, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not out.exists() and (tmp_path / ".out.partial" / "trusted").is_dir()  # nothing could clean up
    assert stat.S_IMODE((tmp_path / ".out.partial").stat().st_mode) == 0o700
    with pytest.raises(BadInput):
        cloven.open_bundle(tmp_path / ".out.partial")
    prepare_slip(tiny("llama"), out).verify()
    assert not (tmp_path / ".out.partial").exists()


def test_out_appears_while_it_is_prepared(tmp_path: Path) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "write":
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "precious").write_text("mine")

    with pytest.raises(RunError, match="nothing was left behind"):
        prepare_slip(tiny("llama"), tmp_path / "out", progress=progress)
    assert listing(tmp_path) == ["out", "out/precious"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(RunError, match="No space left on device") as caught:  # the input was right: exit code 1
        prepare_slip(tiny("llama"), tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value) and ".partial" not in str(caught.value)
    assert listing(tmp_path) == []


def test_a_disk_that_fills_up_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        prepare_slip(tiny("llama"), tmp_path / "out")
    assert listing(tmp_path) == []


def test_progress_is_reported_in_order(tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    prepare_slip(tiny("llama"), tmp_path / "out", progress=lambda *step: stages.append(step))
    assert list(dict.fromkeys(stage for stage, _, _ in stages)) == ["spectra", "split", "write"]
    linears = sum(m.weight.numel() for m in tiny("llama").modules() if isinstance(m, torch.nn.Linear))
    for pass_ in ("spectra", "split"):
        done = [done for stage, done, total in stages if stage == pass_ and total == linears]
        assert done[0] == 0 and done[-1] == linears and len(done) == 10
        steps = [after - before for before, after in itertools.pairwise(done)]
        assert all(step > 0 for step in steps) and steps == sorted(steps, reverse=True)  # the largest first: no straggler at the end


def test_quickly_enough(tmp_path: Path) -> None:
    """A regression to hours would show here first: the demo model takes half a second."""
    started = time.monotonic()
    prepare_slip(cloven.demo_model_path(), tmp_path / "out")
    assert time.monotonic() - started < 30


def test_a_pruned_model(tmp_path: Path) -> None:
    """Rows and columns of zeros, as structured pruning leaves them."""
    model: PreTrainedModel = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:10] = 0
        model.model.layers[0].mlp.down_proj.weight[:, 5:9] = 0
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    bundle = prepare_slip(model, tmp_path / "out", SlipConfig(precision="int8x2"))
    assert all(int(tensor.min()) >= -127 for tensor in tensors(bundle.exposed).values())
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in tensors(bundle.trusted).values())
    assert bundle.manifest.summary["quantisation_error"] < 1e-3


def test_a_copy_is_as_good(tmp_path: Path) -> None:
    assert copied(tiny_bundle("llama"), tmp_path / "copy").id == tiny_bundle("llama").id


@pytest.mark.parametrize(
    ("settings", "insecure"),
    [({}, False), ({"scramble": "none"}, True), ({"scramble": "permutation"}, True), ({"scramble": "none", "secret_fraction": 0}, False)],
)
def test_a_scramble_that_hides_less_prints_a_banner(
    tmp_path: Path, settings: dict[str, Any], insecure: bool, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_slip(tiny("llama"), tmp_path / "out", SlipConfig(**settings))
    assert ("INSECURE: scramble" in caplog.text) is insecure
