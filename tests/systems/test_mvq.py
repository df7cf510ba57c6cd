"""The MVQ system: its terms are sums, stored and online labels agree, and distillation leaves inference alone."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from micro_corpus import label_info, read_cuts, write_corpus, write_labels

import icefall_kd.systems.mvq as module
from icefall_kd.config import (
    AsrLossConfig,
    AugmentConfig,
    DataConfig,
    ExtractConfig,
    KdConfig,
    ModelConfig,
    TeacherConfig,
    TrainConfig,
)
from icefall_kd.data.batch import Batch, Labels
from icefall_kd.data.datamodule import DataModule
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.extract import extract_labels, extract_layers
from icefall_kd.labels.keys import label_key
from icefall_kd.labels.store import LabelStore
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.systems import build_system
from icefall_kd.systems.asr import warmup_scales
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.guards import parameters_without_gradient
from tests.teachers.tiny_models import ssl_model

sys.path.insert(0, str(Path(__file__).parents[1] / "labels"))
from label_toys import ToyTeacher

ASR_TERMS = {"simple_loss", "pruned_loss", "ctc_loss"}
DIM = 24  # of the toy teacher


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus with codes and embeddings of a toy teacher, extracted, and its quantizer."""
    folder = write_corpus(tmp_path_factory.mktemp("mvq"))
    torch.manual_seed(3)
    Quantizer(DIM, 4, 16).save(folder / "quantizer.safetensors")
    cuts, quantizer = [folder / "manifests" / "cuts_train.jsonl.gz"], folder / "quantizer.safetensors"
    # Batches of the extraction differ from those of the training.
    common = {"cuts": cuts, "quantizer": quantizer, "extract_max_duration": 2.5}
    extract_labels(ExtractConfig(label_dir=folder / "codes", **common), ToyTeacher(DIM))
    floats = {"kind": "embeddings", "embeddings_dtype": "float32"}
    extract_labels(ExtractConfig(label_dir=folder / "floats", **floats, **common), ToyTeacher(DIM))
    return folder


def make_config(kd="none", model=(), asr=(), **options) -> TrainConfig:
    small = {"encoder_size": "tiny", "num_encoder_layers": 4, "encoder_dim": 16, "num_heads": 2, "feedforward_dim": 16}
    return TrainConfig(
        model=ModelConfig(**{**small, "decoder_dim": 8, "joiner_dim": 8, "cnn_kernel": 3, **dict(model)}),
        asr=AsrLossConfig(**{"rnnt_warm_step": 10, **dict(asr)}),
        kd=KdConfig(kd=kd, **options),
    )


def kd_config(corpus, kd, **options) -> TrainConfig:
    path = corpus / ("codes" if kd == "mvq" else "floats")
    return make_config(kd, **({} if kd == "none" else {"label_dir": [path]}), **options)


def online_config(corpus, kd, **options) -> TrainConfig:
    return make_config(kd, teacher_labels="online", quantizer=corpus / "quantizer.safetensors", **options)


@pytest.fixture
def toy_teacher(monkeypatch):
    """Make the systems build the toy teacher; its construction draws random numbers, as loading weights may."""

    def build(_config):
        torch.randn(100)
        return ToyTeacher(DIM)

    monkeypatch.setattr(module, "build_teacher", build)


def build(config: TrainConfig, inference=False):
    torch.manual_seed(1)
    return build_system(config, 20, inference=inference)


def batches_of(corpus, system, with_audio=False) -> list[Batch]:
    tokenizer = Tokenizer.load(corpus / "lang_char")
    data = DataConfig(
        manifest_dir=corpus / "fbank", lang_dir=corpus / "lang_char", num_workers=0, max_duration=4.0
    )
    specs = system.label_specs
    return list(DataModule(data, AugmentConfig(), tokenizer, label_specs=specs, with_audio=with_audio).train_batches(1))


def fixed_dropout(system, batch: Batch, step=5):
    """Return the losses in training, with dropout that depends on nothing but the seed."""
    torch.manual_seed(9)
    return system.train()(batch, step)


@pytest.mark.parametrize(("asr", "wanted"), [
    ({}, ASR_TERMS),
    ({"ctc_scale": 0}, ASR_TERMS - {"ctc_loss"}),
    ({"transducer_scale": 0}, {"ctc_loss"}),
])  # fmt: skip
@pytest.mark.parametrize("kd", ["none", "l1", "l2", "mvq"])
def test_every_parameter_learns_and_validation_does_not_distil(corpus, kd, asr, wanted):
    system = build(kd_config(corpus, kd, asr=asr))
    batch = batches_of(corpus, system)[0]
    terms = fixed_dropout(system, batch)
    terms.total.backward()
    assert parameters_without_gradient(system) == []
    assert all(torch.isfinite(p.grad).all() for p in system.parameters())
    distilled = {"none": set(), "mvq": {"kd_codebook_loss"}}.get(kd, {f"kd_{kd}_loss"})
    assert set(terms.terms) == wanted | distilled
    with torch.no_grad():
        assert set(system.eval()(batch, 5).terms) == wanted


@pytest.mark.parametrize("head", ["independent", "joint"])
def test_both_codebook_heads_learn(corpus, head):
    system = build(kd_config(corpus, "mvq", codebook_head=head))
    terms = fixed_dropout(system, batches_of(corpus, system)[0])
    terms.total.backward()
    assert parameters_without_gradient(system) == []
    # Each of the 2 x 4 codebooks is logged beside its bound, ln K.
    bounds = {name: value[2] for name, value in terms.metrics.items() if "_ce" in name}
    assert len(bounds) == 8 and all(b == pytest.approx(np.log(16)) for b in bounds.values())


@pytest.mark.parametrize("kd", ["none", "l2", "mvq"])
def test_terms_are_sums(corpus, kd):
    system = build(kd_config(corpus, kd, model={"dropout": 0.0}))
    batch = batches_of(corpus, system)[0]

    def twice(value):
        if isinstance(value, torch.Tensor):
            return torch.cat([value, value])
        return value + value

    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    labels = {name: Labels(twice(x.values), twice(x.lens)) for name, x in fields.pop("labels").items()}
    double = Batch(**{n: None if v is None else twice(v) for n, v in fields.items()}, labels=labels)
    one, two = fixed_dropout(system, batch), fixed_dropout(system, double)
    assert two.frames == 2 * one.frames
    for name, term in one.terms.items():
        other = two.terms[name]
        torch.testing.assert_close(other.value, 2 * term.value, rtol=1e-5, atol=0)
        assert (other.count, other.scale) == (2 * term.count, term.scale)
        torch.testing.assert_close(other.per_utterance, twice(term.per_utterance), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(term.per_utterance.sum(), term.value.detach(), rtol=1e-5, atol=0)
    scaled = sum(term.scale * float(term.value.detach()) for term in one.terms.values())
    assert float(one.total.detach()) == pytest.approx(scaled, rel=1e-6)


def test_the_student_starts_alike_whatever_teaches_it(corpus, toy_teacher):
    systems = [build(make_config())]
    systems += [build(kd_config(corpus, kd)) for kd in ("mvq", "l1")]
    systems += [build(online_config(corpus, kd)) for kd in ("mvq", "l1")]
    for system in systems[1:]:
        assert all(torch.equal(v, system.state_dict()[k]) for k, v in systems[0].state_dict().items())
    stored, online = systems[1].state_dict(), systems[3].state_dict()
    assert stored.keys() == online.keys() and all(torch.equal(v, online[k]) for k, v in stored.items())


def test_given_the_same_codes_stored_and_online_losses_are_equal(corpus, toy_teacher, tmp_path):
    # The labels of this set are what the online teacher says in the batches of the training.
    online = build(online_config(corpus, "mvq"))
    batches = batches_of(corpus, online, with_audio=True)
    codes = {}
    for batch in batches:
        labels = online.online.labels(batch)
        for cut_id, values, n in zip(batch.ids, labels.values, labels.lens.tolist(), strict=True):
            assert (values[n:] == -100).all() and (values[:n] >= 0).all()
            codes[cut_id] = values[:n].numpy().astype(np.uint8)
    by_key = {label_key(cut): codes[cut.id] for cut in read_cuts(corpus)}
    info = label_info(width=4, num_codebooks=4, dim=DIM)
    write_labels(tmp_path / "labels", read_cuts(corpus), info, values=by_key)
    stored = build(make_config("mvq", label_dir=[tmp_path / "labels"]))
    for a, b in zip(batches_of(corpus, stored), batches, strict=True):
        assert a.ids == b.ids
        mine, theirs = fixed_dropout(stored, a), fixed_dropout(online, b)
        assert mine.terms.keys() == theirs.terms.keys()
        for name, term in mine.terms.items():
            assert torch.equal(term.value, theirs.terms[name].value), name
            assert (term.count, term.scale) == (theirs.terms[name].count, theirs.terms[name].scale)
        assert torch.equal(mine.total, theirs.total)


def test_extracted_and_online_codes_differ_in_near_ties_alone(corpus, toy_teacher):
    online = build(online_config(corpus, "mvq"))
    store, quantizer = LabelStore(corpus / "codes"), Quantizer.load(corpus / "quantizer.safetensors")
    keys = {cut.id: label_key(cut) for cut in read_cuts(corpus)}
    same = total = 0
    for batch in batches_of(corpus, online, with_audio=True):
        labels = online.online.labels(batch)
        embeddings = online.online.teacher.extract(batch).arrays["embeddings"]
        for name, values, frames, n in zip(batch.ids, labels.values, embeddings, labels.lens.tolist(), strict=True):
            stored = torch.from_numpy(np.asarray(store.get(keys[name])))
            assert len(stored) == n
            found = values[:n].to(torch.uint8)
            equal = (found == stored).all(1)
            same, total = same + int(equal.sum()), total + n
            errors = [(quantizer.decode(c) - frames[:n]).square().sum(1)[~equal] for c in (found, stored)]
            torch.testing.assert_close(*errors, rtol=1e-3, atol=0)
    assert total > 300 and same >= 0.999 * total


def test_online_embeddings_equal_stored_ones(corpus, toy_teacher):
    stored, online = build(kd_config(corpus, "l2")), build(online_config(corpus, "l2"))
    pairs = zip(batches_of(corpus, stored), batches_of(corpus, online, with_audio=True), strict=True)
    for a, b in pairs:
        mine, theirs = (fixed_dropout(s, x).terms["kd_l2_loss"] for s, x in ((stored, a), (online, b)))
        torch.testing.assert_close(mine.value, theirs.value, rtol=1e-5, atol=0)
        assert mine.count == theirs.count


def test_the_online_teacher_is_no_part_of_the_model_nor_of_its_autocast(corpus, toy_teacher, monkeypatch):
    system = build(online_config(corpus, "mvq"))
    assert not any("teacher" in name or "quantizer" in name for name in system.state_dict())
    assert not any(isinstance(m, Quantizer) for m in system.modules())
    assert system.label_specs == []
    batch, seen = batches_of(corpus, system, with_audio=True)[0], []
    extract = ToyTeacher.extract

    def spy(self, batch):
        seen.append(torch.is_autocast_enabled("cpu"))
        return extract(self, batch)

    monkeypatch.setattr(ToyTeacher, "extract", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(system.train()(batch, 0).total)
    assert seen == [False]


def test_several_label_sets_have_layers_and_scales_of_their_own(corpus, tmp_path):
    other = write_labels(tmp_path / "other", read_cuts(corpus))  # 2 codebooks, another teacher
    label_dir = [corpus / "codes", other]
    system = build(make_config("mvq", label_dir=label_dir, kd_layer=[2, 3], kd_scale=[0.1, 0.5]))
    assert [(t.name, t.layer, t.scale, t.source.width) for t in system.targets] == [
        ("kd0", 2, 0.1, 4), ("kd1", 3, 0.5, 2),
    ]  # fmt: skip
    batch = batches_of(corpus, system)[0]
    terms = fixed_dropout(system, batch)
    assert {n: t.scale for n, t in terms.terms.items() if n.startswith("kd")} == {
        "kd0_codebook_loss": 0.1, "kd1_codebook_loss": 0.5,
    }  # fmt: skip
    terms.total.backward()
    assert parameters_without_gradient(system) == []
    # Each term reaches the layers up to its own alone.
    for name, layer in (("kd0_codebook_loss", 2), ("kd1_codebook_loss", 3)):
        system.zero_grad(set_to_none=True)
        fixed_dropout(system, batch).terms[name].value.backward()
        reached = [any(p.grad is not None for p in block.parameters()) for block in system.model.encoder.layers]
        assert reached == [i < layer for i in range(4)]
    # One value serves both sets; the default is the middle layer.
    shared = build(make_config("mvq", label_dir=label_dir, kd_scale=[0.2]))
    assert [(t.layer, t.scale) for t in shared.targets] == [(2, 0.2), (2, 0.2)]


def test_two_layers_of_two_teachers_distil_at_once(corpus, tmp_path):
    cuts, label_dir = [corpus / "manifests" / "cuts_train.jsonl.gz"], []
    for family, layers in (("hubert", [1, 3]), ("data2vec-audio", [2, 3])):
        torch.manual_seed(4)
        ssl_model(family, feat_extract_norm="layer", stable=False).save_pretrained(tmp_path / family)
        configs = [
            ExtractConfig(
                cuts=cuts,
                label_dir=tmp_path / f"{family}-{layer}",
                quantizer=tmp_path / "of no file",
                refine_iters=1,
                teacher=TeacherConfig(teacher=str(tmp_path / family), layer=layer),
            )
            for layer in layers
        ]
        extract_layers(configs, quantizers=[Quantizer(32, 4, 16) for _ in layers])
        label_dir += [config.label_dir for config in configs]
    system = build(make_config("mvq", label_dir=label_dir, kd_layer=[1, 2, 3, 4], kd_scale=[0.4, 0.3, 0.2, 0.1]))
    terms = fixed_dropout(system, batches_of(corpus, system)[0])
    scales = {name: term.scale for name, term in terms.terms.items() if name.endswith("codebook_loss")}
    assert scales == dict(zip([f"kd{i}_codebook_loss" for i in range(4)], [0.4, 0.3, 0.2, 0.1], strict=True))
    assert len({float(terms.terms[name].value.detach()) for name in scales}) == 4
    terms.total.backward()
    assert parameters_without_gradient(system) == []


@pytest.mark.parametrize(("kd", "options", "reason"), [
    ("mvq", {"kd_layer": [1, 2]}, "--kd-layer has 2 values for 1 label sets"),
    ("mvq", {"kd_scale": [0.1, 0.2, 0.3]}, "--kd-scale has 3 values for 1 label sets"),
    ("mvq", {"kd_layer": [5]}, "--kd-layer 5: the student has layers 1 to 4"),
    ("mvq", {"kd_layer": [-1]}, "--kd-layer -1: the student has layers 1 to 4"),
    ("mvq", {"kd_scale": [0.0]}, "--kd-scale is 0.0; it must be positive"),
    ("mvq", {"label_dir": []}, "--kd mvq needs --label-dir"),
    ("mvq", {"label_dir": ["floats"]}, "needs labels of kind codebook_indexes, but .* holds embeddings"),
    ("l1", {"label_dir": ["codes"]}, "needs labels of kind embeddings, but .* holds codebook_indexes"),
    ("mvq", {"teacher_labels": "online"}, "needs --quantizer"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(corpus, toy_teacher, kd, options, reason):
    if "label_dir" in options:
        options = {**options, "label_dir": [corpus / name for name in options["label_dir"]]}
    config = kd_config(corpus, kd)
    config = dataclasses.replace(config, kd=dataclasses.replace(config.kd, **options))
    with pytest.raises(ConfigError, match=reason):
        build(config)


def test_labels_of_another_quantizer_or_layer_than_named_are_refused(corpus, tmp_path):
    system = build(kd_config(corpus, "mvq", quantizer=corpus / "quantizer.safetensors"))
    batches_of(corpus, system)
    torch.manual_seed(4)
    other = Quantizer(DIM, 4, 16)
    other.save(tmp_path / "other.safetensors")
    system = build(kd_config(corpus, "mvq", quantizer=tmp_path / "other.safetensors"))
    mine = LabelStore(corpus / "codes").info.quantizer_sha256
    with pytest.raises(DataError, match=f"quantizer_sha256 is '{mine}', expected '{other.sha256}'"):
        batches_of(corpus, system)
    config = kd_config(corpus, "l2")
    for layer, outcome in ((1, None), (7, "layer is 1, expected 7")):
        system = build(dataclasses.replace(config, teacher=TeacherConfig(layer=layer)))
        if outcome is None:
            assert batches_of(corpus, system)
        else:
            with pytest.raises(DataError, match=outcome):
                batches_of(corpus, system)
    with pytest.raises(DataError, match="made for embeddings of 24 channels, these have 8"):
        module._quantizer(corpus / "quantizer.safetensors", 8)


def test_an_online_teacher_that_the_quantizer_was_not_trained_on_is_refused(corpus, toy_teacher, tmp_path):
    quantizer, trained_on = Quantizer.load(corpus / "quantizer.safetensors"), ToyTeacher(DIM).provenance()
    quantizer.save(tmp_path / "quantizer.safetensors", {"teacher": trained_on})
    assert build(online_config(tmp_path, "mvq")).online is not None
    quantizer.save(tmp_path / "quantizer.safetensors", {"teacher": {**trained_on, "layer": 7}})
    with pytest.raises(DataError, match="layer is 7, this one's is 1"):
        build(online_config(tmp_path, "mvq"))


def test_parameters_are_printed_by_part(caplog):
    with caplog.at_level("INFO"):
        system = build(make_config())
    total = sum(p.numel() for p in system.model.parameters())
    assert f"total {total:,}" in caplog.text and "encoder " in caplog.text and "joiner " in caplog.text


@pytest.mark.parametrize("kd", ["l2", "mvq"])
def test_a_batch_padded_beyond_its_longest_utterance_has_the_same_losses(corpus, kd):
    system = build(kd_config(corpus, kd, model={"dropout": 0.0}))
    batch = batches_of(corpus, system)[0]
    padded = dataclasses.replace(batch, features=torch.nn.functional.pad(batch.features, (0, 0, 0, 23)))
    for name, term in fixed_dropout(system, padded).terms.items():
        torch.testing.assert_close(term.value, fixed_dropout(system, batch).terms[name].value, msg=name)


def test_inference_needs_nothing_of_the_distillation(corpus, monkeypatch):
    trained = build(kd_config(corpus, "mvq"))
    batch = batches_of(corpus, trained)[0]
    state = trained.inference_state_dict()
    assert state.keys() < trained.state_dict().keys()
    monkeypatch.setattr(module, "build_teacher", lambda _: pytest.fail("a teacher was built for inference"))
    monkeypatch.setattr(module, "stored_source", lambda _: pytest.fail("labels were read for inference"))
    for config in (kd_config(corpus, "mvq"), online_config(corpus, "mvq")):
        plain = build(config, inference=True)
        plain.load_state_dict(state)
        with torch.no_grad():
            a, b = trained.eval().encode(batch), plain.eval().encode(batch)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        assert plain.decoders().keys() > {"greedy_search", "modified_beam_search", "ctc_greedy_search"}


@pytest.mark.parametrize("model", [{"encoder_dim": 16}, {"encoder_dim": 24, "num_encoder_layers": 2, "num_heads": 3}])
def test_one_configuration_distils_into_any_encoder(corpus, model):
    system = build(kd_config(corpus, "mvq", model=model))
    assert system.targets[0].layer == system.model.encoder.num_layers // 2
    fixed_dropout(system, batches_of(corpus, system)[0]).total.backward()
    assert parameters_without_gradient(system) == []


def test_utterances_without_labels_add_nothing(corpus):
    system = build(kd_config(corpus, "mvq", model={"dropout": 0.0}))
    batch = next(b for b in batches_of(corpus, system) if len(b) > 1)
    values, lens = batch.labels["kd"].values.clone(), batch.labels["kd"].lens.clone()
    values[0], lens[0] = -100, 0
    terms = fixed_dropout(system, batch).terms["kd_codebook_loss"]
    fewer = fixed_dropout(system, dataclasses.replace(batch, labels={"kd": Labels(values, lens)}))
    assert fewer.terms["kd_codebook_loss"].per_utterance[0] == 0
    torch.testing.assert_close(fewer.terms["kd_codebook_loss"].per_utterance[1:], terms.per_utterance[1:])
    # Not even a batch without any label breaks the step.
    none = Labels(torch.full_like(values, -100), torch.zeros_like(lens))
    empty = fixed_dropout(system, dataclasses.replace(batch, labels={"kd": none}))
    assert float(empty.terms["kd_codebook_loss"].value.detach()) == 0
    empty.total.backward()
    assert parameters_without_gradient(system) == []


def test_warm_up_scales():
    # From (1, 0.1) to (simple_loss_scale, 1), linearly.
    assert warmup_scales(0, 100, 0.5) == (1.0, 0.1)
    assert warmup_scales(50, 100, 0.5) == pytest.approx((0.75, 0.55))
    assert warmup_scales(100, 100, 0.5) == warmup_scales(10**6, 100, 0.5) == (0.5, 1.0)
    assert warmup_scales(0, 0, 0.5) == (0.5, 1.0)


def test_warm_up_scales_reach_the_terms(corpus):
    system = build(make_config(asr={"transducer_scale": 0.7, "ctc_scale": 0.3}))
    batch = batches_of(corpus, system)[0]
    for step in (0, 4, 99):
        terms, (simple, pruned) = fixed_dropout(system, batch, step).terms, warmup_scales(step, 10, 0.5)
        scales = {name: term.scale for name, term in terms.items()}
        assert scales == {"simple_loss": 0.7 * simple, "pruned_loss": 0.7 * pruned, "ctc_loss": 0.3}


def test_a_batch_of_the_training_is_what_the_online_teacher_hears(corpus, toy_teacher):
    system = build(online_config(corpus, "mvq"))
    cuts = {cut.id: cut for cut in read_cuts(corpus)}
    for batch in batches_of(corpus, system, with_audio=True):
        labels = system.online.labels(batch)
        for i, name in enumerate(batch.ids):
            assert np.array_equal(batch.audio[i, : batch.audio_lens[i]].numpy(), cuts[name].load_audio()[0])
            assert int(labels.lens[i]) == system.online.teacher.num_frames(cuts[name].num_samples)
