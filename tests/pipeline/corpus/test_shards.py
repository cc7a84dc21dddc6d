"""Shards are decoded once, checked, and kept within bounds; what is wrong with one is said with its name."""

import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import Artifact, FileRecord, record_file
from pipeline.corpus import shards as shards_module
from pipeline.corpus.shards import TokenCache, data_digest, open_shards

DOCUMENTS = [[5, 6, 7, 0], [0], [9] * 30 + [0], [4, 0]]
FLAT = [token for document in DOCUMENTS for token in document]


def write_artifact(folder: Path, tables: list[pa.Table], records: dict[str, FileRecord] | None = None) -> Artifact:
    files = {}
    for index, table in enumerate(tables):
        path = folder / "train" / f"{index:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=2)
        files[f"train/{path.name}"] = record_file(path)
    artifact = Artifact(str(folder), "prepare", "0" * 20)
    artifact.commit({}, files | (records or {}))
    return artifact


def shard_of(documents: list[list[int]], value_type: pa.DataType | None = None) -> pa.Table:
    return pa.table({"id": range(len(documents)), "tokens": pa.array(documents, pa.list_(value_type or pa.uint16()))})


def distinct_shards(count: int) -> list[pa.Table]:
    return [shard_of([[index + 1] * 49 + [0]] * 2) for index in range(count)]


@pytest.mark.parametrize("value_type", [pa.uint16(), pa.uint32()])
def test_a_shard_is_decoded_once_into_flat_tokens(tmp_path: Path, value_type: pa.DataType) -> None:
    artifact = write_artifact(tmp_path / "shards", [shard_of(DOCUMENTS, value_type)])
    [shard] = open_shards(artifact, "train")
    assert shard.num_tokens == len(FLAT)
    cache = TokenCache(tmp_path / "cache")
    tokens = cache.open(shard)
    assert tokens.tolist() == FLAT
    assert tokens.dtype == str(value_type)
    (Path(artifact.url) / shard.name).unlink()  # from here on the decoded copy is all there is
    assert TokenCache(tmp_path / "cache").open(shard).tolist() == FLAT
    assert sorted(path.suffix for path in cache.folder.iterdir()) == [".lock", f".{value_type}"]


def test_large_lists_are_read_too(tmp_path: Path) -> None:
    table = pa.table({"tokens": pa.array(DOCUMENTS, pa.large_list(pa.uint16()))})
    [shard] = open_shards(write_artifact(tmp_path / "shards", [table]), "train")
    assert TokenCache(tmp_path / "cache").open(shard).tolist() == FLAT


def test_the_data_digest_follows_content(tmp_path: Path) -> None:
    first = open_shards(write_artifact(tmp_path / "a", distinct_shards(2)), "train")
    again = open_shards(write_artifact(tmp_path / "b", distinct_shards(2)), "train")
    assert data_digest(first) == data_digest(again) != data_digest(first[:1])


# What is wrong is named before training starts on it.


def test_an_unfinished_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finished; run the prepare stage first"):
        open_shards(Artifact(str(tmp_path / "nothing"), "prepare", "0" * 20), "train")


def test_a_missing_shard_is_named_at_once(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "shards", distinct_shards(3))
    record = record_file(tmp_path / "shards/train/00001.parquet")
    (tmp_path / "shards/train/00001.parquet").unlink()
    with pytest.raises(ValueError, match=rf"train/00001.parquet is missing; .* sha256 {record.sha256}"):
        open_shards(artifact, "train")


def test_a_shard_that_goes_missing_later_is_named(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "shards", distinct_shards(1))
    [shard] = open_shards(artifact, "train")
    (tmp_path / "shards/train/00000.parquet").unlink()
    with pytest.raises(ValueError, match=rf"train/00000.parquet is missing; .* sha256 {shard.record.sha256}"):
        TokenCache(tmp_path / "cache").open(shard)


def test_a_shard_cut_short_is_named_at_once(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "shards", distinct_shards(2))
    path = tmp_path / "shards/train/00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train/00001.parquet is damaged: it has \d+ bytes, .*\(sha256 [0-9a-f]{64}"):
        open_shards(artifact, "train")


def test_a_shard_with_one_wrong_byte_is_named_with_both_digests(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "shards", distinct_shards(1))
    path = tmp_path / "shards/train/00000.parquet"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    [shard] = open_shards(artifact, "train")
    cache = TokenCache(tmp_path / "cache")
    expected = (
        rf"train/00000.parquet is damaged: its digest is {record_file(path).sha256[:12]}.*{shard.record.sha256[:12]}"
    )
    with pytest.raises(ValueError, match=expected):
        cache.open(shard)
    assert [path.suffix for path in cache.folder.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (pa.table({"text": ["no tokens"]}), "is not a token shard"),
        (pa.table({"tokens": [1, 2, 3]}), "is not a token shard"),
        (shard_of(DOCUMENTS, pa.int64()), "holds tokens as int64; a shard has uint16 or uint32"),
        (shard_of([*DOCUMENTS, [1, 2]]), "a document that does not end with the end-of-text token"),
        (shard_of([*DOCUMENTS, []]), "a document without a token"),
    ],
)
def test_what_is_not_a_shard_is_named(tmp_path: Path, table: pa.Table, complaint: str) -> None:
    artifact = write_artifact(tmp_path / "shards", [table])
    with pytest.raises(ValueError, match=rf"train/00000.parquet .*{complaint}"):
        TokenCache(tmp_path / "cache").open(open_shards(artifact, "train")[0])


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "shards/train/00000.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PAR1 but no more than that PAR1")
    artifact = write_artifact(tmp_path / "shards", [], {"train/00000.parquet": record_file(path)})
    with pytest.raises(ValueError, match=r"train/00000.parquet .*is not a token shard"):
        open_shards(artifact, "train")


# The cache.


@pytest.mark.parametrize("smallest_mapped", [0, 2**20])
def test_the_cache_evicts_what_was_used_longest_ago(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smallest_mapped: int
) -> None:
    monkeypatch.setattr(shards_module, "SMALLEST_MAPPED_BYTES", smallest_mapped)
    shards = open_shards(write_artifact(tmp_path / "shards", distinct_shards(4)), "train")
    cache = TokenCache(tmp_path / "cache", max_bytes=3 * shards[0].decoded_bytes)
    mapped = [cache.open(shard) for shard in shards[:3]]
    for age, shard in enumerate((shards[1], shards[2], shards[0])):
        os.utime(cache._path(shard), (1000 + age, 1000 + age))
    cache.open(shards[3])
    left = [shard for shard in shards if cache._path(shard).exists()]
    assert left == [shards[0], shards[2], shards[3]]
    assert mapped[1][0] == 2  # evicted, and still readable for who has it open
    assert cache.open(shards[1])[0] == 2  # and decoded again for who asks again


def test_small_shards_keep_no_file_open(tmp_path: Path) -> None:
    shards = open_shards(write_artifact(tmp_path / "shards", distinct_shards(30)), "train")
    cache = TokenCache(tmp_path / "cache")
    before = len(os.listdir("/proc/self/fd"))
    opened = [cache.open(shard) for shard in shards]
    assert len(os.listdir("/proc/self/fd")) == before
    assert [array[0] for array in opened] == list(range(1, 31))


def test_many_small_shards_do_not_list_the_folder_each_and_share_few_lock_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_shards(write_artifact(tmp_path / "shards", distinct_shards(300)), "train")
    listings = []
    list_folder = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: listings.append(path) or list_folder(path))
    roomy = TokenCache(tmp_path / "roomy")
    full = TokenCache(tmp_path / "full", max_bytes=100 * shards[0].decoded_bytes)
    for cache, most_listings in ((roomy, 1), (full, 150)):
        listings.clear()
        for shard in shards:
            cache.open(shard)
        assert len(listings) <= most_listings
        assert len(list(cache.folder.glob("*.lock"))) <= 256
    assert 80 <= len(list(full.folder.glob("*.uint16"))) <= 100


def test_what_a_killed_process_left_half_made_is_cleared_away(tmp_path: Path) -> None:
    shards = open_shards(write_artifact(tmp_path / "shards", distinct_shards(2)), "train")
    cache = TokenCache(tmp_path / "cache")
    abandoned = cache.folder / ("f" * 64 + ".parquet.partial")
    abandoned.write_bytes(b"half a download")
    half = cache._path(shards[0]).with_name(cache._path(shards[0]).name + ".partial")
    half.write_bytes(b"half")
    assert cache.open(shards[0])[0] == 1
    assert not abandoned.exists()
    assert not half.exists()


def test_a_decoded_file_of_the_wrong_size_is_made_anew(tmp_path: Path) -> None:
    [shard] = open_shards(write_artifact(tmp_path / "shards", distinct_shards(1)), "train")
    cache = TokenCache(tmp_path / "cache")
    cache._path(shard).write_bytes(b"\0\0")
    assert len(cache.open(shard)) == shard.num_tokens


def test_a_cache_folder_that_was_cleaned_away_is_made_again(tmp_path: Path) -> None:
    shards = open_shards(write_artifact(tmp_path / "shards", distinct_shards(2)), "train")
    cache = TokenCache(tmp_path / "cache")
    cache.open(shards[0])
    for path in cache.folder.iterdir():
        path.unlink()
    cache.folder.rmdir()
    assert cache.open(shards[1])[0] == 2


def test_many_threads_may_ask_for_the_same_shards(tmp_path: Path) -> None:
    shards = open_shards(write_artifact(tmp_path / "shards", distinct_shards(5)), "train")
    cache = TokenCache(tmp_path / "cache", max_bytes=2 * shards[0].decoded_bytes)  # evicting all the while
    wrong = []

    def ask() -> None:
        for _ in range(5):
            for index, shard in enumerate(shards):
                if not (np.unique(cache.open(shard)) == [0, index + 1]).all():
                    wrong.append(index)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_full_disk_is_said_in_one_sentence(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    [shard] = open_shards(write_artifact(tmp_path / "shards", distinct_shards(1)), "train")
    cache = TokenCache(tmp_path / "cache")
    half = cache._path(shard).with_name(cache._path(shard).name + ".partial")

    class FullDisk(TokenCache):
        def _make_room(self, wanted_bytes: int) -> None:
            half.symlink_to("/dev/full")

    with pytest.raises(ValueError, match=r"The disk of the token cache .* is full; make room there"):
        FullDisk(tmp_path / "cache").open(shard)
    assert not half.is_symlink()
