"""The guards and the resume of a training with real data: labels, features, distillation."""

import pytest
import torch
from lhotse import CutSet
from lhotse.cut import MonoCut
from lhotse.utils import fastcopy
from micro_corpus import read_cuts, write_corpus, write_labels

from icefall_kd.config import AugmentConfig, DataConfig
from icefall_kd.data.batch import IGNORE
from icefall_kd.data.datamodule import DataModule
from icefall_kd.errors import ConfigError
from icefall_kd.labels.keys import label_key
from icefall_kd.labels.store import LabelStore
from icefall_kd.recipe import train_main
from icefall_kd.runtime.files import read_json
from icefall_kd.systems.base import LabelSpec
from icefall_kd.systems.mvq import MvqSystem
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train import guards

OPTIONS = """
--encoder-size tiny --num-encoder-layers 2 --encoder-dim 16 --num-heads 2 --feedforward-dim 16 --cnn-kernel 3
--decoder-dim 8 --joiner-dim 8 --max-duration 4 --num-workers 0 --num-epochs 1 --device cpu --num-threads 1
--train-parts train --valid-parts dev --kd mvq --min-coverage 0.5 --max-steps 1
""".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus whose longest utterances have no labels."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    cuts = sorted(read_cuts(folder), key=lambda c: c.duration)
    write_labels(folder / "labels", cuts[:8])
    return folder


def command(corpus, exp_dir):
    paths = {"manifest-dir": "fbank", "lang-dir": "lang_char", "label-dir": "labels"}
    found = [word for name, path in paths.items() for word in (f"--{name}", str(corpus / path))]
    return [*OPTIONS, *found, "--exp-dir", str(exp_dir)]


def test_the_scan_computes_the_label_loss_of_every_frame(corpus, tmp_path, monkeypatch):
    seen, losses, scan = [], MvqSystem.losses, guards.scan_worst_batches

    def noted(self, batch, step):
        terms = losses(self, batch, step)
        term = terms.terms.get("kd_codebook_loss")
        seen.append((len(batch), max(batch.durations), term.count if term else 0, terms.frames))
        return terms

    def only_the_scan(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(MvqSystem, "losses", noted)
            scan(*args, **options)

    monkeypatch.setattr(guards, "scan_worst_batches", only_the_scan)
    assert train_main(command(corpus, tmp_path)) == 0
    assert len(seen) == 3
    assert all(labelled == frames > 0 for *_, labelled, frames in seen), seen
    store = LabelStore(corpus / "labels")
    longest_labelled = max(c.duration for c in read_cuts(corpus) if label_key(c) in store)
    assert max(duration for _, duration, *_ in seen) > longest_labelled, "no batch of the scan lacked labels"


def test_labels_that_do_not_fit_the_memory_stop_the_scan(corpus, tmp_path, monkeypatch):
    def hungry(self, x, codes):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    monkeypatch.setattr("icefall_kd.losses.codebook.CodebookLoss.forward", hungry)
    with pytest.raises(ConfigError, match=r"out of memory in the scan .* try --max-duration"):
        train_main(command(corpus, tmp_path))
    dump = read_json(tmp_path / "oom-scan-rank0.json")["batch"]
    assert dump["labels"]["kd"][0] == len(dump["ids"]) and dump["labels"]["kd"][1] > 0
    assert not list(tmp_path.glob("*.pt"))


def test_labels_are_made_up_for_the_scan_alone(corpus, tmp_path):
    data = DataModule(
        DataConfig(
            manifest_dir=corpus / "fbank", train_parts=["train"], valid_parts=["dev"], max_duration=4.0, num_workers=0
        ),
        AugmentConfig(),
        Tokenizer.load(corpus / "lang_char"),
        label_specs=[LabelSpec(name="kd", kind="codebook_indexes", path=str(corpus / "labels"))],
        min_coverage=0.5,
    )
    info = LabelStore(corpus / "labels").info
    cuts = {c.id: c for c in read_cuts(corpus)}
    for batch in data.worst_batches():
        wanted = [info.formula.num_frames(cuts[name].num_samples) for name in batch.ids]
        assert batch.labels["kd"].lens.tolist() == wanted
    unlabelled = [int((b.labels["kd"].lens == 0).sum()) for b in data.train_batches(1)]
    assert sum(unlabelled) == 4
    assert all((b.labels["kd"].values[b.labels["kd"].lens == 0] == IGNORE).all() for b in data.train_batches(1))


def test_at_batch_10000_nothing_of_the_skipped_ones_is_read(corpus, tmp_path, monkeypatch):
    longest = max(read_cuts(corpus), key=lambda c: c.duration)
    # Beginnings of one utterance, each a batch of its own.
    many = (fastcopy(longest, id=f"cut{i}", duration=round(0.5 + 0.00006 * i, 5)) for i in range(10_050))
    CutSet.from_cuts(many).to_file(tmp_path / "cuts_many.jsonl.gz")
    config = DataConfig(
        manifest_dir=tmp_path, train_parts=["many"], valid_parts=[str(corpus / "fbank" / "cuts_dev.jsonl.gz")],
        max_duration=0.4, num_workers=0, num_buckets=100,
    )  # fmt: skip
    data = DataModule(config, AugmentConfig(), Tokenizer.load(corpus / "lang_char"), with_audio=True)
    read = []
    for name in ("load_features", "load_audio"):
        original = getattr(MonoCut, name)
        monkeypatch.setattr(MonoCut, name, lambda cut, f=original, n=name: read.append((n, cut.id)) or f(cut))
    batches = data.train_batches(1, skip=10_000)
    assert read == []
    first = next(batches)
    assert sorted(read) == [("load_audio", first.ids[0]), ("load_features", first.ids[0])]
    assert 1 + sum(1 for _ in batches) == 50 and len(read) == 100
