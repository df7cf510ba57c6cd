"""A language model's states in training batches: aligned with the tokens, or left out and counted."""

import logging
import shutil

import numpy as np
import pytest
import torch
from micro_corpus import WORDS, read_cuts, write_corpus
from text_toys import halved_words, text_cuts, write_bert

from icefall_kd.config import AugmentConfig, DataConfig, ExtractTextConfig, LanguageModelConfig
from icefall_kd.data.batch import IGNORE
from icefall_kd.data.datamodule import DataModule
from icefall_kd.errors import DataError
from icefall_kd.labels.extract_text import extract_text_states
from icefall_kd.labels.keys import text_key
from icefall_kd.labels.shard import key_hash
from icefall_kd.labels.store import LabelStore, shard_of
from icefall_kd.labels.text_reading import align_text, coverage
from icefall_kd.labels.text_states import pack_states, unpack_states
from icefall_kd.systems.base import LabelSpec
from icefall_kd.text.alignment import Alignment
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.state import refuse_changed_data

SPEC = {"name": "text_states", "kind": "text_states"}


def extract(cuts, label_dir, plm) -> LabelStore:
    model = LanguageModelConfig(plm=str(plm), plm_device="cpu")
    extract_text_states(ExtractTextConfig(cuts=[cuts], label_dir=label_dir, language_model=model))
    return LabelStore(label_dir)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return a corpus with speed copies, tokenizers of all kinds, and states of all texts and of some."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus"), speeds=("1", "9/10"))
    plm = write_bert(folder / "plm")
    extract(folder / "fbank/cuts_train.jsonl.gz", folder / "states", plm)
    extract(text_cuts(folder / "some.jsonl.gz", WORDS[:3]), folder / "some", plm)
    Tokenizer.train_bpe(WORDS * 3, 24).save(folder / "lang_bpe")
    Tokenizer.of_word_pieces(halved_words(WORDS)).save(folder / "lang_plm")
    return folder


def data_module(corpus, labels="states", lang="lang_char", augment=(), **options) -> DataModule:
    config = DataConfig(manifest_dir=corpus / "fbank", lang_dir=corpus / lang, num_workers=0, max_duration=5.0)
    specs = [LabelSpec(**SPEC, path=str(corpus / labels))]
    options = {"transducer": False, "ctc": False, "label_specs": specs, **options}
    return DataModule(config, AugmentConfig(**dict(augment)), Tokenizer.load(corpus / lang), **options)


@pytest.mark.parametrize("lang", ["lang_char", "lang_bpe", "lang_plm"])
@pytest.mark.parametrize("unit", ["token", "word"])
def test_states_belong_to_the_tokens_of_the_batch(corpus, lang, unit):
    store, seen = LabelStore(corpus / "states"), 0
    for batch in data_module(corpus, lang=lang, text_alignment=unit).train_batches(1):
        labels = batch.labels["text_states"]
        assert labels.values.dtype == torch.float32 and labels.owner.dtype == labels.lens.dtype == torch.int64
        assert labels.owner.shape == (len(batch), int(batch.y_lens.max()) + 1)
        for i, text in enumerate(batch.texts):
            seen += 1
            u, m = int(batch.y_lens[i]) + 1, int(labels.lens[i])
            assert (labels.owner[i, u:] == IGNORE).all() and (labels.values[i, m:] == 0).all()
            owner, (spans, states) = labels.owner[i, :u].tolist(), unpack_states(store.get(text_key(text)))
            assert owner == sorted(owner) and set(owner) == set(range(m)) and owner[-1] > owner[-2]
            assert np.allclose(labels.values[i, m - 1], states[-1])  # the end of the text
            if unit == "token":
                assert owner == list(range(u))
                continue
            assert m == len(text.split()) + 1
            for w, word in enumerate(text.split()):  # the mean over characters, one by one
                start = len(" ".join(text.split()[:w])) + (w > 0)
                rows = [p for c in range(start, start + len(word)) for p, (a, b) in enumerate(spans) if a <= c < b]
                np.testing.assert_allclose(labels.values[i, w], states[rows].mean(axis=0), rtol=1e-5, atol=1e-6)
    assert seen == len(read_cuts(corpus)) == 24


def test_copies_and_equal_texts_share_their_states_and_time_warp_moves_none(corpus):
    assert len(LabelStore(corpus / "states")) == len(set(WORDS))
    data = data_module(corpus, augment={"spec_aug_time_warp_factor": 80})
    found = {}
    for batch in data.train_batches(1):
        labels = batch.labels["text_states"]
        for text, values, n in zip(batch.texts, labels.values, labels.lens.tolist(), strict=True):
            assert torch.equal(found.setdefault(text, values[:n]), values[:n])
        assert not batch.keys  # nothing asks for keys of audio
    assert set(found) == {cut.supervisions[0].text for cut in read_cuts(corpus)}


def test_a_text_without_states_has_none_and_enough_must_have_some(corpus):
    with pytest.raises(DataError, match=r"does not cover the cuts: 3 matched, 5 missing"):
        data_module(corpus, labels="some")
    data, counts = data_module(corpus, labels="some", min_coverage=0.3), {True: 0, False: 0}
    for batch in data.train_batches(1):
        labels = batch.labels["text_states"]
        for i, text in enumerate(batch.texts):
            counts[text in WORDS[:3]] += 1
            if text in WORDS[:3]:
                assert labels.lens[i] == batch.y_lens[i] + 1
            else:
                assert labels.lens[i] == 0 and (labels.owner[i] == IGNORE).all() and not labels.values[i].any()
    assert counts[True] and counts[False]
    assert all(not batch.labels for batch in data.valid_batches())
    for batch in data.worst_batches():  # a look at the memory takes the worst case: all have states
        labels = batch.labels["text_states"]
        assert torch.equal(labels.lens, batch.y_lens + 1)
        assert [o[: n + 1].tolist() for o, n in zip(labels.owner, batch.y_lens.tolist(), strict=True)] == [
            list(range(n + 1)) for n in batch.y_lens.tolist()
        ]


def test_misaligned_texts_are_left_out_whole_counted_and_named(corpus, caplog):
    """States of a language model that dropped a word: the text is left out, its others are not moved."""
    source = LabelStore(corpus / "states")
    folder, writer = corpus / "dropped", LabelStore.create(corpus / "dropped", source.info).writer(0, 1)
    for key in source.keys():
        rows = source.get(key)
        if key == text_key("one two"):
            spans, states = unpack_states(rows)
            rest = [i for i, (a, _) in enumerate(spans) if not 0 <= a < 3]  # without "one"
            rows = pack_states(spans[rest], rows[rest, 2] > 0, torch.from_numpy(states[rest]))
        assert shard_of(key_hash(key), 1) == 0
        writer.add(key, rows, source.num_samples(key))
    writer.finish()
    with caplog.at_level(logging.INFO):
        data = data_module(corpus, labels=folder.name)
    warning = next(r for r in caplog.records if "misaligned" in r.getMessage())
    copies = sum(cut.supervisions[0].text == "one two" for cut in read_cuts(corpus))
    assert warning.levelno == logging.WARNING
    assert f"{24 - copies} of 24 utterances aligned, 0 without states, {copies} misaligned" in warning.getMessage()
    assert "'one two': token 1, 'o', has no piece of the language model" in warning.getMessage()
    wanted = {"unit": "token", "utterances": 24, "aligned": 24 - copies, "missing": 0, "misaligned": copies}
    assert data.text_coverage == wanted
    left_out = 0
    for batch in data.train_batches(1):
        labels = batch.labels["text_states"]
        for text, n, owner, u in zip(batch.texts, labels.lens, labels.owner, batch.y_lens, strict=True):
            left_out += text == "one two"
            assert int(n) == (0 if text == "one two" else int(u) + 1)
            assert (owner == IGNORE).all() == (text == "one two")
    assert left_out == copies > 0


def test_coverage_counts_what_each_token_meets(corpus, caplog):
    """The language model does not know ``one``, and cuts ``two`` behind its first letter."""
    source, texts = LabelStore(corpus / "states"), ["one two", "one"]
    writer = LabelStore.create(corpus / "counted", source.info).writer(0, 1)
    for text, spans in zip(texts, ([(0, 3), (4, 5), (5, 7), (7, 7)], [(0, 3), (3, 3)]), strict=True):
        unknown = np.array([True, *[False] * (len(spans) - 1)])
        writer.add(text_key(text), pack_states(np.array(spans), unknown, torch.ones(len(spans), 16)), 1)
    writer.finish()
    store, tokenizer = LabelStore(corpus / "counted"), Tokenizer.load(corpus / "lang_char")
    # o, n, e share a piece, twice; t and the space before it share one; w and o share one.
    found = coverage(store, [*texts, "one", "no such text"], tokenizer, "token")
    assert (found.utterances, found.missing, found.misaligned, found.aligned) == (4, 1, 0, 3)
    assert (found.units, found.one_to_one, found.several, found.unknown) == (7 + 3 + 3, 0, 0, 3 + 3 + 3)
    assert "13 units: 0.00% with a piece of their own, 100.00% share one, 0.00% have" in str(found)
    assert "69.23% unknown" in str(found)
    words = coverage(store, texts, tokenizer, "word")
    assert (words.units, words.one_to_one, words.several, words.unknown) == (3, 2, 1, 2)
    with caplog.at_level(logging.INFO):
        data_module(corpus, labels="counted", min_coverage=0.1)
    assert next(r for r in caplog.records if "unknown to the" in r.getMessage()).levelno == logging.WARNING


def test_a_training_of_which_no_text_aligns_is_refused(corpus, monkeypatch):
    monkeypatch.setattr(Tokenizer, "pieces", lambda self, text: ["?"])
    with pytest.raises(DataError, match=r"no text of the training aligns .*its tokens do not spell it"):
        data_module(corpus)


def test_a_training_does_not_go_on_with_other_states_in_the_same_folder(corpus):
    label_dir, config = corpus / "replaced", {"cuts": [corpus / "fbank/cuts_train.jsonl.gz"]}

    def state(layer):
        model = LanguageModelConfig(plm=str(corpus / "plm"), plm_device="cpu", plm_layer=layer)
        extract_text_states(ExtractTextConfig(**config, label_dir=label_dir, language_model=model))
        return data_module(corpus, labels="replaced").state()

    before = state(2)
    refuse_changed_data(before, state(2), label_dir)
    shutil.rmtree(label_dir)
    with pytest.raises(DataError, match=r"labels: .*text_states.* -> .*use another --exp-dir"):
        refuse_changed_data(before, state(1), label_dir)


def test_states_of_another_text_under_its_key_are_refused(corpus):
    source = LabelStore(corpus / "states")
    writer = LabelStore.create(corpus / "swapped", source.info).writer(0, 1)
    for text in set(WORDS):
        other = {"one": "four", "four": "one"}.get(text, text)
        writer.add(text_key(text), source.get(text_key(other)), 16000)
    writer.finish()
    with pytest.raises(DataError, match=r"states of [34] characters, the text has [34]; extract it again"):
        data_module(corpus, labels="swapped")


@pytest.mark.parametrize(("change", "said"), [
    (lambda rows: rows[:0], "no row for the end of the text"),
    (lambda rows: rows[::-1], "which are not spans in order with the end behind them"),
    (lambda rows: np.where(np.arange(rows.shape[1]) == 5, np.float16(np.nan).view(np.uint16), rows), "not finite"),
])  # fmt: skip
def test_states_that_became_damaged_are_refused_when_they_are_read(corpus, change, said):
    """The store refuses to write such rows; a disk does not."""
    rows, tokenizer = LabelStore(corpus / "states").get(text_key("one two")), Tokenizer.load(corpus / "lang_char")
    assert isinstance(align_text(tokenizer, "one two", rows, "token", "a set"), Alignment)
    with pytest.raises(DataError, match=rf"^a set: .*{said}; extract it again"):
        align_text(tokenizer, "one two", change(rows), "token", "a set")


def test_workers_make_the_same_batches(corpus):
    one = data_module(corpus)
    config = DataConfig(manifest_dir=corpus / "fbank", lang_dir=corpus / "lang_char", num_workers=1, max_duration=5.0)
    two = DataModule(
        config, AugmentConfig(), one.tokenizer, label_specs=[LabelSpec(**SPEC, path=str(corpus / "states"))], ctc=False
    )
    for a, b in zip(one.train_batches(1), two.train_batches(1), strict=True):
        x, y = a.labels["text_states"], b.labels["text_states"]
        assert torch.equal(x.values, y.values) and torch.equal(x.owner, y.owner) and torch.equal(x.lens, y.lens)
