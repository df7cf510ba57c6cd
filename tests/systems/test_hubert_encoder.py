"""A distilled HuBERT student as the encoder of an mvq student, and its convolutions in a dual-mode one."""

import dataclasses

import pytest
import torch
from hubert_asr_toys import VOCAB, SpeechData, hubert_config, pretrained, speech_batch
from ssl_toys import ssl_config

from icefall_kd.config import HubertConfig, KdConfig, TransferConfig
from icefall_kd.data.batch import Labels
from icefall_kd.errors import ConfigError
from icefall_kd.frames import SSL_CONV
from icefall_kd.systems import build_system
from icefall_kd.systems.mvq import LabelSource, MvqSystem, kd_targets
from icefall_kd.train.guards import parameters_without_gradient
from icefall_kd.train.loop import train
from icefall_kd.train.transfer import initialise


def mvq_config(**options):
    model = {"encoder": "hubert", "decoder_dim": 8, "joiner_dim": 8}
    config = hubert_config(model=model, asr={"transducer_scale": 1.0, "ctc_scale": 0.2}, **options)
    return dataclasses.replace(config, system="mvq")


def test_an_mvq_student_starts_from_it_and_trains(tmp_path):
    state = pretrained(tmp_path / "student")
    config = mvq_config(init_from=tmp_path / "student", exp_dir=tmp_path / "exp", max_steps=2)
    system = build_system(config, VOCAB)
    _, report = initialise(system, tmp_path / "student")
    mine = system.state_dict()
    encoder = [name for name in state if name.startswith("model.encoder.")]
    assert sorted(report.loaded) == sorted(encoder) and all(torch.equal(mine[n], state[n]) for n in encoder)
    assert system.hears_samples and system.frame_seconds(3) == 0.06
    assert system.alignment_losses["num_encoder_frames"](100) == 49
    result = train(system, SpeechData(), config, tokenizer_hash="abc")
    assert result["steps"] == 2 and result["skipped_steps"] == 0


def test_its_frames_are_the_teachers(tmp_path):
    config = mvq_config()
    config = dataclasses.replace(config, kd=KdConfig(kd="mvq", kd_layer=[1]))
    source = LabelSource(path=None, kind="codebook_indexes", formula=SSL_CONV, width=2, codebook_size=16)
    targets = kd_targets(config.kd, 2, [source], student_hop=320)
    assert targets[0].ratio == 1
    encoder = build_system(mvq_config(), VOCAB).model.encoder
    torch.manual_seed(2)
    system = MvqSystem(config, VOCAB, targets, encoder=encoder)
    batch = speech_batch()
    lens = torch.tensor([SSL_CONV.num_frames(n) for n in batch.audio_lens.tolist()])
    codes = torch.randint(0, 16, (3, int(lens.max()), 2))
    terms = system.losses(dataclasses.replace(batch, labels={"kd": Labels(codes, lens)}), 0)
    assert terms.frames == int(lens.sum()) == terms.terms["kd_codebook_loss"].count
    terms.total.backward()
    assert parameters_without_gradient(system) == []


def test_a_dual_mode_student_takes_its_convolutions(tmp_path):
    state = pretrained(tmp_path / "student", extractor_norm="layer_norm")
    ssl = {"front_end": "waveform", "extractor_channels": 16}
    config = dataclasses.replace(ssl_config("asr"), ssl=dataclasses.replace(ssl_config().ssl, **ssl))
    config = dataclasses.replace(config, ssl=type(config.ssl)(**ssl))
    torch.manual_seed(4)
    system = build_system(config, VOCAB)
    _, report = initialise(system, tmp_path / "student", TransferConfig(init_modules=["encoder"]))
    front = "model.encoder.subsampling."
    wanted = [n for n in state if n.startswith((f"{front}convolutions", f"{front}inner_norms"))]
    assert len(wanted) == 21 and set(wanted) <= set(report.loaded)
    assert all(torch.equal(system.state_dict()[n], state[n]) for n in wanted)


def test_what_does_not_fit_is_refused():
    config = mvq_config()
    streaming = dataclasses.replace(config, model=dataclasses.replace(config.model, streaming=True))
    with pytest.raises(ConfigError, match="--encoder hubert with --streaming true"):
        build_system(streaming, VOCAB)
    with pytest.raises(ConfigError, match="--encoder hubert with --system nar"):
        build_system(dataclasses.replace(config, system="nar"), VOCAB)
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, encoder="conformer"))
    with pytest.raises(ConfigError, match="--structure is of --system hubert"):
        build_system(dataclasses.replace(plain, hubert=HubertConfig(structure="deep_thin")), VOCAB)
