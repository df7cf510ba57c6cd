"""A Shar holds what its cuts and label sets hold, has the same bytes however it was made, and names what is wrong."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet
from micro_corpus import label_info, read_cuts, write_corpus, write_labels
from shar_toys import content, write_label_sets, write_shar

import icefall_kd.data.shar_export as module
from icefall_kd.data.manifests import write_jsonl
from icefall_kd.data.shar import Shar, StreamedLabels
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.keys import label_key
from icefall_kd.labels.shard import key_hash
from icefall_kd.labels.store import LabelStore, shard_of
from icefall_kd.runtime.files import read_lines, sha256_file


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve utterances at two speeds, two label sets, and their Shar."""
    folder = write_corpus(tmp_path_factory.mktemp("shar"), speeds=("1", "9/10"))
    write_label_sets(folder)
    write_shar(folder)
    return folder


@pytest.fixture
def copied(corpus, tmp_path):
    return shutil.copytree(corpus / "shar", tmp_path / "shar")


def test_it_holds_what_the_cuts_and_the_label_sets_hold(corpus):
    shar = Shar(corpus / "shar")
    cuts = {cut.id: cut for cut in read_cuts(corpus)}
    stores = {field: LabelStore(corpus / field) for field in ("codes", "embeddings")}
    fields = {"codes": "codebook_indexes", "embeddings": "embeddings"}
    assert shar.info.fields == ["features", "recording", "codebook_indexes", "embeddings"] and shar.verify() == []
    seen = []
    for k, row in enumerate(shar.rows):
        some = list(shar.read(k, shar.info.fields))
        assert (row.cuts, row.seconds) == (len(some), pytest.approx(sum(c.duration for c in some)))
        assert row.longest == max(c.duration for c in some)
        for cut in some:
            was = cuts[cut.id]
            seen.append(cut.id)
            key = label_key(was)
            assert label_key(cut) == key and shard_of(key_hash(key), 4) == k
            assert cut.supervisions[0].text == was.supervisions[0].text and cut.num_samples == was.num_samples
            assert np.array_equal(cut.load_features(), was.load_features())
            # 16 bits: exact for recordings of 16 bits, half a step off for what was resampled.
            exact = 0 if key.endswith("|1/1") else 0.5001 / 32768
            assert np.abs(cut.load_audio() - was.load_audio()).max() <= exact
            for name, store in stores.items():
                labels = StreamedLabels(shar, fields[name]).of([cut])
                rows, wanted = labels.get(key, missing_ok=True), store.get(key, missing_ok=True)
                assert (rows is None) == (wanted is None)
                if rows is not None:
                    assert rows.dtype == wanted.dtype and np.array_equal(rows, wanted)
                    assert labels.num_samples(key) == store.num_samples(key)
    assert sorted(seen) == sorted(cuts)
    assert [(shar.coverage(f).matched, shar.coverage(f).missing) for f in fields.values()] == [(24, 0), (22, 2)]


def test_lilcom_is_half_a_step_off_at_most(corpus, tmp_path):
    write_shar(corpus, tmp_path / "shar", store="features", feature_codec="lilcom")
    cuts = {cut.id: cut for cut in read_cuts(corpus)}
    for k in range(4):
        for cut in Shar(tmp_path / "shar").read(k, ["features"]):
            # Half of 2 ** -5, and what float32 rounds.
            assert np.abs(cut.load_features() - cuts[cut.id].load_features()).max() <= 1 / 64 + 1e-5
    bytes_of = [sum(r.files["features"]["bytes"] for r in Shar(p).rows) for p in (tmp_path / "shar", corpus / "shar")]
    assert 2.5 * bytes_of[0] < bytes_of[1]


def test_lhotse_reads_it_by_itself(corpus):
    cuts = CutSet.from_shar(in_dir=corpus / "shar" / "shards")
    assert sorted(cut.id for cut in cuts) == sorted(cut.id for cut in read_cuts(corpus))


def test_what_is_not_written_is_not_read_from_elsewhere(corpus, tmp_path):
    write_shar(corpus, tmp_path / "shar", store="features", label_dir=[])
    for cut in Shar(tmp_path / "shar").read(0, ["features"]):
        assert label_key(cut) and cut.load_features().shape == (cut.num_frames, 80)
        with pytest.raises(Exception, match=r"(?i)shar"):
            cut.load_audio()


def test_jobs_write_the_same_bytes_in_any_order(corpus, tmp_path):
    for job in (2, 0, 1):
        with pytest.raises(DataError, match=r"its export has not ended|holds no shar.json"):
            Shar(tmp_path / "jobs")
        write_shar(corpus, tmp_path / "jobs", job=job, num_jobs=3)
    assert content(tmp_path / "jobs") == content(corpus / "shar")


PLACES = ["_carrying", "_compare", "sha256_file", "atomic_path", "row_file", "_divided", "_finish", "KeyJoin"]


@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_it_goes_on_to_the_same_bytes(corpus, tmp_path, place):
    """The third call of a function ends the process, or the first of those that are called seldom."""
    child = os.fork()
    if child == 0:
        calls, original = [], getattr(module, place)

        def fatal(*args, **options):
            calls.append(1)
            if len(calls) == 3 or place in ("_divided", "_finish", "KeyJoin"):
                os._exit(9)
            return original(*args, **options)

        setattr(module, place, fatal)
        try:
            write_shar(corpus, tmp_path / "shar")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    write_shar(corpus, tmp_path / "shar")
    assert content(tmp_path / "shar") == content(corpus / "shar")


def test_a_whole_shar_is_left_alone_and_a_damaged_shard_is_written_again(corpus, copied, monkeypatch):
    before = content(copied)
    written = []
    original = module._write_shard
    monkeypatch.setattr(module, "_write_shard", lambda path, k, *args: written.append(k) or original(path, k, *args))
    write_shar(corpus, copied)
    assert written == []
    (copied / "shards" / "codebook_indexes.000002.tar").unlink()
    write_shar(corpus, copied)
    assert written == [2] and content(copied) == before


@pytest.mark.parametrize("fault", ["shorter", "flipped", "missing", "one member less"])
def test_damage_is_named(copied, fault):
    file = copied / "shards" / "codebook_indexes.000001.tar"
    raw = bytearray(file.read_bytes())
    if fault == "missing":
        file.unlink()
    elif fault == "flipped":
        raw[700] ^= 1  # of the first array
        file.write_bytes(raw)
    else:
        file.write_bytes(raw[: -2048 if fault == "shorter" else 1024 * 2])
    shar = Shar(copied)
    (problem,) = shar.verify()
    assert str(file) in problem and "run the export again" in problem
    if fault != "flipped":  # which only the checksum tells
        with pytest.raises(DataError, match=r"codebook_indexes.000001.tar (has|is missing)"):
            list(shar.read(1, ["codebook_indexes"]))
        assert list(shar.read(1, ["features"]))  # what is not asked for is not missed


@pytest.mark.parametrize("name", ["cuts.000001.jsonl.gz", "features.000001.tar"])
def test_files_that_end_early_are_not_taken_for_shorter_shards(copied, name):
    file = copied / "shards" / name
    rows = [json.loads(line) for line in (copied / "shards.jsonl").read_text().splitlines()]
    for cut_off in (0.5, 0.9):
        raw = file.read_bytes()
        file.write_bytes(raw[: int(cut_off * len(raw))])
        for entry in rows[1]["files"].values():
            if entry["name"] == name:
                entry["bytes"] = file.stat().st_size  # as if the size had not been looked at
        (copied / "shards.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(DataError, match=r"shard 1 .* (is damaged behind cut|ends after)"):
            list(Shar(copied).read(1, ["features"]))


def altered(shar, number, change_row, without):
    """Change the row of the first cut of a shard, and take its data out of the tar file of a field."""
    cuts, tar = shar / f"shards/cuts.{number:06d}.jsonl.gz", shar / f"shards/{without}.{number:06d}.tar"
    first, *others = [json.loads(line) for line in read_lines(cuts)]
    change_row(first)
    write_jsonl(cuts, [first, *others])
    kept = io.BytesIO()
    with tarfile.open(tar) as old, tarfile.open(fileobj=kept, mode="w") as new:
        for member in old:
            data, name = old.extractfile(member).read(), Path(member.name)
            if name.stem == first["id"]:
                member.name, member.size = str(name.with_suffix(".nometa" if name.suffix == ".json" else ".nodata")), 0
                data = b""
            new.addfile(member, io.BytesIO(data))
    tar.write_bytes(kept.getvalue())
    rows = [json.loads(line) for line in (shar / "shards.jsonl").read_text().splitlines()]
    for entry in rows[number]["files"].values():
        found = shar / "shards" / entry["name"]
        entry |= {"bytes": found.stat().st_size, "sha256": sha256_file(found)}
    (shar / "shards.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_of_somebody_else_run_nothing(copied, tmp_path):
    marks = [tmp_path / "ran", tmp_path / "read"]

    def command(row):
        source = {"type": "command", "channels": [0], "source": f"touch {marks[0]}"}
        row["recording"]["sources"] = [source]

    def pickled(row):
        row["custom"]["codebook_indexes"]["storage_type"] = "memory_raw"

    def pipe(row):
        row["features"] |= {"storage_type": "lilcom_chunky", "storage_path": f"pipe:touch {marks[1]}"}

    faults = [(command, "recording"), (pickled, "codebook_indexes"), (pipe, "features")]
    for number, (fault, field) in enumerate(faults):
        altered(copied, number, fault, field)
        with pytest.raises(DataError, match=rf"shard {number} .*cuts.00000{number}.jsonl.gz is damaged or unsafe"):
            for cut in Shar(copied).read(number, Shar(copied).info.fields):
                cut.load_audio(), cut.load_features(), StreamedLabels(Shar(copied), field).of([cut])
    assert Shar(copied).verify() == [] and not any(mark.exists() for mark in marks)
    altered(copied, 3, lambda row: None, "recording")  # no data where there was some: what the row names is not there
    with pytest.raises(Exception, match=r"(?i)shar"):
        next(Shar(copied).read(3, ["recording"])).load_audio()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"files": {"cuts": {"name": "../cuts", "bytes": 1, "sha256": "0"}}}, "is called '../cuts'"),
        ({"files": {"cuts": {"name": "cuts", "bytes": "1", "sha256": "0"}}}, "a file of shard 2 is"),
        ({"files": {}}, r"has the files \[\]"),
        ({"cuts": 0}, "shard 2 has 0 cuts"),
        ({"seconds": None}, "seconds is 'None'"),
        ({"labelled": {}}, "how many are labelled"),
    ],
)
def test_a_row_that_no_export_writes_is_named(copied, change, told):
    rows = [json.loads(line) for line in (copied / "shards.jsonl").read_text().splitlines()]
    rows[2] |= change
    (copied / "shards.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=rf"shards.jsonl is damaged \(.*{told}.*delete it and run the export again"):
        Shar(copied)


def test_shards_of_another_shar_are_refused(corpus, copied, tmp_path):
    write_shar(corpus, tmp_path / "other", store="features")
    rows = (copied / "shards.jsonl").read_text().splitlines(keepends=True)
    others = (tmp_path / "other" / "shards.jsonl").read_text().splitlines(keepends=True)
    (copied / "shards.jsonl").write_text("".join([*rows[:3], others[3]]))
    with pytest.raises(DataError, match=r"shard 3 is of the Shar .* shards of two exports are mixed"):
        Shar(copied)


def test_another_label_set_is_named_with_both_values(corpus, copied, tmp_path):
    shar = Shar(copied)
    assert shar.field_of(corpus / "codes") == shar.field_of(copied / "labels" / "codebook_indexes")
    other = write_labels(tmp_path / "other", read_cuts(corpus), label_info(layer=7))
    with pytest.raises(DataError, match=r"no labels of the set .*layer is 3 and 7"):
        shar.field_of(other)
    clusters = label_info(kind="clusters", dtype="uint16", width=1, num_codebooks=1)
    with pytest.raises(DataError, match="it holds codebook_indexes as codebook_indexes, embeddings as embeddings"):
        shar.field_of(write_labels(tmp_path / "clusters", [], clusters, num_shards=1))
    with pytest.raises(DataError, match="was made with other options: labels is"):
        write_shar(corpus, copied, label_dir=[other])
    altered = copied / "labels" / "codebook_indexes" / "label_set.json"
    altered.write_text(altered.read_text().replace('"layer": 3', '"layer": 4'))
    with pytest.raises(DataError, match="one of them was altered"):
        Shar(copied)


def test_what_cannot_be_written_is_refused(corpus, tmp_path):
    with pytest.raises(DataError, match=r"does not cover the cuts: 22 matched, 2 missing"):
        write_shar(corpus, tmp_path / "a", min_coverage=1.0)
    with pytest.raises(DataError, match=r"of 500 shards would have none of the 24 cuts"):
        write_shar(corpus, tmp_path / "b", num_shards=500)
    with pytest.raises(DataError, match="no stored features"):
        write_shar(corpus, tmp_path / "c", cuts=[corpus / "manifests" / "cuts_train.jsonl.gz"])
    with pytest.raises(ConfigError, match="with --num-jobs 4 it runs from 0"):
        write_shar(corpus, tmp_path / "d", job=4, num_jobs=4)
    with pytest.raises(DataError, match="names one label set twice"):
        write_shar(corpus, tmp_path / "e", label_dir=[corpus / "codes"] * 2)
