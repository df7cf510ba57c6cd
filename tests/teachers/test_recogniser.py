"""A recogniser as a teacher: what it says is what its parts say, frozen, and about the right tokens and frames."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from recogniser_toys import CPU, ToySearch, load_teacher, recogniser_config, training_config, write_recogniser
from torch.nn.utils.rnn import pad_sequence

from icefall_kd.cli import config_to_dict
from icefall_kd.config import TeacherConfig, TrainConfig
from icefall_kd.data.batch import LOG_EPS, Batch
from icefall_kd.data.features import FbankExtractor
from icefall_kd.decode.joint_beam import JointBeamSearch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import conv2d_subsampled_len, fbank_num_frames
from icefall_kd.labels.info import RECOGNISER_ROWS
from icefall_kd.losses.posterior_kd import posterior_kd
from icefall_kd.systems import build_system
from icefall_kd.teachers import build_teacher
from icefall_kd.teachers.base import Teacher
from icefall_kd.teachers.recogniser import RecogniserOptions, RecogniserTeacher
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.average import load_trained
from icefall_kd.train.checkpoint import load_checkpoint, save_checkpoint

LENGTHS = [16000, 8000, 12345, 16079]
TEXTS = ["ONE TWO", "THREE", "TWO", "ONE"]
KINDS = (*RECOGNISER_ROWS, "embeddings")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_char(["ONE TWO", "THREE FOUR"])


@pytest.fixture(scope="module")
def exp_dir(tmp_path_factory, tokenizer):
    return write_recogniser(tmp_path_factory.mktemp("recogniser"), tokenizer)


@pytest.fixture(scope="module")
def teacher(exp_dir):
    return load_teacher(exp_dir)


@pytest.fixture(scope="module")
def batch(tokenizer):
    generator = torch.Generator().manual_seed(3)
    waves = [0.1 * torch.randn(n, generator=generator) for n in LENGTHS]
    features = [FbankExtractor().extract(wave) for wave in waves]
    tokens = [torch.tensor(tokenizer.encode(text)) for text in TEXTS]
    return replace(
        Batch.from_audio(waves),
        features=pad_sequence(features, batch_first=True, padding_value=LOG_EPS),
        x_lens=torch.tensor([len(x) for x in features]),
        texts=TEXTS,
        y=pad_sequence(tokens, batch_first=True),
        y_lens=torch.tensor([len(t) for t in tokens]),
    )


@pytest.fixture(scope="module")
def model(exp_dir):
    """Return the model of a checkpoint that has no epoch before it, loaded by hand."""
    config = recogniser_config()
    system = build_system(config, 14, inference=True)
    system.load_state_dict(load_checkpoint(exp_dir / "epoch-1.pt")["model"])
    return system.eval().model


@torch.no_grad()
def test_labels_are_what_the_parts_of_the_model_say(exp_dir, batch, model, tokenizer):
    assert tokenizer.vocab_size == 14
    teacher = load_teacher(exp_dir, options=RecogniserOptions(top_k=3, nbest_size=2))
    assert isinstance(teacher, Teacher) and teacher.dim == 32
    labels = teacher.labels(batch, KINDS)
    out = model.encoder(batch.features, batch.x_lens)
    frames = [conv2d_subsampled_len(fbank_num_frames(n)) for n in LENGTHS]
    assert labels["embeddings"].lens.tolist() == labels["ctc_posteriors"].lens.tolist() == frames
    for i, (frame, length) in enumerate(zip(frames, batch.y_lens.tolist(), strict=True)):
        encoder_out = out.encoder_out[i : i + 1, :frame]
        assert torch.allclose(labels["embeddings"].values[i, :frame], encoder_out[0], atol=1e-5)
        ctc = model.ctc_output(encoder_out[0]).softmax(dim=1).sort(dim=1, descending=True)
        assert torch.equal(labels["ctc_posteriors"].ids[i, :frame], ctc.indices[:, :3])
        assert torch.allclose(labels["ctc_posteriors"].probs[i, :frame], ctc.values[:, :3], atol=2e-3)
        # The decoder, fed token by token, says what it expects before it hears the next one.
        memory = model.decoder.memory(encoder_out, torch.tensor([frame]))
        cache, tokens = model.decoder.start(memory, 1), batch.y[i, :length].tolist()
        steps = [model.decoder.step(torch.tensor([t]), cache)[0] for t in [1, *tokens[:-1]]]
        probs = torch.stack(steps)
        probs[:, [0, 1, 13]] = -torch.inf
        expected = probs.softmax(dim=1).sort(dim=1, descending=True)
        assert labels["token_posteriors"].lens[i] == length
        assert torch.equal(labels["token_posteriors"].ids[i, :length], expected.indices[:, :3])
        assert torch.allclose(labels["token_posteriors"].probs[i, :length], expected.values[:, :3], atol=2e-3)
        (alone,) = ToySearch(model).decode(encoder_out, torch.tensor([frame]))
        assert labels["nbest"].scores.shape == (4, 2)
        mass = Counter()  # of hypotheses that are one without the special tokens
        for hypothesis in alone:
            mass[tuple(t for t in hypothesis.tokens if t not in (0, 1, 13))] += math.exp(hypothesis.score)
        for j, (kept, probability) in enumerate(mass.most_common(2)):
            assert labels["nbest"].tokens[i, j, : labels["nbest"].lens[i, j]].tolist() == list(kept)
            assert float(labels["nbest"].scores[i, j]) == pytest.approx(math.log(probability), abs=1e-3)
    for kind in ("ctc_posteriors", "token_posteriors"):
        whole = labels[kind].probs.sum(dim=2) + labels[kind].rest
        inside = torch.arange(whole.shape[1]) < labels[kind].lens.unsqueeze(1)
        assert torch.allclose(whole[inside], torch.ones(int(inside.sum())), atol=1e-6)
    assert not torch.isin(labels["token_posteriors"].ids, torch.tensor([0, 1, 13]))[
        torch.arange(labels["token_posteriors"].ids.shape[1]) < batch.y_lens.unsqueeze(1)
    ].any()


def test_the_nbest_lists_are_those_of_the_joint_beam_search(exp_dir, batch, model):
    options = RecogniserOptions(nbest_size=3, beam_size=4)
    labels = RecogniserTeacher.load(exp_dir, CPU, options=options).labels(batch, ["nbest"])["nbest"]
    with torch.no_grad():
        out = model.encoder(batch.features, batch.x_lens)
    # The weight of CTC is that of the training.
    found = JointBeamSearch(model, 4, nbest=3, ctc_weight=0.4).decode(out.encoder_out, out.encoder_out_lens)
    assert labels.scores.shape == (4, 3)
    for i, hypotheses in enumerate(found):
        assert [labels.tokens[i, j, : labels.lens[i, j]].tolist() for j in range(3)] == [h.tokens for h in hypotheses]
        assert labels.scores[i].tolist() == pytest.approx([h.score for h in hypotheses], abs=1e-3)


def test_the_rows_of_extraction_are_the_labels_of_training(exp_dir, batch, teacher):
    out, labels = teacher.extract(batch), teacher.labels(batch, KINDS)
    assert set(out.arrays) == set(KINDS) == set(labels)
    for kind in RECOGNISER_ROWS:
        row_format = teacher.row_format(kind)
        assert out.arrays[kind].shape[2] == row_format.width
        info = np.iinfo(row_format.dtype)
        assert info.min <= int(out.arrays[kind].min()) <= int(out.arrays[kind].max()) <= info.max
    assert torch.equal(out.arrays["token_posteriors"][..., 0], batch.y.int())
    assert set(load_teacher(exp_dir, kinds=["nbest"]).extract(batch).arrays) == {"nbest", "embeddings"}


def test_an_utterance_alone_gets_the_labels_that_it_gets_in_a_batch(batch, teacher):
    together = teacher.labels(batch, KINDS)
    for i in range(len(batch)):
        s, t, u = int(batch.audio_lens[i]), int(batch.x_lens[i]), int(batch.y_lens[i])
        alone = replace(
            Batch.from_audio([batch.audio[i, :s]]),
            x_lens=torch.tensor([t]),
            y=batch.y[i : i + 1, :u],
            y_lens=torch.tensor([u]),
        )
        single = teacher.labels(alone, KINDS)
        for kind in ("ctc_posteriors", "token_posteriors"):
            n = int(single[kind].lens[0])
            assert n == together[kind].lens[i]
            assert (single[kind].probs[0, :n] - together[kind].probs[i, :n]).abs().max() < 2e-3
        assert torch.equal(single["nbest"].lens[0], together["nbest"].lens[i])
        assert torch.allclose(single["nbest"].scores[0], together["nbest"].scores[i], atol=1e-3)


def test_the_teacher_is_frozen_and_out_of_the_students_hands(exp_dir, batch, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "lang")
    student = recogniser_config("mlm", num_encoder_layers=1)
    config = training_config(exp_dir, tmp_path / "lang", student, ctc_kd_scale=1.0, token_kd_scale=0.5)
    torch.manual_seed(0)
    before = torch.rand(1)
    torch.manual_seed(0)
    system = build_system(config, tokenizer.vocab_size)
    teacher = system.online
    assert isinstance(teacher, RecogniserTeacher) and system.needs_audio
    names = {name for name, _ in system.named_parameters()}
    assert not any("online" in name for name in names)
    system.train()
    assert not any(m.training for m in teacher.model.modules())
    weights = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    terms = system.losses(batch, step=0)
    assert {"ctc_kd_loss", "token_kd_loss"} <= set(terms.terms)
    terms.total.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in teacher.model.state_dict().items())
    first, second = (teacher.labels(batch, KINDS[:2]) for _ in range(2))
    assert all(torch.equal(first[k].probs, second[k].probs) for k in first)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = teacher.labels(batch, KINDS[:2])
    assert all(torch.equal(first[k].probs, under[k].probs) for k in first)
    # Loading it draws random numbers that are not the student's.
    torch.manual_seed(0)
    alone = build_system(replace(student, data=config.data), tokenizer.vocab_size)
    assert all(torch.equal(v, system.state_dict()[k]) for k, v in alone.state_dict().items())
    assert float(before) > 0


def test_a_student_that_is_the_teacher_has_nothing_to_learn(exp_dir, batch):
    teacher = load_teacher(exp_dir, options=RecogniserOptions(top_k=14))
    labels = teacher.labels(batch, ["ctc_posteriors", "embeddings"])
    n = int(labels["ctc_posteriors"].lens[0])
    logits = teacher.model.ctc_output(labels["embeddings"].values[0, :n])
    top = labels["ctc_posteriors"]
    assert float(posterior_kd(logits, top.ids[0, :n], top.probs[0, :n], top.rest[0, :n]).abs().max()) < 1e-4


def test_provenance_is_of_the_whole_model_and_its_tokens(exp_dir, tokenizer, tmp_path, teacher):
    provenance = teacher.provenance()
    assert provenance["layer"] == 2 and provenance["feature_extractor"] and provenance["dtype"] == "float32"
    assert teacher.row_format("nbest").extra["tokenizer_hash"] == tokenizer.hash
    assert teacher.row_format("nbest").extra["search_ctc_weight"] == 0.4
    checkpoint = load_checkpoint(exp_dir / "epoch-1.pt")
    checkpoint["model"]["model.decoder.norm.weight"][0] += 1
    save_checkpoint(tmp_path / "epoch-1.pt", checkpoint)
    tokenizer.save(tmp_path / "tokenizer")
    other = load_teacher(tmp_path).provenance()
    assert other["weights_sha256"] != provenance["weights_sha256"]
    # The encoder alone, which embeddings come from, is the same one.
    embeddings = [build_teacher(TeacherConfig(teacher=str(d), teacher_device="cpu")) for d in (exp_dir, tmp_path)]
    assert embeddings[0].provenance()["weights_sha256"] == embeddings[1].provenance()["weights_sha256"]


def test_the_encoder_of_a_recogniser_gives_embeddings_as_any_other(exp_dir, batch, model):
    teacher = build_teacher(TeacherConfig(teacher=str(exp_dir), teacher_device="cpu", layer=1))
    out = teacher.extract(batch)
    with torch.no_grad():
        taps = model.encoder(batch.features, batch.x_lens, taps=(1,)).taps[1]
    lens = [conv2d_subsampled_len(fbank_num_frames(n)) for n in LENGTHS]
    assert out.lens["embeddings"].tolist() == lens
    for i, n in enumerate(lens):
        assert torch.allclose(out.arrays["embeddings"][i, :n], taps[i, :n], atol=1e-5)


@pytest.mark.parametrize("trained", ["--system nar --attention-decoder mlm", "--system mvq"])
def test_a_training_that_is_no_recogniser_is_refused(tmp_path, tokenizer, trained):
    write_recogniser(tmp_path, tokenizer, recogniser_config("mlm"))
    if trained == "--system mvq":
        checkpoint = load_checkpoint(tmp_path / "epoch-1.pt")
        checkpoint["config"] = config_to_dict(TrainConfig())
        save_checkpoint(tmp_path / "epoch-1.pt", checkpoint)
    with pytest.raises(ConfigError, match=f"was trained with {trained}; .* --attention-decoder ar"):
        load_teacher(tmp_path)


def test_what_does_not_fit_is_refused(exp_dir, batch, tokenizer, tmp_path, teacher):
    with pytest.raises(ConfigError, match=r"--teacher whisper-tiny\.en is no exp_dir"):
        RecogniserTeacher.for_training(TrainConfig())
    with pytest.raises(ConfigError, match=r"--layer 1 .* read layer 2"):
        load_teacher(exp_dir, TeacherConfig(teacher_device="cpu", layer=1))
    other = Tokenizer.train_char(["ONE TWO THREE FOUR FIVE SIX"])
    other.save(tmp_path / "other")
    student = recogniser_config("mlm")
    with pytest.raises(ConfigError, match=f"has tokenizer {tokenizer.hash}, .*other holds {other.hash}"):
        RecogniserTeacher.for_training(training_config(exp_dir, tmp_path / "other", student))
    tokenizer.save(tmp_path / "lang")
    deaf = replace(student, model=replace(student.model, feature_dim=40))
    with pytest.raises(ConfigError, match="hears 80 mel bins, the student 40"):
        RecogniserTeacher.for_training(training_config(exp_dir, tmp_path / "lang", deaf))
    with pytest.raises(DataError, match="need transcripts"):
        teacher.extract(Batch.from_audio([batch.audio[0]]))
    with pytest.raises(DataError, match="needs audio"):
        teacher.labels(replace(batch, audio=None), KINDS)
    with pytest.raises(DataError, match=r"utterance 0 .*the student has 23 frames, 16000 samples give 24"):
        teacher.labels(replace(batch, x_lens=batch.x_lens - 4), KINDS)
    (tmp_path / "exp").mkdir()
    changed = write_recogniser(tmp_path / "exp", tokenizer)
    other.save(changed / "tokenizer")
    with pytest.raises(ConfigError, match="was trained with tokenizer"):
        load_teacher(changed)


def test_a_teacher_with_damaged_weights_is_named_in_training(exp_dir, batch):
    teacher = load_teacher(exp_dir)
    with torch.no_grad():
        teacher.model.encoder.layers[1].norm.weight[0] = float("nan")
    assert not torch.isfinite(teacher.extract(batch).arrays["embeddings"]).all()
    with pytest.raises(DataError, match="utterance 0: the teacher's encoder output is not finite"):
        teacher.labels(batch, ["ctc_posteriors"])


def test_audio_without_a_frame_has_no_rows(teacher):
    none = {"y": torch.zeros(1, 0, dtype=torch.int64), "y_lens": torch.tensor([0])}
    out = teacher.extract(replace(Batch.from_audio([torch.zeros(700)]), **none))
    assert out.lens["ctc_posteriors"].tolist() == out.lens["token_posteriors"].tolist() == [0]


def test_the_newest_weights_are_those_of_any_teacher(exp_dir, teacher):
    state, _, used = load_trained(exp_dir)
    assert used == "epoch-1.pt"
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, state[f"model.{name}"])
