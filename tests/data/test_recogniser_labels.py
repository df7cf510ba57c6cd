"""A recogniser's labels in training batches: the stored ones are the online ones, and what does not fit is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lhotse import CutSet
from lhotse.utils import fastcopy
from micro_corpus import WORDS, label_info, read_cuts, write_corpus, write_labels
from recogniser_toys import (
    CPU,
    KINDS,
    kind_configs,
    recogniser_config,
    training_config,
    write_recogniser,
)

from icefall_kd.config import AugmentConfig, DataConfig
from icefall_kd.data.datamodule import DataModule
from icefall_kd.errors import DataError
from icefall_kd.labels.extract import extract_layers
from icefall_kd.labels.keys import label_key
from icefall_kd.labels.recogniser import packing_error
from icefall_kd.labels.store import LabelStore
from icefall_kd.systems import build_system
from icefall_kd.systems.base import LabelSpec
from icefall_kd.teachers.recogniser import RecogniserOptions, RecogniserTeacher
from icefall_kd.text.tokenizer import Tokenizer

TOP_K, NBEST, BEAM = 4, 2, 3


def load_teacher(exp_dir) -> RecogniserTeacher:
    options = RecogniserOptions(top_k=TOP_K, nbest_size=NBEST, beam_size=BEAM)
    return RecogniserTeacher.load(exp_dir, CPU, options=options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return a corpus with a recogniser's exp_dir, and label sets of all kinds of most of its utterances."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    exp_dir = write_recogniser(folder / "teacher", Tokenizer.load(folder / "lang_char"))
    teacher = load_teacher(exp_dir)
    cuts = folder / "fbank/cuts_train.jsonl.gz"
    extract_layers(kind_configs(cuts, folder / "labels"), teacher)
    CutSet.from_cuts(list(CutSet.from_file(cuts))[:-1]).to_file(folder / "most.jsonl.gz")
    extract_layers(kind_configs(folder / "most.jsonl.gz", folder / "most"), teacher)
    return folder


def data_module(corpus, labels="labels", kinds=KINDS, manifests="fbank", lang="lang_char", **options) -> DataModule:
    config = DataConfig(manifest_dir=corpus / manifests, lang_dir=corpus / lang, num_workers=0, max_duration=4.0)
    specs = [LabelSpec(name=kind, kind=kind, path=str(corpus / labels / kind)) for kind in kinds]
    tokenizer = Tokenizer.load(corpus / lang)
    return DataModule(config, AugmentConfig(spec_aug=False), tokenizer, label_specs=specs, transducer=False, **options)


def without_dropout():
    config = recogniser_config("mlm", dropout=0.0)
    return replace(config, attention=replace(config.attention, decoder_dropout=0.0))


SCALES = {f"{name}_scale": 1.0 for name in ("ctc_kd", "token_kd", "nbest_ctc", "nbest_token", "encoder_kd")}


def test_stored_labels_are_the_online_ones(corpus):
    teacher = load_teacher(corpus / "teacher")
    seen = 0
    for batch in data_module(corpus, with_audio=True).train_batches(1):
        seen += len(batch)
        online = teacher.labels(batch, KINDS)
        for kind in ("ctc_posteriors", "token_posteriors"):
            stored, made = batch.labels[kind], online[kind]
            assert torch.equal(stored.lens, made.lens)
            assert (stored.probs - made.probs).abs().max() < 2e-3 and (stored.rest - made.rest).abs().max() < 2e-3
            gaps = stored.probs - torch.cat([stored.probs[..., 1:], stored.rest.unsqueeze(2)], dim=2)
            clear = torch.cat([torch.ones_like(gaps[..., :1]), gaps[..., :-1]], dim=2).abs().minimum(gaps.abs()) > 1e-4
            clear &= stored.probs > 1e-4  # classes whose ranks noise does not decide
            assert torch.equal(stored.ids[clear], made.ids[clear])
            inside = torch.arange(clear.shape[1]) < stored.lens.unsqueeze(1)
            assert clear[inside][:, :2].float().mean() > 0.8
        assert torch.equal(batch.labels["token_posteriors"].lens, batch.y_lens)
        stored, made = batch.labels["nbest"], online["nbest"]
        assert torch.equal(stored.tokens, made.tokens) and torch.equal(stored.lens, made.lens)
        assert torch.allclose(stored.scores, made.scores, atol=1e-3)
        assert torch.allclose(batch.labels["embeddings"].values, online["embeddings"].values, atol=1e-5)
    assert seen == 12


def test_a_student_has_the_same_losses_from_stored_and_online_labels(corpus):
    sizes = {"kd_top_k": TOP_K, "kd_nbest": NBEST, "kd_beam_size": BEAM}
    online = training_config(corpus / "teacher", corpus / "lang_char", without_dropout(), **SCALES, **sizes)
    folders = [corpus / "labels" / kind for kind in KINDS]
    stored = replace(online, kd=replace(online.kd, teacher_labels="stored", label_dir=folders))
    vocab_size = Tokenizer.load(corpus / "lang_char").vocab_size
    systems = {}
    for name, config in (("online", online), ("stored", stored)):
        torch.manual_seed(3)
        systems[name] = build_system(config, vocab_size).train()
    assert {s.kind for s in systems["stored"].label_specs} == set(KINDS) and not systems["stored"].needs_audio
    for batch in data_module(corpus, with_audio=True).train_batches(1):
        terms = {}
        for name, system in systems.items():
            torch.manual_seed(4)  # the masks
            terms[name] = system.losses(batch, step=0).terms
        assert terms["online"].keys() == terms["stored"].keys() and len(terms["stored"]) == 7
        for name, made in terms["online"].items():
            made, kept = (float(t[name].value.detach()) / t[name].count for t in (terms["online"], terms["stored"]))
            if name in ("ctc_kd_loss", "token_kd_loss"):
                # Each is within the bound of the exact loss; the student's probabilities are above e^-20.
                assert abs(made - kept) <= 2 * float(packing_error(torch.tensor(made), torch.zeros(()), TOP_K, -20.0))
            else:
                assert made == pytest.approx(kept, rel=1e-3)


def test_utterances_without_labels_have_none_and_made_up_ones_in_the_memory_scan(corpus):
    with pytest.raises(DataError, match="11 matched, 1 missing"):
        data_module(corpus, "most")
    data = data_module(corpus, "most", min_coverage=0.9)
    lacking = list(CutSet.from_file(corpus / "fbank/cuts_train.jsonl.gz"))[-1].id
    (batch,) = (batch for batch in data.train_batches(1) if lacking in batch.ids)
    i = batch.ids.index(lacking)
    for kind in ("ctc_posteriors", "token_posteriors", "embeddings"):
        assert batch.labels[kind].lens[i] == 0
    assert (batch.labels["nbest"].scores[i] == -torch.inf).all()
    others = [j for j in range(len(batch)) if j != i]
    assert all((batch.labels["token_posteriors"].lens == batch.y_lens)[others])
    torch.manual_seed(1)
    config = training_config(corpus / "teacher", corpus / "lang_char", without_dropout(), **SCALES)
    folders = [corpus / "most" / kind for kind in KINDS]
    config = replace(config, kd=replace(config.kd, teacher_labels="stored", label_dir=folders))
    system = build_system(config, Tokenizer.load(corpus / "lang_char").vocab_size).train()
    assert torch.isfinite(system.losses(batch, 0).total)
    for batch in data.worst_batches():
        frames = (batch.x_lens - 1) // 2
        assert torch.equal(batch.labels["ctc_posteriors"].lens, (frames - 1) // 2)
        assert torch.equal(batch.labels["token_posteriors"].lens, batch.y_lens)
        for kind in ("ctc_posteriors", "token_posteriors"):
            labels = batch.labels[kind]
            inside = torch.arange(labels.ids.shape[1]) < labels.lens.unsqueeze(1)
            whole = labels.probs.sum(dim=2) + labels.rest
            assert torch.allclose(whole[inside], torch.ones(int(inside.sum())), atol=1e-6)
        assert torch.isfinite(batch.labels["nbest"].scores[:, 0]).all()
        assert torch.isfinite(system.losses(batch, 0).total)


def test_labels_of_other_tokens_are_refused_with_both_hashes(corpus):
    other = Tokenizer.train_char([*WORDS, "zzz"])
    other.save(corpus / "lang_other")
    own = Tokenizer.load(corpus / "lang_char")
    for kind in KINDS[:3]:
        with pytest.raises(DataError, match=f"{kind} holds token ids of tokenizer {own.hash}, .* is {other.hash}"):
            data_module(corpus, kinds=[kind], lang="lang_other")
    data_module(corpus, kinds=["embeddings"], lang="lang_other")  # which know nothing of tokens


def test_another_kind_than_the_system_wants_is_refused(corpus):
    spec = LabelSpec(name="nbest", kind="nbest", path=str(corpus / "labels/ctc_posteriors"))
    config = DataConfig(manifest_dir=corpus / "fbank", num_workers=0)
    with pytest.raises(DataError, match="kind is 'ctc_posteriors', expected 'nbest'"):
        DataModule(config, AugmentConfig(), Tokenizer.load(corpus / "lang_char"), label_specs=[spec])


def test_embeddings_at_another_frame_rate_are_refused_by_the_system(corpus, tmp_path):
    info = label_info(kind="embeddings", dtype="float16", width=8)  # of HuBERT's frames
    write_labels(tmp_path / "hubert", read_cuts(corpus), info)
    config = training_config(corpus / "teacher", corpus / "lang_char", without_dropout(), encoder_kd_scale=1.0)
    config = replace(config, kd=replace(config.kd, teacher_labels="stored", label_dir=[tmp_path / "hubert"]))
    (spec,) = build_system(config, 14).label_specs
    with pytest.raises(DataError, match="frame_formula is"):
        LabelStore(spec.path, expect=spec.expect)


def test_token_posteriors_of_a_changed_transcript_are_refused(corpus):
    cuts = list(read_cuts(corpus))
    supervision = cuts[0].supervisions[0]
    cuts[0] = fastcopy(cuts[0], supervisions=[fastcopy(supervision, text="one four")])
    (corpus / "changed").mkdir()
    CutSet.from_cuts(cuts).to_file(corpus / "changed/cuts_train.jsonl.gz")
    read_cuts(corpus, "dev").to_file(corpus / "changed/cuts_dev.jsonl.gz")
    key = label_key(cuts[0]).replace("|", r"\|")
    message = rf"{cuts[0].id} \(key {key}\): .* along 'o n e . t w o', its transcript is 'o n e . f o u r'"
    with pytest.raises(DataError, match=message):
        list(data_module(corpus, manifests="changed", kinds=["token_posteriors"]).train_batches(1))
    list(data_module(corpus, manifests="changed", kinds=["ctc_posteriors", "nbest"]).train_batches(1))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_labels_of_other_audio_or_damaged_ones_are_refused(corpus, tmp_path, kind):
    cuts, store = list(read_cuts(corpus)), LabelStore(corpus / "labels" / kind)
    values = {label_key(cut): store.get(label_key(cut)) for cut in cuts}
    if kind == "ctc_posteriors":  # whose rows could not be written for other audio
        values = {key: np.concatenate([rows, rows[-1:]]) for key, rows in values.items()}
    write_labels(tmp_path / kind, cuts, store.info, values=values, extra=640)
    with pytest.raises(DataError, match=r"label frames, the teacher's formula gives .* of other audio"):
        list(data_module(corpus, tmp_path, [kind]).train_batches(1))
    # Damaged behind the back of the checksum.
    folder = tmp_path / "damaged"
    write_labels(folder / kind, cuts, store.info, values={label_key(c): store.get(label_key(c)) for c in cuts})
    file = next((folder / kind).glob("*.safetensors"))
    content, rows = file.read_bytes(), LabelStore(folder / kind).shard(0).view(0).tobytes()
    assert content.count(rows) == 1
    spoilt = b"\xff\xff" + rows[2:] if kind != "token_posteriors" else rows[:2] + b"\xff\xff" + rows[4:]
    file.write_bytes(content.replace(rows, spoilt))
    assert LabelStore(folder / kind).verify()
    with pytest.raises(DataError, match=r"utterance \S+ \(key \S+\): label set .* has .*; extract it again"):
        list(data_module(corpus, folder, [kind]).train_batches(1))
