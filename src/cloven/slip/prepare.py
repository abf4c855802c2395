"""`prepare slip`: from a model to OUT/trusted and OUT/exposed.

    1. trace the groups of linears that share an input; find every tensor in the checkpoint: this is the plan
    2. draw the key, from which all randomness follows
    3. pass 1 over the groups: spectra; the global budget gives the ranks
    4. pass 2 over the groups: split (with decoy), stack, equalise, mix, quantise, scramble; codes to exposed/, the rest to trusted/
    5. what is not linear (embeddings, norms) goes to trusted/
    6. manifests with hashes; then one rename makes OUT appear, complete

OUT is written beside its place as `.OUT.partial` and renamed at the end, so that an interrupted run leaves nothing that loads. The same
command goes on where it stopped: jobs (see `jobs`) whose results are there are not run again, and give the same bits if they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cloven.bundle.bundle import Bundle, open_bundle
from cloven.bundle.manifest import MANIFEST, ExposedGroup, ExposedManifest
from cloven.bundle.partial_folder import partial_folder, require_new
from cloven.bundle.shards import ShardWriter, write_index
from cloven.bundle.trusted_manifest import TrustedManifest
from cloven.bundle.verification import sha256_file
from cloven.engine.engine import Engine, select_engine
from cloven.errors import BadInput
from cloven.field.codec import RowBounds
from cloven.model.source import Source, open_source, write_configuration
from cloven.slip.calibration import calibrate, text_sha256
from cloven.slip.cards import exposed_card, trusted_card
from cloven.slip.config import INSECURE_SCRAMBLE, SlipConfig
from cloven.slip.decomposition import allocate_ranks
from cloven.slip.jobs import GroupJob, find_spectra, read_record, read_spectra, record_path, spectra_path, split_group
from cloven.slip.plan import CALIBRATION, PLAN, RANKS, WORK, Plan, write_json
from cloven.slip.planning import fingerprint, make_plan, stored_copy
from cloven.slip.split_key import SPLIT_KEY, SplitKey, read_split_key
from cloven.slip.split_model import LinearShape, SplitModelShape
from cloven.slip.summary import Summary
from cloven.telemetry import logger

Progress = Callable[[str, int, int], None]  # stage, done, total: parameters
VERSION = 1
_JOB_BYTES = 2**30  # of a job, besides five times the largest group in float32


def prepare_slip(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    config: SlipConfig | None = None,
    progress: Progress = lambda stage, done, total: None,
    *,
    adapter: str | Path | None = None,
    public_base: str | Path | None = None,
    key: str | Path | None = None,
    calibration: str | Path | None = None,
    engine: str = "auto",
    device: str = "cpu",
) -> Bundle:
    """Split a causal language model into a trusted and an exposed half.

    Args:
        model: a model directory, a Hub id, or a model in memory (which is not changed).
        out: a folder that does not exist yet, or is empty.
        config: parameters; the defaults are safe for a model that has no public relative.
        progress: called with (stage, done, total), in parameters.
        adapter: a PEFT directory, a LoRA for `model`, which is public: the adapter is the secret part (`origin="adapter"`).
        public_base: the public model (a directory or a Hub id) of which `model` is a fine-tune (`origin="public-base"`).
        key: trusted/split.key of an earlier bundle of the same model with the same parameters: makes the same bundle again.
        calibration: a text, of which the first 8,192 tokens are run through the unsplit model: columns that meet large activations are then
            quantised finer, and the exposed columns' norms say which they are. Needs the memory that the whole model takes.
        engine: "auto", "inline", "pool" or "ray": see `cloven.engine`; the bits do not depend on it.
        device: "cpu" or "cuda": where the factorisations are computed; the bits depend on it.

    Returns:
        The bundle: OUT/trusted (mode 0700) and OUT/exposed.

    Raises:
        BadInput, UnsupportedModel: before anything is written, or nothing is left behind.
        RunError: the disk is full, say; the same call goes on where it stopped (a model in memory: nothing is left behind).

    Guarantee: all split randomness comes from the operating system; the exposed half holds int8 codes and shapes only. Memory: each job
    below five times the largest group in float32 plus 1 GB, if the checkpoint's names are the model's. Not hidden:
    the shapes of the groups, and what the exposed codes give away of the weights (see docs/threat-model.md). Without `key` every call makes
    another decoy: two bundles of one model in one party's hands give away the secret subspaces. Prepare once per model; copy bundles.
    """
    config = _with_origin(config, adapter, public_base)
    out = Path(out).expanduser().absolute()
    source = open_source(model)
    require_new(out)
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise BadInput(f"device {device!r}: choose cpu, or cuda on a machine that has it")
    text = text_sha256(Path(calibration)) if calibration is not None else ""
    given = read_split_key(Path(key)).used_for(_parameters(config, device, text)) if key is not None else None
    plan = make_plan(source, config, adapter, public_base, device, text)
    with partial_folder(out, _resumes(plan) if plan is not None else None) as partial:
        for folder, mode in ((partial / WORK, 0o700), (partial / "trusted", 0o700), (partial / "exposed", 0o755)):
            folder.mkdir(mode=mode, exist_ok=True)
        if config.insecure:
            logger.warning(INSECURE_SCRAMBLE.format(config.scramble))
        if plan is None:
            plan = make_plan(stored_copy(source, partial / WORK / "source"), config, adapter, public_base, device, text)
            assert plan is not None
        if calibration is not None and not (partial / WORK / CALIBRATION).exists():
            # of the public base where there is one: the exposed half must not depend on more than it
            measured = open_source(public_base) if public_base is not None else source
            names = [tuple(linear.name for linear in group) for group in plan.groups]
            progress("calibration", 0, 1)
            calibrate(measured, names, Path(calibration), partial / WORK / CALIBRATION)
        largest = max(plan.weight_of(index) for index in range(len(plan.groups)))
        parameters = sum(linear.rows * linear.columns for linear in plan.linears)
        _write(source, plan, given, partial, progress, select_engine(engine, parameters, 5 * 4 * largest + _JOB_BYTES))
    return open_bundle(out)


def _with_origin(config: SlipConfig | None, adapter: str | Path | None, public_base: str | Path | None) -> SlipConfig:
    origin = "adapter" if adapter is not None else "public-base" if public_base is not None else "private"
    if adapter is not None and public_base is not None:
        raise BadInput("give either an adapter (and its base as the model) or a public base (and the fine-tune as the model)")
    if config is None:
        return SlipConfig(origin=origin, scramble="mixing" if origin == "private" else "none")
    if config.origin != origin:
        raise BadInput(f"the configuration says origin={config.origin!r}, the arguments say {origin!r}")
    return config


def _parameters(config: SlipConfig, device: str, calibration: str) -> dict[str, Any]:
    """All that decides the bits besides the model: a GPU may give singular vectors the other sign, and so another decoy."""
    return {**config.to_dict(), "device": device.partition(":")[0], "calibration": calibration}


def _resumes(plan: Plan) -> Callable[[Path], bool]:
    def resumes(partial: Path) -> bool:
        if not (partial / WORK / PLAN).exists():
            return False
        if Plan.read(partial / WORK) != plan:
            raise BadInput(f"{partial}: an unfinished preparation of another model or with other settings; remove it to start afresh")
        return True

    return resumes


def _write(source: Source, plan: Plan, given: SplitKey | None, partial: Path, progress: Progress, engine: Engine) -> None:
    # 2
    place = partial / "trusted" / SPLIT_KEY
    key = read_split_key(place) if place.exists() else given or SplitKey.fresh(_parameters(plan.config, plan.device, plan.calibration))
    if given is not None and given.key != key.key:
        raise BadInput(f"{partial}: an unfinished preparation with another key; remove it to start afresh")
    key.write(place)
    plan.write(partial / WORK)

    # 3
    everything = range(len(plan.groups))
    if plan.adapter is None:
        missing = [index for index in everything if not spectra_path(partial, index).exists()]
        _run(engine, "spectra", find_spectra, partial, plan, missing, progress)
    found = [read_spectra(partial, index) if plan.adapter is None else ([], []) for index in everything]
    if plan.config.origin == "public-base" and not any(bool(values.any()) for spectra, _ in found for values in spectra):
        raise BadInput("the model and its public base are the same: there is nothing to keep secret")
    key.bound_to(fingerprint(plan, [hashes for _, hashes in found])).write(place)
    write_json(partial / WORK / RANKS, _ranks(plan, [values for spectra, _ in found for values in spectra]))

    # 4
    missing = [index for index in everything if not record_path(partial, index).exists()]
    _run(engine, "split", split_group, partial, plan, missing, progress)

    # 5
    progress("write", 0, 1)
    for half in ("trusted", "exposed"):
        _remove_unfinished(partial / half)
    others = _write_others(plan, partial / "trusted")

    # 6
    records = [read_record(partial, index) for index in everything]
    manifest = ExposedManifest(
        tuple(ExposedGroup(**record["exposed"]) for record in records),
        {record["exposed"]["file"]: record["exposed_sha256"] for record in records},
    )
    manifest.write(partial / "exposed")
    described = tuple(tuple(LinearShape(**shape) for shape in record["shapes"]) for record in records)
    _write_configuration(source, plan, partial / "trusted", manifest.bundle, described)
    _write_index(partial / "trusted", records, others)
    summary = _summary(records, described)
    _write_cards(source, partial, plan.config, summary)
    files = {path.name: sha256_file(path) for path in sorted((partial / "trusted").iterdir()) if path.name != MANIFEST}
    bounds = tuple(RowBounds(**record["bounds"]) for record in records)
    TrustedManifest("slip", manifest, bounds, files, plan.config.to_dict(), summary.to_dict()).write(partial / "trusted")
    shutil.rmtree(partial / WORK)


def _run(
    engine: Engine, stage: str, task: Callable[[GroupJob], None], partial: Path, plan: Plan, groups: list[int], progress: Progress
) -> None:
    total = sum(plan.weight_of(index) for index in range(len(plan.groups)))
    done = total - sum(plan.weight_of(index) for index in groups)
    progress(stage, done, total)
    largest_first = sorted(groups, key=plan.weight_of, reverse=True)
    for job in engine.run(task, [GroupJob(str(partial), index) for index in largest_first]):
        done += plan.weight_of(job.group)
        progress(stage, done, total)


def _ranks(plan: Plan, spectra: list[torch.Tensor]) -> list[list[int]]:
    """The rank of every matrix, by group."""
    shapes = [(linear.rows, linear.columns) for linear in plan.linears]
    if plan.adapter is not None:
        ranks = [0] * len(shapes)  # the adapter says
    elif plan.config.rank is not None:
        ranks = [min(plan.config.rank, min(shape) // 2) for shape in shapes]
    else:
        ranks = allocate_ranks(spectra, shapes, plan.config.secret_fraction)
    of_linear = iter(ranks)
    return [[next(of_linear) for _ in group] for group in plan.groups]


def _remove_unfinished(folder: Path) -> None:
    """Remove what jobs that were killed have left: our unfinished files, and those that safetensors writes before it renames them."""
    for pattern in (".tmp*", "*.partial"):
        for path in folder.glob(pattern):
            path.unlink()


def _write_others(plan: Plan, trusted: Path) -> ShardWriter:
    """All tensors that do not belong to a split module: embeddings, norms."""
    for left in trusted.glob("other-*"):
        left.unlink()  # by an interrupted run
    shards, checkpoint = ShardWriter(trusted, "other", secret=True), plan.source.open()
    dtype = getattr(torch, plan.dtype)
    for name, place in plan.others.items():
        tensor = checkpoint.tensor(place)
        shards.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    shards.close()
    return shards


def _write_index(trusted: Path, records: list[dict[str, Any]], others: ShardWriter) -> None:
    file_of, size = dict(others.file_of), others.total_bytes
    for record in records:
        file_of |= dict.fromkeys(record["kept"]["tensors"], record["kept"]["file"])
        size += record["kept"]["bytes"]
    write_index(trusted / "model.safetensors.index.json", file_of, size)


def _summary(records: list[dict[str, Any]], described: tuple[tuple[LinearShape, ...], ...]) -> Summary:
    summary = Summary()
    for record, shapes in zip(records, described, strict=True):
        for shape, energies in zip(shapes, record["energies"], strict=True):
            summary.add(shape.name, shape.rows, shape.columns, shape.rank, *energies)
        summary.add_quantisation(*record["quantisation"])
    return summary


def _write_configuration(source: Source, plan: Plan, trusted: Path, bundle: str, described: tuple[tuple[LinearShape, ...], ...]) -> None:
    shape = SplitModelShape(plan.config.precision, plan.config.scramble, described)
    description = {"scheme": "slip", "version": VERSION, "bundle": bundle, "model": shape.to_dict()}
    model = source.loaded or source.skeleton(getattr(torch, plan.dtype))
    write_configuration(model, trusted, description, tie_word_embeddings=False)  # the head is split, the embedding stays trusted


def _write_cards(source: Source, partial: Path, config: SlipConfig, summary: Summary) -> None:
    source.copy_files(partial / "trusted")
    for half in ("trusted", "exposed"):
        source.copy_files(partial / half, licences=True)
    (partial / "trusted" / "README.md").write_text(trusted_card(source.name, source.licence(), config, summary), encoding="utf-8")
    (partial / "exposed" / "README.md").write_text(exposed_card(source.name, source.licence(), config), encoding="utf-8")
    for path in (partial / "trusted").iterdir():
        path.chmod(0o600)
    for path in (partial / "exposed").iterdir():
        path.chmod(0o644)
