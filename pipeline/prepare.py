"""Stage 2: text becomes token shards, through Ray Data.

    source ─cut─▶ slices ─one task each─▶ train/00042-000.parquet + work/00042.json ─merge val, count─▶ manifest

Where the input is cut depends on the input alone (corpus/files.py), and each unit of work writes its own shards
(corpus/units.py). So the shards are the same bytes for any number of workers, and a run that was stopped goes on.
"""

import hashlib
import posixpath
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from fsspec.implementations.local import LocalFileSystem

from model.chat import CHAT_TEMPLATE, TEMPLATE_FILE, ChatTemplate, load_template, open_template
from model.tokenizer import Tokenizer, load_tokenizer
from pipeline.artifacts import MANIFEST, Artifact, FileRecord, Manifest, Recipe, artifact_at
from pipeline.config import Config, result_settings
from pipeline.corpus import card, cleaning, conversations, duplicates
from pipeline.corpus.contamination import REASON, RUNS, Runs, keep_runs, load_runs
from pipeline.corpus.files import Listing, Slice, fingerprint_part, listing_of, slices
from pipeline.corpus.formats import REPLACED, read
from pipeline.corpus.members import MIX, Member, note_members
from pipeline.corpus.omissions import EMPTY, LEAST_VALIDATION_DOCUMENTS, warn, warn_of_share
from pipeline.corpus.shards import ShardWriter
from pipeline.corpus.units import (
    SPLITS,
    PreparePlan,
    Tally,
    Task,
    Unit,
    read_records,
    run_units,
    start_ahead,
    sum_tallies,
)
from pipeline.evaluation.comparison import FEWEST_DOCUMENTS
from pipeline.evaluation.tasks import load_task, parse_entries

FORMAT_VERSION = 1
DOCUMENTS_PER_BATCH = 64  # encoded together
BYTES_PER_TOKEN = 4.2  # of English with a large vocabulary: how much text fills one shard
# Text whose hashes one task compares in memory, where those of near duplicates take as much.
PARTITION_BYTES = 500_000_000


def settings(config: Config) -> dict[str, Any]:
    found = result_settings(config.prepare)
    parse_entries(config.prepare.decontaminate)  # asked for before anything runs: a wrong name is known now
    if config.source.holds_conversations:  # they are cut to the context, and their text depends on the template
        found |= {"context_length": config.model.context_length, "chat_template": CHAT_TEMPLATE}
    if config.source.mix:
        found["weights"] = {part.name: part.weight for part in config.source.parts()}
    return found


def parts(config: Config, inputs: Mapping[str, Artifact]) -> list[Artifact]:
    """Name the shards of each source of a mix: what a run of that source alone would make, and may have made."""
    found = []
    for part in config.source.parts():
        known = {"source": fingerprint_part(part.source), "tokenizer": inputs["tokenizer"].fingerprint}
        recipe = Recipe(FORMAT_VERSION, settings(replace(config, source=part.source)), known)
        found.append(artifact_at(config.storage, config.name, "prepare", recipe.fingerprint("prepare"), recipe=recipe))
    return found


def still_holds(config: Config, manifest: Manifest) -> bool:
    """Whether the shards of a mix's sources are still there."""
    fingerprints = [each["fingerprint"] for each in manifest.counts.get(MIX, ())]
    return all(artifact_at(config.storage, config.name, "prepare", each).is_done for each in fingerprints)


def run(config: Config, inputs: Mapping[str, Artifact], output: Artifact) -> Manifest:
    """Make the shards of the corpus; what an earlier, stopped run finished is kept."""
    if config.source.mix:
        return _run_mix(config, inputs, output)
    slice_bytes = int(config.prepare.shard_tokens * BYTES_PER_TOKEN)
    is_talk = config.source.holds_conversations
    listing = listing_of(config.source)
    found = slices(config.source, slice_bytes, listing)
    plan = PreparePlan(
        source=config.source,
        settings=config.prepare,
        tokenizer=inputs["tokenizer"],
        output=output,
        slice_bytes=slice_bytes,
        partitions=1 + sum(slice_.text_bytes for slice_ in found) // PARTITION_BYTES,
        val_below=int(config.prepare.validation_fraction * 2**64),
        chat_template=load_template_of(inputs["tokenizer"]).text if is_talk else "",
        most_tokens=config.model.context_length + 1 if is_talk else 0,  # the last one is a target only
    )
    there = output.list_files()
    runs = _collect_runs(config.prepare.decontaminate, output)
    if runs is not None:
        plan = replace(plan, runs=RUNS)
    if config.prepare.drop_exact_duplicates or config.prepare.drop_near_duplicates:
        signed = list(run_units(plan, found, read_records(plan, there, SIGN), SIGN))
        plan = duplicates.find(plan, signed, there)
    with ThreadPoolExecutor(1) as beside:  # while the driver waits for its workers
        beside.submit(_load_what_comes_last, plan)
        tallies = _prepare_all(plan, found, read_records(plan, there, PREPARE))
    total = first = sum_tallies(tallies)
    if total.documents == 0:
        output.delete()  # a later run could not use any of it
        why = total.omissions.reasons(listing)
        raise ValueError(f"The corpus is empty: no document of the source holds text{f' ({why})' if why else ''}.")
    if not all(total.splits[split]["documents"] for split in SPLITS):
        # So few documents that all hashes lie on one side: hold out the one with the lowest hash.
        plan = replace(plan, val_below=min(total.lowest_hash, total.lowest_val_hash) + 1)
        tallies = _prepare_all(plan, found, tallies)
        total = sum_tallies(tallies)
    if total.splits["train"]["documents"] == 0:
        output.delete()
        raise ValueError(
            "The corpus is too small: it needs two different documents, one to train on and one to hold out; add text,"
            " or for one large .txt file set source.split_text=blank-lines."
        )

    files = {name: record for name, record in total.files.items() if not name.startswith("work/")}
    files |= _merge_val(plan, tallies)
    tokenizer = load_tokenizer_of(plan.tokenizer)
    counts = {
        **{split: dict(total.splits[split]) for split in SPLITS},
        "dropped": dict(sorted(total.dropped.items())),
        "replaced_utf8": total.replaced,
        "files_not_read": dict(listing.ignored),
        "tokenizer": tokenizer.name,
        "tokenizer_digest": tokenizer.digest,
        "vocabulary_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "bytes_per_token": round(sum(total.splits[split]["bytes"] for split in SPLITS) / total.tokens, 4),
        "lengths": total.lengths,
    }
    if runs is not None:
        counts["decontaminated"] = runs.count(total.dropped)
    if is_talk:
        counts["cut"] = total.cut
        files[TEMPLATE_FILE] = output.write_text(TEMPLATE_FILE, plan.chat_template)
    pages = card.write(config, counts, files, first_shard=min(name for name in files if name.startswith("train/")))
    files |= {name: output.write_bytes(name, content) for name, content in pages.items()}
    manifest = output.commit(counts, files)
    extra = {*plan.duplicates, *([RUNS] if runs is not None else [])}
    _clear_work(plan, {*there, *first.files, *total.files, *extra}, tallies, files)
    card.log_to_mlflow(config, output, manifest, pages)
    _say(total, listing, runs, config.prepare.validation_fraction)
    return manifest


def _run_mix(config: Config, inputs: Mapping[str, Artifact], output: Artifact) -> Manifest:
    """Prepare each source of the mix that is not prepared yet, and write down which they are and their shares."""
    chosen = config.source.parts()
    whole = sum(part.weight for part in chosen)
    from pipeline.corpus.mixing import tokens_per_epoch  # it loads torch, which a worker of this stage needs not

    members, manifests = [], []
    for part, shards in zip(chosen, parts(config, inputs), strict=True):
        manifest = shards.manifest()
        if manifest is None:
            print(f"prepare   {part.name} …", flush=True)
            try:
                manifest = run(replace(config, source=part.source), inputs, shards)
            except ValueError as error:
                raise ValueError(f"{part.name}, in source.mix: {error}") from None
        members.append(Member(part.name, part.weight / whole, shards))
        manifests.append(manifest)
    counts = card.sum_counts([manifest.counts for manifest in manifests]) | {MIX: note_members(members)}
    files = {}
    if config.source.holds_conversations:
        files[TEMPLATE_FILE] = output.write_text(TEMPLATE_FILE, load_template_of(inputs["tokenizer"]).text)
    lengths = [
        tokens_per_epoch(member.shards, manifest, config.model.context_length)
        for member, manifest in zip(members, manifests, strict=True)
    ]
    pages = card.write_mix(config, counts, list(zip(members, manifests, lengths, strict=True)))
    files |= {name: output.write_bytes(name, content) for name, content in pages.items()}
    manifest = output.commit(counts, files)
    card.log_to_mlflow(config, output, manifest, pages)
    for line in card.describe_shares(config, list(zip(members, manifests, lengths, strict=True))):
        print(f"prepare   {line}", flush=True)
    return manifest


def _collect_runs(entries: list[str], output: Artifact) -> Runs | None:
    """Write down the runs of words of the items of `prepare.decontaminate`; None where it names no task."""
    tasks = [load_task(entry) for entry in entries]
    items = {task.name: [[item.context + ending for ending in item.endings] for item in task.items] for task in tasks}
    return keep_runs(Runs.of(items), output) if items else None


def _say(total: Tally, listing: Listing, runs: Runs | None, fraction: float) -> None:
    """Print what was kept and what was lost, and warn of what somebody should look at."""
    omissions = total.omissions
    reasons = omissions.reasons(listing)
    cut = f", {total.cut:,} of them cut after a whole turn" if total.cut else ""
    print(
        f"prepare   kept {omissions.kept:,} of {omissions.read:,} documents{cut}{f'; {reasons}' if reasons else ''}",
        flush=True,
    )
    lost, kept = (sum(total.splits[split][name] for split in SPLITS) for name in ("bytes_without_token", "bytes"))
    if lost:
        print(f"prepare   left out {lost:,} bytes ({lost / (lost + kept):.2%}): the tokenizer has no tokens for them")
    validation = total.splits["val"]
    warnings = omissions.warnings(listing) + warn_of_share(validation["documents"], total.documents, fraction)
    if validation["documents"] < LEAST_VALIDATION_DOCUMENTS:
        warnings.append(
            f"The validation split has {validation['documents']:,} documents with {validation['tokens']:,} tokens: too"
            f" few for a loss that says much. Add text, or raise prepare.validation_fraction."
        )
    elif validation["documents"] < FEWEST_DOCUMENTS:
        warnings.append(
            f"The validation split has {validation['documents']:,} documents, and register.gate decides nothing on"
            f" fewer than {FEWEST_DOCUMENTS}: a second version would stay a challenger. Raise"
            f" prepare.validation_fraction."
        )
    if runs is not None:
        lines, more = runs.describe(total.dropped)
        warnings += more
        print("".join(f"prepare   {line}\n" for line in lines), end="", flush=True)
    warn("prepare", warnings)


def _prepare_all(plan: PreparePlan, found: list[Slice], finished: Mapping[str, Tally]) -> dict[str, Tally]:
    """Make the shards of every unit that has no record under this plan's split; return every unit's tally."""
    # A unit stays as it is if it was split at the same hash, or if no document of it would change sides.
    still_valid = {
        name: tally
        for name, tally in finished.items()
        if tally.val_below == plan.val_below or (tally.val_below < plan.val_below <= tally.lowest_hash)
    }
    return run_units(plan, found, still_valid, PREPARE)


def _load_what_comes_last(plan: PreparePlan) -> None:
    load_tokenizer_of(plan.tokenizer)
    card.load_plotting()


def _merge_val(plan: PreparePlan, tallies: Mapping[str, Tally]) -> dict[str, FileRecord]:
    """Join the held-out documents of many slices into shards of the usual size, in order."""
    groups: list[list[str]] = [[]]
    collected = 0
    for name, tally in tallies.items():
        if f"work/{name}.val.parquet" not in tally.files:
            continue
        if collected >= plan.settings.shard_tokens:
            groups.append([])
            collected = 0
        groups[-1].append(f"work/{name}.val.parquet")
        collected += tally.splits["val"]["tokens"]
    merged = ray.get([_merge.remote(plan, f"val/{index:05d}.parquet", names) for index, names in enumerate(groups)])
    return dict(merged)


def _clear_work(
    plan: PreparePlan, written: set[str], tallies: Mapping[str, Tally], kept: Mapping[str, FileRecord]
) -> None:
    """Delete what only a stopped run would need, without another listing."""
    filesystem = plan.output.filesystem
    records = {f"work/{name}{ending}" for name in tallies for ending in (PREPARE.record, SIGN.record)}
    stale = sorted((written | records) - kept.keys() - {MANIFEST})
    if not isinstance(filesystem, LocalFileSystem):
        with ThreadPoolExecutor(max_workers=16) as pool:
            list(pool.map(filesystem.rm_file, map(plan.output.file, stale)))
        return
    for name in stale:
        Path(plan.output.file(name)).unlink(missing_ok=True)
    for leftover in Path(plan.output.path).rglob(".tmp-*"):  # of writers that were killed
        leftover.unlink(missing_ok=True)
    shutil.rmtree(posixpath.join(plan.output.path, "work"), ignore_errors=True)


# On the workers ---------------------------------------------------------------------------------------------------


def prepare_unit(plan: PreparePlan, unit: Unit) -> Tally:
    """Read, clean, tokenize and write one unit of work; return what it became."""
    tokenizer = load_tokenizer_of(plan.tokenizer)
    tally = Tally(val_below=plan.val_below)
    most_tokens = plan.settings.shard_tokens * 3 // 2
    is_talk = bool(plan.chat_template)
    train = ShardWriter(plan.output, f"train/{unit.name}-{{:03d}}.parquet", tokenizer, most_tokens, is_talk)
    val = ShardWriter(plan.output, f"work/{unit.name}.val.parquet", tokenizer, conversations=is_talk)
    doomed = duplicates.read(plan, unit.name)
    documents = _clean_documents(plan, unit, tally)
    while batch := list(islice(documents, DOCUMENTS_PER_BATCH)):
        kept = []
        for position, text, note in batch:
            if position in doomed:
                tally.dropped[doomed[position]] += 1
            else:
                tally.replaced += note == REPLACED
                kept.append(text)
        for text, ids, learn in _encode(plan, tokenizer, kept, tally):
            score = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
            is_val = score < plan.val_below
            if is_val:
                tally.lowest_val_hash = min(tally.lowest_val_hash, score)
            else:
                tally.lowest_hash = min(tally.lowest_hash, score)
            (val if is_val else train).add(ids, learn)
            counts = tally.splits[SPLITS[is_val]]
            counts["documents"] += 1
            counts["tokens"] += len(ids) + (learn is None)  # a text's end comes behind it
            # Of a text the tokens spell just this, or `encode_all` would have raised; of a conversation more.
            counts["bytes"] += len(tokenizer.spell(text)) if learn is None else int(tokenizer.byte_lengths[ids].sum())
            if lost := tokenizer.count_lost(text if learn is None else conversations.plain_text(text)):
                counts["bytes_without_token"] += lost
            if learn is not None:
                counts["learnt_tokens"] += int(learn.sum())
                counts["learnt_bytes"] += int(tokenizer.byte_lengths[ids[learn]].sum())
            tally.lengths[len(ids).bit_length()] += 1
    tally.files = train.close() | val.close()
    return tally


def _encode(
    plan: PreparePlan, tokenizer: Tokenizer, documents: list[str], tally: Tally
) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """Yield each document with its ids, and of a conversation also what of it is learnt; count what is left out."""
    if not plan.chat_template:
        yield from ((text, ids, None) for text, ids in zip(documents, tokenizer.encode_all(documents), strict=True))
        return
    template = load_template_of(plan.tokenizer)
    for text in documents:
        found = conversations.encode_conversation(text, tokenizer, template, plan.most_tokens)
        if isinstance(found, str):
            tally.dropped[found] += 1
        else:
            ids, learn, is_cut = found
            tally.cut += is_cut
            yield text, ids, learn


def sign_unit(plan: PreparePlan, unit: Unit) -> Tally:
    """Write the hashes that duplicates are found by, for one unit of work; return what it holds."""
    tally = Tally()
    counts = tally.splits["train"]

    def documents() -> Iterator[tuple[int, str]]:
        for position, text, _ in _clean_documents(plan, unit, tally):
            counts["documents"] += 1
            yield position, text

    for kind, content in cleaning.sign_documents(documents(), plan.settings, plan.partitions):
        name = duplicates.hashes(unit.name, kind)
        tally.files[name] = plan.output.write_bytes(name, content)
    return tally


def _clean_documents(plan: PreparePlan, unit: Unit, tally: Tally) -> Iterator[tuple[int, str, str]]:
    """Yield (position, text, note) of the documents that no rule drops by themselves; count the others."""
    runs = load_runs(plan.output) if plan.runs else None
    for position, (text, note) in enumerate(read(unit.slice, plan.source, unit.piece)):
        if text is None:
            tally.dropped[note] += 1
            continue
        tally.source_bytes += len(text) if text.isascii() else len(text.encode())
        said = conversations.plain_text(text) if plan.chat_template else text
        reason = EMPTY if not text.strip() else cleaning.reason_to_drop(said, plan.settings)
        if not reason and runs is not None and (task := runs.find(said)):
            reason = REASON + task
        if reason:
            tally.dropped[reason] += 1
        else:
            yield position, text, note


@ray.remote(num_cpus=1)
def _merge(plan: PreparePlan, name: str, parts: list[str]) -> tuple[str, FileRecord]:
    """Join small Parquet files into one with row groups of the usual size."""
    writer = ShardWriter(plan.output, name, load_tokenizer_of(plan.tokenizer), conversations=bool(plan.chat_template))
    for part in parts:
        for batch in pq.ParquetFile(pa.BufferReader(plan.output.read_bytes(part))).iter_batches():
            if plan.chat_template:
                for document, learn in zip(batch.column("tokens"), batch.column("learn"), strict=True):
                    writer.add(document.values.to_numpy(), learn.values.to_numpy(zero_copy_only=False))
                continue
            for document in batch.column("tokens"):
                writer.add(document.values.to_numpy()[:-1])
    return next(iter(writer.close().items()))


def load_tokenizer_of(artifact: Artifact) -> Tokenizer:
    """Load an artifact's tokenizer, once per process."""
    return _load(artifact.url, artifact)[0]


def load_template_of(artifact: Artifact) -> ChatTemplate:
    """The chat template that came with an artifact's tokenizer from a start, or ours."""
    return _load(artifact.url, artifact)[1]


@lru_cache(maxsize=2)
def _load(url: str, artifact: Artifact) -> tuple[Tokenizer, ChatTemplate]:
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = load_tokenizer(folder := artifact.download(Path(temporary)))
        return tokenizer, load_template(folder) or open_template(CHAT_TEMPLATE, tokenizer.template_names)


PREPARE = Task("prepare", ".unit.json", prepare_unit)
SIGN = Task("clean", ".signed.json", sign_unit)
get_ready = partial(start_ahead, PREPARE)
