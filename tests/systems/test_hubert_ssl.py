"""Masked prediction of clusters: the loss against plain loops, its mask, labels and health."""

import dataclasses
import logging
import math

import numpy as np
import pytest
import torch

from icefall_kd.config.hubert_ssl import HubertSslConfig
from icefall_kd.data.batch import IGNORE, Labels
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import FBANK_GLU, SSL_CONV, WHISPER_CONV
from icefall_kd.labels.store import LabelStore
from icefall_kd.systems import build_system, hubert_ssl
from tests.hubert_toys import hubert_config, samples, write_cmvn
from tests.labels.label_toys import toy_info

K = 12
MASK = {"mask_prob": 0.8, "mask_span": 3}


def write_labels(path, formula=FBANK_GLU, kind="clusters"):
    info = toy_info(
        kind=kind, dtype="uint16", width=1, num_codebooks=1, codebook_size=K, frame_formula=formula.to_dict()
    )
    writer = LabelStore.create(path, info).writer(0, 1)
    writer.add("rec|0|16000|1/1", np.zeros((formula.num_frames(16000), 1), "uint16"), 16000)
    writer.finish()
    return path


@pytest.fixture
def build(tmp_path):
    def make(structure="base", ssl=(), hubert_ssl=(), hubert=(), labels=None, **groups):
        kd = {"teacher_labels": "stored", "label_dir": [labels or write_labels(tmp_path / "labels")]}
        config = hubert_config(
            "ssl",
            structure,
            ssl={**MASK, **dict(ssl)},
            hubert=hubert,
            hubert_ssl=HubertSslConfig(**{"cluster_dim": 16, **dict(hubert_ssl)}),
            kd={**kd, **groups.pop("kd", {})},
            **groups,
        )
        torch.manual_seed(0)
        return build_system(config, 0)

    return make


def labelled(batch=None, without=()):
    """Return a batch with clusters that the audio tells: its loudness, by frame."""
    batch = batch or samples()
    lens = [0 if i in without else SSL_CONV.num_frames(n) for i, n in enumerate(batch.audio_lens.tolist())]
    values = torch.full((len(lens), max(lens), 1), IGNORE)
    for row, frames in enumerate(lens):
        loud = batch.audio[row].unfold(0, 400, 320)[:frames].square().mean(dim=1).sqrt()
        values[row, :frames, 0] = (loud * 40).long().clamp(max=K - 1)
    return dataclasses.replace(batch, labels={"clusters": Labels(values, torch.tensor(lens))})


@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize("front_end", ["waveform", "fbank"])
def test_the_loss_is_that_of_plain_loops(build, tmp_path, monkeypatch, front_end, scale):
    hubert = {"cmvn": write_cmvn(tmp_path / "cmvn.safetensors")} if front_end == "fbank" else {}
    system = build(ssl={"front_end": front_end}, hubert=hubert, hubert_ssl={"unmasked_scale": scale}).eval()
    batch, model = labelled(without=(1,)), system.model
    lens = [SSL_CONV.num_frames(n) for n in batch.audio_lens.tolist()]
    mask = torch.zeros(3, max(lens), dtype=torch.bool)
    for row, frames in enumerate(lens):
        mask[row, torch.randperm(frames)[:7]] = True
    monkeypatch.setattr(hubert_ssl, "sample_spans", lambda *_: mask)
    with torch.no_grad():
        found = system.losses(batch, 1)
        x, counts = model.encoder.subsampling(batch.audio, batch.audio_lens)
        x[mask] = model.mask_embedding
        hidden = model.encoder.forward_embedded(x, counts).encoder_out
    sums, hits = {"masked": 0.0, "unmasked": 0.0}, {"masked": 0, "unmasked": 0}
    counted = {"masked": 0, "unmasked": 0}
    head, embeddings = model.cluster_head.final_proj, model.cluster_head.label_embs.detach()
    for row in (0, 2):
        for t in range(lens[row]):
            e = head(hidden[row, t]).detach()
            logits = [float(e @ c / (e.norm() * c.norm())) / 0.1 for c in embeddings]
            target, name = int(batch.labels["clusters"].values[row, t, 0]), "masked" if mask[row, t] else "unmasked"
            sums[name] += math.log(sum(map(math.exp, logits))) - logits[target]
            hits[name] += logits[target] == max(logits)
            counted[name] += 1
    for name in sums:
        term = found.terms[f"{name}_loss"]
        assert float(term.value) == pytest.approx(sums[name], rel=1e-4) and term.count == counted[name]
        assert float(term.per_utterance.sum()) == pytest.approx(sums[name], rel=1e-4) and term.per_utterance[1] == 0
        assert tuple(map(float, found.metrics[f"{name}_acc"])) == (hits[name], counted[name])
    total = sums["masked"] + scale * sums["unmasked"]
    if front_end == "waveform":
        raw = model.encoder.subsampling.project(batch.audio, batch.audio_lens)[0].detach()
        squares = [float(raw[row, t].square().mean()) for row in range(3) for t in range(lens[row])]
        total += 10 * 14 * sum(squares) / len(squares)
    else:
        assert "feature_penalty" not in found.terms
    assert float(found.total) == pytest.approx(total, rel=1e-4) and found.frames == 14


def test_a_new_model_begins_near_the_logarithm_of_the_clusters(build, caplog):
    system = build(hubert_ssl={"cluster_dim": 256})
    with caplog.at_level(logging.WARNING):
        term = system.losses(labelled(), 0).terms["masked_loss"]
    assert abs(float(term.value.detach()) / term.count - math.log(K)) < 0.5
    assert "the loss begins at" not in caplog.text
    with torch.no_grad():
        system.model.cluster_head.label_embs.copy_(torch.randn(K, 256))
        system.model.cluster_head.label_embs[3] += 8
        system.model.cluster_head.final_proj.bias.fill_(8)
    with caplog.at_level(logging.WARNING):
        system.losses(labelled(), 0)
        assert f"ln K = {math.log(K):.3f} of {K} clusters" in caplog.text
        system.losses(labelled(), 1000)
    assert "the predictions use as many clusters as 1.0 equally likely ones" in caplog.text


def test_it_learns_what_is_behind_the_mask_and_all_parameters_take_part(build):
    system, batch = build(), labelled()
    optimizer = torch.optim.AdamW(system.parameters(), lr=0.003)
    for step in range(60):
        found = system.losses(batch, step)
        optimizer.zero_grad()
        (found.total / found.frames).backward()
        if step == 0:
            first = float(found.terms["masked_loss"].value.detach()) / found.frames
            assert [name for name, p in system.named_parameters() if p.grad is None or not p.grad.any()] in (
                [],
                # A bias in front of a softmax over keys changes nothing.
                [f"model.encoder.body.layers.{i}.attention.k_proj.bias" for i in range(3)],
            )
        optimizer.step()
    hits, count = found.metrics["masked_acc"]
    assert float(found.terms["masked_loss"].value.detach()) / found.frames < 0.7 * first and hits / count > 0.4
    system.eval()
    again = [float(system.losses(batch, 0).terms["masked_loss"].value) for _ in range(2)]
    assert again[0] == again[1]  # validation masks the same frames


def test_labels_of_other_audio_are_refused_and_none_are_no_loss(build):
    system, batch = build(), labelled()
    labels = batch.labels["clusters"]
    short = Labels(labels.values[:, :-1], (labels.lens - 1).clamp(min=0))
    with pytest.raises(DataError, match=r"utterance u0-0: 23 clusters for 24 frames; label set .*labels is of other"):
        system.losses(dataclasses.replace(batch, labels={"clusters": short}), 0)
    nothing = system.losses(labelled(without=(0, 1, 2)), 1)
    assert float(nothing.terms["masked_loss"].value.detach()) == 0 and nothing.frames == 1
    nothing.total.backward()


def test_label_sets_that_do_not_fit_are_refused(build, tmp_path):
    with pytest.raises(ConfigError, match="one label set of kind clusters is needed"):
        build(labels=write_labels(tmp_path / "codes", kind="codebook_indexes"))
    with pytest.raises(ConfigError, match="has frames of"):
        build(labels=write_labels(tmp_path / "whisper", WHISPER_CONV))
    assert build(labels=write_labels(tmp_path / "conv", SSL_CONV)).num_clusters == K
    with pytest.raises(ConfigError, match="clusters are of 50"):
        build("fithubert")
    with pytest.raises(ConfigError, match="its clusters are stored"):
        build(kd={"teacher_labels": "online"})
    with pytest.raises(ConfigError, match="--num-negatives is of --system dualmode --objective ssl"):
        build(ssl={"num_negatives": 5})
    config = hubert_config("asr", hubert_ssl=HubertSslConfig(unmasked_scale=1.0), kd={"teacher_labels": "stored"})
    with pytest.raises(ConfigError, match="--unmasked-scale is of --system hubert --objective ssl"):
        build_system(config, 20)
