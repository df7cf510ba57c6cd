"""The dual-mode recogniser with right context, with a front end that hears samples, and its masks of the beginning."""

import dataclasses
import json

import pytest
import soundfile
import torch
from dual_toys import VOCAB, batch_of, dual_config, dual_system, train_dual
from streaming_toys import encoder
from students import babble, load, tokenizer_of, write_student

from icefall_kd.config import AugmentConfig, DecodeConfig, ExportConfig, SslConfig
from icefall_kd.decode.runner import build_decoder
from icefall_kd.decode.streaming import Stream
from icefall_kd.errors import ConfigError
from icefall_kd.export.exporter import export
from icefall_kd.frames import algorithmic_latency
from icefall_kd.models.conformer import Conformer
from icefall_kd.models.pruning import prunable_layers
from icefall_kd.models.ssl import set_front_end
from icefall_kd.models.streaming import Chunks
from icefall_kd.recipe import decode
from icefall_kd.systems import build_system
from icefall_kd.train.checkpoint import load_checkpoint
from icefall_kd.train.guards import parameters_without_gradient
from icefall_kd.train.metrics import read_metrics

SPARSE = {"sparsity": 0.5, "prune_end_step": 0}
WAVEFORM = {"front_end": "waveform", "extractor_channels": 8}


def losses(system, batch) -> dict[str, float]:
    """Run one batch forward and backward; return all losses."""
    found = {}
    count = system.passes(batch, 5)
    torch.manual_seed(3)
    for i in range(count):
        terms = system.losses(batch, 5) if count == 1 else system.losses(batch, 5, i)
        terms.total.backward()
        found |= {name: float(term.value) for name, term in terms.terms.items()}
    return found


@pytest.mark.parametrize("kind", ["copy", "mask"])
def test_right_context_is_of_the_streaming_mode_alone(kind):
    plain, wider = (dual_system(dual=SPARSE, model={"right_context": r, "right_context_kind": kind}) for r in (0, 2))
    before, now = losses(plain, batch_of()), losses(wider, batch_of())
    assert before.keys() == now.keys()
    for name, value in now.items():
        assert (value == before[name]) == name.startswith("full"), name
    assert parameters_without_gradient(wider) == []


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """A folder of recordings with transcripts."""
    folder = tmp_path_factory.mktemp("audio")
    for i, name in enumerate(("a", "b")):
        soundfile.write(folder / f"{name}.wav", babble(20_000 + 7003 * i, i), 16000)
    (folder / "speech.trans.txt").write_text("a ONE TWO\nb THREE\n")
    return folder


def results_both_ways(exp_dir, audio, **options):
    """Decode under a mask and with caches; return both results and their n-best lists."""
    found = []
    for chunk_by_chunk in (False, True):
        config = DecodeConfig(
            exp_dir=exp_dir,
            test_parts=[str(audio)],
            device="cpu",
            bootstrap=0,
            chunk_by_chunk=chunk_by_chunk,
            **options,
        )
        (result,) = decode(config).values()
        lines = next(exp_dir.glob(f"*/nbest-*-{result['suffix']}.jsonl")).read_text().splitlines()
        found.append((result, [json.loads(line)["nbest"][0] for line in lines]))
    return found


@pytest.mark.parametrize("kind, ahead", [("copy", 3), ("mask", 3 + 4)])
def test_a_model_with_right_context_streams_what_the_mask_gives(tmp_path, audio, kind, ahead):
    config = dual_config(SPARSE, {"right_context": 3, "right_context_kind": kind})
    exp_dir = write_student(tmp_path, tokenizer_of("char"), config)
    (masked, a), (caches, b) = results_both_ways(exp_dir, audio, decode_chunk_size=4, left_context_frames=8)
    assert [h["tokens"] for h in a] == [h["tokens"] for h in b] and any(h["tokens"] for h in a)
    for result in (masked, caches):
        assert (result["right_context"], result["right_context_kind"]) == (3, kind)
        assert result["algorithmic_latency"] == pytest.approx(0.04 * (4 + ahead) + 0.0575)
    # Samples as they come.
    loaded = load(exp_dir, decode_chunk_size=4, left_context_frames=8, chunk_by_chunk=True)
    samples, _ = soundfile.read(audio / "a.wav", dtype="float32")
    assert streamed(loaded, torch.from_numpy(samples)) == a[0]["tokens"]


def streamed(loaded, samples: torch.Tensor, block: int = 1777) -> list[int]:
    """Return the tokens that a stream of samples gives."""
    encoder = loaded.system.model.encoder
    stream = Stream(encoder, build_decoder(loaded.system, DecodeConfig()), encoder.chunks)
    for piece in samples.split(block):
        stream.accept(piece)
    stream.finish()
    return stream.hypothesis().tokens


def test_right_context_is_not_exported(tmp_path):
    config = dual_config(model={"right_context": 2, "convolution": "causal"})
    exp_dir = write_student(tmp_path / "exp", tokenizer_of("char"), dataclasses.replace(config, system="mvq"))
    options = {"exp_dir": exp_dir, "format": "torchscript"}
    with pytest.raises(ConfigError, match="trained with --right-context 2, which is not exported"):
        export(ExportConfig(**options, out_dir=tmp_path / "out", decode_chunk_size=4))
    export(ExportConfig(**options, out_dir=tmp_path / "whole", decode_chunk_size=-1))


def test_masks_are_compared_with_those_of_the_beginning(tmp_path):
    options = {"dual": {**SPARSE, "mask_interval": 2}}
    train_dual(tmp_path / "first", dual=SPARSE, loop={"max_steps": 1})
    start = {"init_from": tmp_path / "first"}
    _, whole = train_dual(tmp_path / "whole", loop=start, **options)
    train_dual(tmp_path / "parts", loop={**start, "max_steps": 3}, **options)
    _, parts = train_dual(tmp_path / "parts", seed=8, **options)  # resumed, without --init-from
    figures = [
        [
            r["figures"]["iou_start"]
            for r in read_metrics(tmp_path / name / "log/metrics.jsonl", "train")
            if "figures" in r
        ]
        for name in ("whole", "parts")
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 7
    before, now = load_checkpoint(tmp_path / "first/checkpoint-1.pt")["model"], whole.state_dict()
    masks = [name for name in now if name.endswith(".mask")]
    both, either = (
        sum(int(of(before[name], now[name]).sum()) for name in masks) for of in (torch.logical_and, torch.logical_or)
    )
    assert both < either and figures[0][-1] == both / either
    assert now.keys() == before.keys()  # nothing of it is in a checkpoint
    for a, b in zip(prunable_layers(whole).values(), prunable_layers(parts).values(), strict=True):
        assert torch.equal(a.mask, b.mask)
    # A training that begins with no masks has nothing to compare, whatever lies in its folder.
    (tmp_path / "new").mkdir()
    (tmp_path / "whole/start_masks.safetensors").rename(tmp_path / "new/start_masks.safetensors")
    train_dual(tmp_path / "new", loop={"max_steps": 2}, **options)
    last = read_metrics(tmp_path / "new/log/metrics.jsonl", "train")[-1]
    assert "iou" in last["figures"] and "iou_start" not in last["figures"]


def with_audio(batch):
    torch.manual_seed(1)
    return dataclasses.replace(batch, audio=0.1 * torch.randn(4, 120 * 160), audio_lens=batch.x_lens * 160)


def waveform_config(dual=(), ssl=(), model=()):
    """Return a configuration of a recogniser that hears samples."""
    config = dual_config({**SPARSE, **dict(dual)}, model)
    return dataclasses.replace(config, ssl=SslConfig(**WAVEFORM, **dict(ssl)), augment=AugmentConfig(spec_aug=False))


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.0])
def test_a_recogniser_that_hears_samples_trains(scale):
    torch.manual_seed(7)
    system = build_system(waveform_config({"dual_kd_scale": 0.3}, {"feature_grad_scale": scale}), VOCAB)
    system.after_step(0)
    assert system.needs_audio and system.hears_samples
    assert system.alignment_losses["num_encoder_frames"](100) == 49
    batch = with_audio(batch_of())
    found = losses(system, batch)
    assert {"full_pruned_loss", "streaming_ctc_loss", "mode_lattice_kd_loss"} <= found.keys()
    assert parameters_without_gradient(system) == []
    frames = sum((n * 160 - 400) // 320 + 1 for n in batch.x_lens.tolist())
    assert system.losses(batch, 0, 0).frames == frames
    first = system.model.encoder.subsampling.convolutions[0].weight
    assert first.requires_grad == (scale > 0) == (first.grad is not None)


def test_the_extractor_gets_its_share_of_the_gradient():
    grads = []
    for scale in (1.0, 0.1):
        torch.manual_seed(7)
        system = build_system(waveform_config(ssl={"feature_grad_scale": scale}), VOCAB)
        losses(system, with_audio(batch_of()))
        grads.append(system.model.encoder.subsampling.convolutions[3].weight.grad)
    torch.testing.assert_close(grads[1], 0.1 * grads[0], rtol=1e-4, atol=1e-6)
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize("right", [0, 2])
def test_samples_are_recognised_chunk_by_chunk(tmp_path, audio, right):
    config = waveform_config(model={"right_context": right})
    exp_dir = write_student(tmp_path, tokenizer_of("char"), config)
    (masked, a), (caches, b) = results_both_ways(exp_dir, audio, decode_chunk_size=4, left_context_frames=8)
    assert [h["tokens"] for h in a] == [h["tokens"] for h in b] and any(h["tokens"] for h in a)
    assert masked["algorithmic_latency"] == caches["algorithmic_latency"] == pytest.approx(0.02 * (4 + right) + 0.005)
    assert a[0]["times"] == [round(0.02 * t, 6) for t in a[0]["timestamps"]] and masked["frame_seconds"] == 0.02
    loaded = load(exp_dir, decode_chunk_size=4, left_context_frames=8, chunk_by_chunk=True)
    samples, _ = soundfile.read(audio / "a.wav", dtype="float32")
    assert streamed(loaded, torch.from_numpy(samples)) == a[0]["tokens"]
    (whole,) = decode(DecodeConfig(exp_dir=exp_dir, test_parts=[str(audio)], device="cpu", bootstrap=0)).values()
    assert whole["algorithmic_latency"] is None
    with pytest.raises(ConfigError, match="hears samples"):
        export(ExportConfig(exp_dir=exp_dir, out_dir=tmp_path / "out", format="torchscript"))


def hearing_samples(norm: str, **changes) -> Conformer:
    model = encoder("chunk", **changes)
    torch.manual_seed(2)
    set_front_end(model, SslConfig(**WAVEFORM, extractor_norm=norm))
    return model.eval()


@pytest.mark.parametrize("norm, leaks", [("layer_norm", False), ("default", True)])
def test_only_the_norm_over_utterances_hears_what_is_to_come(norm, leaks):
    model = hearing_samples(norm, right_context=2)
    model.chunks = Chunks(4, 8)
    audio = torch.randn(1, 320 * 30 + 80)
    lens = torch.tensor([audio.shape[1]])
    before = model(audio, lens).encoder_out
    for end in range(4, 28, 4):
        changed = audio.clone()
        first = 320 * (end + 2) + 80  # frame t hears samples up to 320 t + 399
        changed[:, first:] = torch.randn_like(changed[:, first:])
        after = model(changed, lens).encoder_out
        assert torch.equal(before[:, :end], after[:, :end]) != leaks, end
        assert not torch.allclose(before[:, end:], after[:, end:])


@pytest.mark.parametrize("size, right", [(4, 0), (8, 2), (16, 4)])
def test_chunks_of_samples_equal_the_whole(size, right):
    model, chunks = hearing_samples("layer_norm", right_context=right), Chunks(size, 8)
    model.chunks = chunks
    lens = torch.tensor([14_003, 400, 399, 5000])
    audio = torch.randn(4, 14_003)
    whole = model(audio, lens)
    window, hop = model.window(chunks)
    assert (window, hop) == (320 * (size + right) + 80, 320 * size)
    states, outs, total = model.init_states(4, chunks), [], 0
    for begin in range(0, 14_003, hop):
        piece = torch.nn.functional.pad(
            audio[:, begin : begin + window], (0, max(begin + window - 14_003, 0)), value=3.0
        )
        out, n, states = model.forward_chunk(piece, (lens - begin).clamp(0, window), states, size)
        outs.append(out)
        total = total + n
    assert total.tolist() == whole.encoder_out_lens.tolist() == [(n - 400) // 320 + 1 for n in lens.tolist()]
    for i, n in enumerate(total.tolist()):
        torch.testing.assert_close(torch.cat(outs, 1)[i, :n], whole.encoder_out[i, :n], rtol=0, atol=1e-4)
    assert algorithmic_latency(size, right, waveform=True) == pytest.approx(0.02 * (size + right) + 0.005)
    assert model.latency(chunks) == pytest.approx(0.02 * (size + right) + 0.005)


def test_front_ends_that_do_not_fit_are_refused():
    for change, message in (
        ({"ssl": SslConfig(**WAVEFORM, extractor_norm="default")}, "--extractor-norm default with --modes dual"),
        ({"augment": AugmentConfig(spec_aug=True)}, "--spec-aug true with --front-end waveform"),
        ({"ssl": SslConfig(**WAVEFORM, num_negatives=5)}, "--num-negatives is of --system dualmode --objective ssl"),
        ({"ssl": SslConfig(feature_grad_scale=0.5)}, "--feature-grad-scale is of"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_system(dataclasses.replace(waveform_config(), **change), VOCAB)
    full = dataclasses.replace(
        waveform_config({"sparsity": 0.0, "modes": "full"}), ssl=SslConfig(**WAVEFORM, extractor_norm="default")
    )
    losses(build_system(full, VOCAB), with_audio(batch_of()))
