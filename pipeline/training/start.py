"""Weights to start from: what `start.model` means, what it decides of the settings, and its copy in the storage.

    config = load_started_config("demo", ["start.model=models:/demo@champion"])     # before Ray: pinned and checked
    store_start(config, artifact)                       # the first stage that reads it copies it, whole

A name is resolved once for each pipeline: what it meant is noted beside the copy, so a run that was stopped goes on
with the same weights although the alias or the branch has moved. The digest of the files is in the fingerprints.
"""

import dataclasses
import hashlib
import json
import posixpath
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from model.checkpoint import check_weights, load_config, with_context
from model.config import ModelConfig
from model.settings import require
from model.tokenizer import NAMED_TOKENIZERS, load_tokenizer
from pipeline.artifacts import (
    Artifact,
    FileRecord,
    Manifest,
    artifact_at,
    check_digest,
    filesystem_of,
    record_file,
    resolve_storage,
    write_atomically,
)
from pipeline.config import Config, build_config, read_settings
from pipeline.training.origins import (
    CONFIG,
    SMALL_FILES,
    TOKENIZER_FILES,
    Folder,
    Origin,
    is_folder,
    matters,
    open_origin,
)

NOTES = "starts.json"  # what each name meant when this pipeline first started from it
# A training may differ from its start in these: GPT-2's context can be cropped, RoPE's is any, dropout is no weight.
FREE = ("context_length", "dropout")
# Where 0 means that the size follows from others, what it comes to.
DERIVED = {
    "num_kv_heads": "kv_heads",
    "head_dim": "channels_per_head",
    "mlp_width": "mlp_channels",
    "norm_epsilon": "epsilon",
}


@dataclass(frozen=True)
class Start:
    """What is known of a start before its weights are read."""

    resolved: str
    digest: str
    model: ModelConfig
    vocab_size: int  # rows of the embedding; a tokenizer may have fewer tokens
    has_tokenizer: bool


def load_started_config(preset: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a config as `load_config` does, and from its start, where it has one, what that decides."""
    return build_config(resolve_start(read_settings(preset, list(overrides))))


def resolve_start(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the settings that are given what their start decides: the model's, the tokenizer's, and its digest.

    Raises `ValueError` with one sentence where the start cannot be read, or a setting contradicts it.
    """
    if not str(values.get("start.model", "")).strip():
        return dict(values)
    # Those of the model are checked where the start's stand beside them.
    alone = {key: value for key, value in values.items() if not key.startswith("model.")}
    config = build_config({**alone, "start.digest": ""})
    start = find_start(config)
    expected = str(values.get("start.digest", ""))
    require(
        expected in ("", start.digest),
        f"start.model={config.start.model} holds other files than start.digest={expected} says: their digest is"
        f" {start.digest}.",
    )
    known = merge_model_settings(values, start) | merge_tokenizer_settings(values, start)
    known |= {"start.resolved": start.resolved, "start.digest": start.digest}
    return {**values, **known}


def merge_model_settings(values: Mapping[str, Any], start: Start) -> dict[str, Any]:
    """Return the model's settings as the start has them; raises `ValueError` for one that is given and contradicts."""
    merged = {}
    for leaf in dataclasses.fields(ModelConfig):
        key, theirs = f"model.{leaf.name}", getattr(start.model, leaf.name)
        given = values.get(key, theirs)
        is_derived = leaf.name in DERIVED and given == 0
        effective = getattr(start.model, DERIVED.get(leaf.name, leaf.name))
        require(
            leaf.name in FREE or is_derived or given in (theirs, effective),
            f"{key}={given} contradicts start.model={start.resolved}, whose config.json says {effective}; leave {key}"
            f" out, or start from other weights.",
        )
        merged[key] = given if leaf.name in FREE else theirs
    with_context(start.model, merged["model.context_length"], f"start.model={start.resolved}")
    return merged


def merge_tokenizer_settings(values: Mapping[str, Any], start: Start) -> dict[str, Any]:
    """Return the tokenizer's settings that a start decides; raises `ValueError` for one that contradicts."""
    kind, size = values.get("tokenizer.kind", "start"), start.vocab_size
    if kind == "start":
        named = ", ".join(NAMED_TOKENIZERS)
        require(
            start.has_tokenizer,
            f"start.model={start.resolved} holds no tokenizer.json; add it, or name the tokenizer that its weights"
            f" learnt with in tokenizer.kind: {named}.",
        )
        given = values.get("tokenizer.vocabulary_size", size)
        require(
            given == size,
            f"tokenizer.vocabulary_size={given} contradicts start.model={start.resolved}, whose config.json says"
            f" {size}; leave tokenizer.vocabulary_size out.",
        )
        return {"tokenizer.kind": "start", "tokenizer.vocabulary_size": size}
    require(
        kind in NAMED_TOKENIZERS and not start.has_tokenizer,
        f"tokenizer.kind={kind} contradicts start.model={start.resolved}, whose weights learnt with another tokenizer;"
        f" set tokenizer.kind=start.",
    )
    require(
        NAMED_TOKENIZERS[kind] <= size,
        f"tokenizer.kind={kind} has {NAMED_TOKENIZERS[kind]:,} tokens, more than the {size:,} that"
        f" start.model={start.resolved} knows; it is not the tokenizer of these weights.",
    )
    return {}


# What the name means -------------------------------------------------------------------------------------------------


def find_start(config: Config) -> Start:
    """Read what a start says of itself: from its copy, where the name was resolved before, else where it lies."""
    asked = config.start.model
    note = read_notes(config).get(asked)
    resolved = config.start.resolved or ("" if note is None or is_folder(asked) else note["resolved"])
    if note is not None and resolved == note["resolved"]:
        stored = start_artifact(config, note["digest"])
        if stored.is_done:
            tell_if_moved(config, note)
            return read_stored(stored, resolved, note["digest"])
    try:
        origin = open_origin(resolved or asked, config)
    except ValueError:
        if note is None or not start_artifact(config, note["digest"]).is_done:
            raise
        stored = start_artifact(config, note["digest"])
        print(f"start     {asked} cannot be read now; its copy at {stored.url} is used", flush=True)
        return read_stored(stored, note["resolved"], note["digest"])
    if isinstance(origin, Folder) and note is not None and note.get("listing") == origin.listing:
        digest = note["digest"]
    else:
        digest = digest_files(origin.digests())
    if note is not None and is_folder(asked) and digest != note["digest"]:
        print(
            f"start     {asked} holds other files than when this pipeline started from it before (digest"
            f" {note['digest']}, now {digest}): what comes is a new training; the earlier one is kept",
            flush=True,
        )
    with origin.small_files() as folder:
        start = read_start(folder, origin.name, digest)
        if isinstance(origin, Folder) and "://" not in origin.name:
            check_weights(folder, start.model, start.vocab_size)
    describe(asked, start)
    return start


def tell_if_moved(config: Config, note: Mapping[str, Any]) -> None:
    """Say where an alias means another version by now: the pipeline goes on with the one that it began with."""
    asked = config.start.model
    if not asked.startswith("models:") or config.start.resolved or note["resolved"] == asked:
        return
    try:
        now = open_origin(asked, config).name
    except ValueError:  # the registry is away, or the alias gone: what was noted holds all the same
        return
    if now != note["resolved"]:
        print(
            f"start     {asked} means {now} by now; the pipeline {config.name} began with {note['resolved']} and goes"
            f" on with it (for the other: start.model={now}, or another name)",
            flush=True,
        )


def read_stored(stored: Artifact, resolved: str, digest: str) -> Start:
    with tempfile.TemporaryDirectory() as folder:
        return read_start(fetch_start(stored, Path(folder), weights=False), resolved, digest)


def read_start(folder: Path, resolved: str, digest: str) -> Start:
    """Read a folder's `config.json` and check its tokenizer; raises `ValueError` for what this project has not."""
    model, vocab_size = load_config(folder)
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES if name.endswith((".json", ".model")))
    if has_tokenizer:
        size = load_tokenizer(folder).vocab_size
        require(
            size <= vocab_size,
            f"start.model={resolved} has a tokenizer of {size:,} tokens and weights for {vocab_size:,}; they do not"
            f" belong together.",
        )
    return Start(resolved, digest, model, vocab_size, has_tokenizer)


def describe(asked: str, start: Start) -> None:
    meant = "" if start.resolved == asked else f", which is {start.resolved}"
    model = start.model
    print(
        f"start     {asked}{meant}: {model.family}, {model.num_layers} layers, width {model.width}, vocabulary"
        f" {start.vocab_size:,}, context {model.context_length:,}",
        flush=True,
    )


def digest_files(digests: Mapping[str, str]) -> str:
    """Name the content of a start: its weights, settings and tokenizer, and how it talks."""
    return hashlib.sha256(json.dumps(dict(sorted(digests.items()))).encode()).hexdigest()[:20]


# Its copy ------------------------------------------------------------------------------------------------------------


def start_artifact(config: Config, digest: str) -> Artifact:
    return artifact_at(config.storage, config.name, "start", digest)


def store_start(config: Config, start: Artifact) -> Manifest:
    """Copy the start into the storage unless it is there, so that every worker can read it, now and after a stop."""
    manifest = start.manifest()
    if manifest is not None:
        return manifest
    origin = open_origin(config.start.resolved, config)
    with origin.folder() as folder:
        names = sorted(path.name for path in folder.iterdir() if path.is_file() and matters(path.name))
        files = {name: record_file(folder / name) for name in names}
        require(
            digest_files({name: record.sha256 for name, record in files.items()}) == start.fingerprint,
            f"start.model={config.start.resolved} has changed while it was read; run the same command again.",
        )
        model, vocab_size = load_config(folder)
        check_weights(folder, model, vocab_size)
        print(f"start     copying {sum(record.bytes for record in files.values()) / 1e6:,.0f} MB to {start.url}")
        for name in names:
            start.filesystem.put_file(str((folder / name).resolve()), start.file(name))
    manifest = start.commit(
        {
            "model": config.start.model,
            "resolved": config.start.resolved,
            "run_id": origin.run_id,
            "vocabulary_size": vocab_size,
            "context_length": model.context_length,
        },
        files,
    )
    note_start(config, origin)
    return manifest


def fetch_start(start: Artifact, folder: Path, *, weights: bool) -> Path:
    """Return a local folder that holds the start's files, checked: itself, where storage is local."""
    manifest = start.manifest()
    if manifest is None:
        raise ValueError(f"{start.url} is not whole; run the same command again, which copies it.")
    records: dict[str, FileRecord] = {
        name: record for name, record in manifest.files.items() if weights or name in SMALL_FILES
    }
    if not isinstance(start.filesystem, LocalFileSystem):
        return start.download(folder, records)
    for name, record in records.items():
        path = Path(start.file(name))
        require(path.is_file(), f"{name} is missing from {start.url}; delete that folder and run again.")
        check_digest(path, record, str(path))
    return Path(start.path)


def read_notes(config: Config) -> dict[str, dict[str, Any]]:
    filesystem, path = filesystem_of(posixpath.join(resolve_storage(config.storage), config.name, NOTES))
    try:
        return json.loads(filesystem.cat_file(path))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError(f"{path} is damaged; delete it, and start.model is resolved anew.") from None


def note_start(config: Config, origin: Origin) -> None:
    """Write down what a name meant; the one run of this pipeline does."""
    entry: dict[str, Any] = {"resolved": config.start.resolved, "digest": config.start.digest}
    if isinstance(origin, Folder):
        entry["listing"] = origin.listing
    filesystem, path = filesystem_of(posixpath.join(resolve_storage(config.storage), config.name, NOTES))
    content = json.dumps(read_notes(config) | {config.start.model: entry}, indent=1)
    write_atomically(filesystem, path, content.encode())


# What its descendants keep -------------------------------------------------------------------------------------------


def keep_companions(start: Path, folder: Path, context_length: int) -> None:
    """Put the start's tokenizer, chat template and generation settings into a checkpoint's folder, as they were."""
    for name in SMALL_FILES:
        if name != CONFIG and (start / name).is_file():
            (folder / name).write_bytes((start / name).read_bytes())
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("model_max_length", context_length) != context_length:
            settings["model_max_length"] = context_length
            path.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    ends = ("bos_token_id", "eos_token_id", "pad_token_id")
    theirs = json.loads((start / CONFIG).read_text(encoding="utf-8"))
    ours = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    kept = {name: theirs[name] for name in ends if name in theirs}
    (folder / CONFIG).write_text(json.dumps(ours | kept, indent=2) + "\n", encoding="utf-8")
