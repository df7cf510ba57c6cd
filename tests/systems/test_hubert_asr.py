"""Fine-tuning of HuBERT models: what learns when, what is masked, and that every student can learn by heart."""

import dataclasses

import pytest
import torch
from hubert_asr_toys import CTC, KINDS, VOCAB, SpeechData, hubert_config, pretrained, speech_batch, write_cmvn
from students import load, tokenizer_of, write_student

from icefall_kd.config import DecodeConfig, HubertAsrConfig, SslConfig
from icefall_kd.decode.ctc import CtcGreedySearch
from icefall_kd.decode.runner import build_decoder
from icefall_kd.errors import ConfigError
from icefall_kd.models.ssl import sample_rows
from icefall_kd.runtime.files import read_json
from icefall_kd.scoring import score
from icefall_kd.systems import build_system
from icefall_kd.train.checkpoint import load_checkpoint, save_checkpoint
from icefall_kd.train.loop import train
from tests.train.toy import same_weights


@pytest.fixture(scope="module")
def cmvn(tmp_path_factory):
    return write_cmvn(tmp_path_factory.mktemp("cmvn") / "cmvn.safetensors")


def make(config, seed=7):
    torch.manual_seed(seed)
    return build_system(config, VOCAB)


def run(exp_dir, seed=7, **options):
    config = hubert_config(exp_dir=exp_dir, **options)
    system = make(config, seed)
    first = {name: value.clone() for name, value in system.state_dict().items()}
    result = train(system, SpeechData(), config, tokenizer_hash="abc")
    return result, first, system.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_ten_utterances_are_learnt_by_heart(kind, cmvn):
    batch = speech_batch(3, seconds=[0.6 + 0.03 * i for i in range(10)])
    system = make(hubert_config(kind, cmvn=cmvn, ssl={"feature_grad_scale": 1.0}))
    optimizer = torch.optim.AdamW(system.parameters(), lr=0.004)
    wanted = [list(map(str, row)) for row in batch.y.tolist()]
    for step in range(400):
        optimizer.zero_grad()
        system.losses(batch, step).total.div(10).backward()
        torch.nn.utils.clip_grad_norm_(system.parameters(), 5.0)
        optimizer.step()
        if step % 20 == 19:
            system.eval()
            with torch.no_grad():
                found = CtcGreedySearch(system.model).decode(*system.encode(batch))
            system.train()
            said = [list(map(str, hyps[0].tokens)) for hyps in found]
            if score(wanted, said, batch.ids, "token").error_rate == 0:
                return
    raise AssertionError(f"after {step + 1} steps {said} is said for {wanted}")


def test_the_heads_alone_learn_in_the_frozen_steps(tmp_path):
    options = {"tune": {"freeze_steps": 3, "time_mask_prob": 0.5}, "optim": {"weight_decay": 0.5}}
    for steps, moves in ((3, False), (4, True)):
        _, first, last = run(tmp_path / str(steps), max_steps=steps, **options)
        body = [n for n in first if n.startswith(("model.encoder.", "model.mask_embedding"))]
        assert len(body) > 30 and any(not torch.equal(first[n], last[n]) for n in body) == moves
        assert all(not torch.equal(first[n], last[n]) for n in first if n.startswith("model.ctc_output."))


def test_a_share_of_the_planned_steps_is_frozen(tmp_path):
    ends = [run(tmp_path / str(n), tune={"freeze_steps": n}, num_epochs=2)[2] for n in (3, 0.5)]
    assert same_weights(*ends)
    with pytest.raises(ConfigError, match=r"--freeze-steps is 2\.5; give whole steps, or a share below 1"):
        HubertAsrConfig(freeze_steps=2.5)


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_training_is_the_same_bit_by_bit(tmp_path, stop):
    options = {
        "tune": {"freeze_steps": 3, "time_mask_prob": 0.6, "channel_mask_prob": 0.5, "channel_mask_span": 4},
        "model": {"dropout": 0.1},
        "optim": {"lr_schedule": "tri_stage"},
    }
    whole, _, expected = run(tmp_path / "whole", **options)
    # Not by max_steps, of which the schedule makes its plan; the loop reads one batch ahead.
    parts = hubert_config(exp_dir=tmp_path / "parts", **options)
    system = make(parts)

    class Cut(SpeechData):
        def train_batches(self, epoch, skip):
            for i, batch in enumerate(super().train_batches(epoch, skip), skip):
                if 3 * (epoch - 1) + i == stop:
                    raise KeyboardInterrupt
                yield batch

    parts = dataclasses.replace(parts, loop=dataclasses.replace(parts.loop, save_every_n=1))
    with pytest.raises(KeyboardInterrupt):
        train(system, Cut(), parts, tokenizer_hash="abc")
    saved = load_checkpoint(tmp_path / f"parts/checkpoint-{stop - 1}.pt")
    assert saved["train"]["step"] == stop - 1
    resumed = make(parts, seed=8)
    result = train(resumed, SpeechData(), parts, tokenizer_hash="abc")
    assert same_weights(expected, resumed.state_dict()) and result["valid"] == whole["valid"]


def test_convolutions_stay_as_they_are_without_their_gradient(tmp_path):
    _, first, last = run(tmp_path, ssl={"feature_grad_scale": 0.0}, optim={"weight_decay": 0.5})
    front = "model.encoder.subsampling."
    for name in first:
        still = name.startswith((f"{front}convolutions", f"{front}inner_norms")) or name.endswith("k_proj.bias")
        assert torch.equal(first[name], last[name]) == still or name.endswith("k_proj.bias"), name


def test_masks_are_spans_of_their_own_in_each_row():
    torch.manual_seed(0)
    lens = [100, 40, 9, 200] * 50
    mask = sample_rows(lens, 200, 0.65, 10, least=2)
    for row, length in zip(mask, lens, strict=True):
        assert not row[length:].any()
        if length < 10:
            assert not row.any()
            continue
        edges = torch.nn.functional.pad(row.int(), (1, 1)).diff()
        runs = (edges == -1).nonzero() - (edges == 1).nonzero()
        assert (runs >= 10).all() and row.sum() >= 11
    # Spans begin at different frames, each as likely: a frame escapes n of them with about (1 - 10 / 191)^n.
    share = mask[3::4].float().mean()
    assert abs(float(share) - (1 - (1 - 10 / 191) ** 13)) < 0.02
    assert len({int(row.sum()) for row in mask[3::4]}) > 5  # nobody is cut to the least
    assert not sample_rows([64] * 20, 64, 0.0, 8).any()


def test_masked_frames_are_the_embedding_and_masked_channels_are_silent():
    tune = {"time_mask_prob": 0.5, "channel_mask_prob": 0.5, "channel_mask_span": 4}
    system = make(hubert_config(tune=tune))
    lens = torch.tensor([50, 8])
    x = torch.rand(2, 50, 32) + 2.0
    y = system._masked(x, lens)
    silent = (y == 0).all(dim=1, keepdim=True)  # (N, 1, C)
    embedded = torch.isclose(y, system.model.mask_embedding) | silent
    same = (y == x) | silent
    assert 0 < silent[0].sum() < 32
    masked = embedded.all(dim=2)
    assert (masked | same.all(dim=2)).all() and 20 <= masked[0].sum() < 50 and not masked[1].any()
    batch = speech_batch()
    before = system.eval().losses(batch, 0).total
    plain = make(hubert_config())
    plain.load_state_dict(system.inference_state_dict())
    assert torch.equal(before, plain.eval().losses(batch, 0).total)  # validation masks nothing
    with pytest.raises(ConfigError, match="--channel-mask-span 64 is more than the 32 channels"):
        make(hubert_config(tune={"channel_mask_prob": 0.5}))


def test_it_starts_from_a_distilled_model_without_its_heads(tmp_path, cmvn):
    state = pretrained(tmp_path / "student", "deep_thin_fbank", cmvn)
    options = {"tune": {"freeze_steps": 1, "time_mask_prob": 0.5}, "init_from": tmp_path / "student", "max_steps": 1}
    _, _, last = run(tmp_path / "exp", kind="deep_thin_fbank", **options)
    for name, value in state.items():
        if name in last:  # the frozen step has changed nothing of the body
            assert torch.equal(last[name], value), name
    assert set(state) - set(last) == {"model.cluster_head.final_proj.weight", "heads.layers.0.weight"}
    report = read_json(tmp_path / "exp/transfer.json")["tensors"]
    assert sorted(report["missing"]) == ["model.ctc_output.bias", "model.ctc_output.weight"]
    assert "model.mask_embedding" in report["loaded"] and "model.encoder.subsampling.cmvn_std" in report["loaded"]


def test_log_mel_statistics_never_go_missing(tmp_path, cmvn):
    pretrained(tmp_path / "teacher")
    options = {"kind": "deep_thin_fbank", "init_from": tmp_path / "teacher", "max_steps": 1}
    with pytest.raises(ConfigError, match=r"no statistics of log-mel features.*give --cmvn FILE"):
        run(tmp_path / "without", **options)
    _, _, last = run(tmp_path / "with", cmvn=cmvn, **options)
    assert (last["model.encoder.subsampling.cmvn_std"] == 3).all()
    with pytest.raises(ConfigError, match="--front-end fbank needs --cmvn FILE"):
        make(hubert_config("deep_thin_fbank"))


def test_a_tuned_model_decodes_without_what_training_needs(tmp_path):
    tokenizer = tokenizer_of("char")
    write_student(tmp_path, tokenizer, hubert_config(tune={"time_mask_prob": 0.5, "freeze_steps": 0.5}))
    content = load_checkpoint(tmp_path / "epoch-1.pt")
    for part in ("model", "model_avg"):
        content[part]["model.mask_embedding"] = torch.zeros(32)
    save_checkpoint(tmp_path / "epoch-1.pt", content)
    system = load(tmp_path).system
    assert not any("mask_embedding" in name for name in system.state_dict())
    decoder = build_decoder(system, DecodeConfig(exp_dir=tmp_path, decoding_method="ctc_greedy_search"))
    with torch.no_grad():
        assert len(decoder.decode(*system.encode(speech_batch()))) == 3
    # A loss in nothing but CTC has no transducer's searches.
    assert CTC["transducer_scale"] == 0 and "greedy_search" not in system.decoders()


def test_options_of_fine_tuning_are_of_this_system():
    config = hubert_config(tune={"freeze_steps": 5})
    other = dataclasses.replace(config, system="mvq", hubert=type(config.hubert)(), ssl=SslConfig())
    with pytest.raises(ConfigError, match="--freeze-steps is of --system hubert"):
        build_system(other, VOCAB)
    with pytest.raises(ConfigError, match=r"--time-mask-prob is 1\.5; it must lie in 0 \.\.\. 1"):
        HubertAsrConfig(time_mask_prob=1.5)
