"""Chunk-by-chunk recognition: equal to decoding under the mask, in every search, on files and on streams."""

import io
import itertools
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from micro_corpus import write_part

from icefall_kd.cli import config_to_dict
from icefall_kd.config import DecodeConfig, LoopConfig, ModelConfig, TrainConfig
from icefall_kd.data.features import FbankExtractor
from icefall_kd.decode.ctc import CtcGreedySearch
from icefall_kd.decode.streaming import Stream, encode_chunks, read_pcm16, read_recording
from icefall_kd.decode.transducer import GreedySearch, ModifiedBeamSearch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.models.streaming import Chunks
from icefall_kd.recipe import decode, part_batches
from icefall_kd.systems import build_system
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.checkpoint import save_checkpoint
from icefall_kd.train.state import write_config

torch.set_num_threads(1)

MODEL = ModelConfig(
    encoder_size="tiny",
    num_encoder_layers=2,
    encoder_dim=32,
    num_heads=2,
    feedforward_dim=32,
    cnn_kernel=5,
    subsampling_channels=(4, 6, 8),
    decoder_dim=16,
    joiner_dim=16,
    streaming=True,
    chunk_size=[4, 2, 8, -1],
    left_context_frames=[8, 4, 16],
)
TEXTS = {"utt-a": "ONE TWO", "utt-b": "THREE", "utt-c": "TWO THREE ONE"}
TOKENIZER = Tokenizer.train_char(TEXTS.values())


def lively(system):
    """Give an untrained system outputs that are neither all blank nor all tokens."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in system.named_parameters():
            if "joiner" in name or "ctc_output" in name:
                parameter.copy_(3.0 * torch.randn_like(parameter))
        system.model.joiner.output_linear.bias[0] += 6.0
    return system


@pytest.fixture(scope="module")
def system():
    torch.manual_seed(4)
    config = TrainConfig(model=MODEL)
    return lively(build_system(config, TOKENIZER.vocab_size, inference=True)).eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, system):
    """An exp_dir of a streaming student and a folder of noise with transcripts."""
    root = tmp_path_factory.mktemp("streaming")
    audio, exp_dir = root / "speech", root / "exp"
    audio.mkdir()
    rng = np.random.default_rng(0)
    for i, name in enumerate(TEXTS):
        soundfile.write(audio / f"{name}.wav", 0.1 * rng.standard_normal(16000 + 3333 * i), 16000)
    (audio / "speech.trans.txt").write_text("".join(f"{k} {v}\n" for k, v in TEXTS.items()))
    TOKENIZER.save(exp_dir / "tokenizer")
    config = TrainConfig(model=MODEL, loop=LoopConfig(exp_dir=exp_dir))
    write_config(exp_dir, config, 0)
    content = {"model": system.state_dict(), "model_avg": {k: v.double() for k, v in system.state_dict().items()}}
    train = {"step": 10, "average_period": 10}
    others = {"config": config_to_dict(config), "tokenizer_hash": TOKENIZER.hash, "train": train}
    save_checkpoint(exp_dir / "epoch-1.pt", content | others)
    return audio, exp_dir


def searches(system):
    return {
        "greedy": GreedySearch(system.model),
        "beam": ModifiedBeamSearch(system.model, 4, nbest=3),
        "ctc": CtcGreedySearch(system.model),
    }


def features_of(*lens):
    torch.manual_seed(11)
    return torch.randn(len(lens), max(lens), 80) * 3 - 6, torch.tensor(lens)


@pytest.mark.parametrize("chunks", [Chunks(4, 8), Chunks(3, 5), Chunks(8, 4)])
def test_searches_that_go_on_by_chunks_find_what_they_find_under_the_mask(system, chunks):
    features, x_lens = features_of(211, 7, 90, 53, 6)
    encoder = system.model.encoder
    encoder.chunks = chunks
    with torch.no_grad():
        out = encoder(features, x_lens)
        pieces = list(encode_chunks(encoder, features, x_lens, chunks))
    for name, search in searches(system).items():
        whole = search.decode(out.encoder_out, out.encoder_out_lens)
        if name == "ctc":
            encoder_out, lens = torch.cat([p[0] for p in pieces], 1), torch.stack([p[1] for p in pieces]).sum(0)
            found = search.decode(encoder_out, lens)
        else:
            state = search.start(len(features))
            for encoder_out, lens in pieces:
                search.advance(state, encoder_out, lens)
            found = search.result(state)
        assert sum(len(nbest[0].tokens) for nbest in whole) > 10  # there is something to compare
        for a, b in zip(whole, found, strict=True):
            assert [h.tokens for h in a] == [h.tokens for h in b], name
            assert [h.timestamps for h in a] == [h.timestamps for h in b], name
            assert [h.score for h in a] == pytest.approx([h.score for h in b], abs=1e-3), name


@pytest.mark.parametrize("method", ["greedy_search", "modified_beam_search", "ctc_greedy_search"])
def test_decode_py_gives_one_result_in_both_modes(trained, method, capsys):
    audio, exp_dir = trained
    base = {"exp_dir": exp_dir, "test_parts": [str(audio)], "decoding_method": method, "device": "cpu", "bootstrap": 0}
    options = {**base, "decode_chunk_size": 2, "left_context_frames": 4, "tail_padding": 0.3}
    masked = decode(DecodeConfig(**options))["speech"]
    caches = decode(DecodeConfig(**options, chunk_by_chunk=True))["speech"]
    assert "algorithmic latency 137.5 ms (chunks of 80 ms)" in capsys.readouterr().out
    assert masked["utterances"] == caches["utterances"] and masked["errors"] > 0
    assert masked["suffix"] != caches["suffix"]
    assert (caches["chunk_size"], caches["left_context_frames"]) == (2, 4)
    assert caches["algorithmic_latency"] == pytest.approx(0.1375)
    lines = [
        next((exp_dir / method).glob(f"nbest-speech-{r['suffix']}.jsonl")).read_text().splitlines()
        for r in (masked, caches)
    ]
    texts = [[json.loads(line)["nbest"][0]["tokens"] for line in run] for run in lines]
    assert texts[0] == texts[1]
    whole = decode(DecodeConfig(**base, decode_chunk_size=-1))["speech"]
    assert whole["algorithmic_latency"] is None and "latency: the whole utterance" in capsys.readouterr().out


def test_decode_py_refuses_what_the_model_was_not_trained_for(trained):
    audio, exp_dir = trained
    with pytest.raises(ConfigError, match=r"--decode-chunk-size is 1, but this .* with --chunk-size 4,2,8"):
        decode(DecodeConfig(exp_dir=exp_dir, test_parts=[str(audio)], device="cpu", decode_chunk_size=1))


def test_silence_behind_utterances_is_that_of_longer_recordings(trained, tmp_path):
    audio, exp_dir = trained
    longer = tmp_path / "longer"
    longer.mkdir()
    for name in TEXTS:
        samples, rate = soundfile.read(audio / f"{name}.wav")
        soundfile.write(longer / f"{name}.wav", np.pad(samples, (0, 4800)), rate)
    (longer / "longer.trans.txt").write_text((audio / "speech.trans.txt").read_text())
    tokenizer = Tokenizer.load(exp_dir / "tokenizer")
    padded = list(part_batches(tmp_path, str(audio), tokenizer, 100.0, tail_padding=0.3))
    wanted = list(part_batches(tmp_path, str(longer), tokenizer, 100.0))
    for a, b in zip(padded, wanted, strict=True):
        assert a.ids == b.ids and torch.equal(a.features, b.features) and torch.equal(a.x_lens, b.x_lens)
        assert [d + 0.3 for d in a.durations] == pytest.approx(b.durations)
    # Stored features get the frames of silence; those whose windows cross the end differ.
    write_part(tmp_path, "stored", [0.7, 0.5])
    (stored,) = part_batches(tmp_path / "fbank", "stored", tokenizer, 100.0, tail_padding=0.3)
    (fresh,) = part_batches(tmp_path / "manifests", "stored", tokenizer, 100.0, tail_padding=0.3)
    assert torch.equal(stored.x_lens, fresh.x_lens)
    for x, y, length in zip(stored.features, fresh.features, stored.x_lens.tolist(), strict=True):
        torch.testing.assert_close(x[length - 29 : length], y[length - 29 : length], rtol=0, atol=1e-3)
        torch.testing.assert_close(x[: length - 32], y[: length - 32], rtol=0, atol=0.1)


@pytest.mark.parametrize("block", [160, 1777, 100_000])
@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_a_stream_of_samples_gives_what_the_recording_gives(system, name, block):
    torch.manual_seed(2)
    wave, chunks = 0.1 * torch.randn(29_999), Chunks(4, 8)
    search = searches(system)[name]
    system.model.encoder.chunks = chunks
    features = FbankExtractor().extract(wave)
    with torch.no_grad():
        out = system.model.encoder(features.unsqueeze(0), torch.tensor([len(features)]))
    wanted = search.decode(out.encoder_out, out.encoder_out_lens)[0][0]
    stream, growing = Stream(system.model.encoder, search, chunks), []
    for samples in wave.split(block):
        stream.accept(samples)
        growing.append(stream.hypothesis().tokens)
    stream.finish()
    assert stream.hypothesis().tokens == wanted.tokens and wanted.tokens
    assert stream.hypothesis().timestamps == wanted.timestamps
    if name == "greedy":  # what is said is not taken back
        assert all(b[: len(a)] == a for a, b in itertools.pairwise(growing))


def test_nothing_comes_before_its_chunk_has_been_heard(system):
    wave, chunks = 0.1 * torch.randn(16_000), Chunks(4, 8)
    stream = Stream(system.model.encoder, GreedySearch(system.model), chunks)
    for samples in wave.split(80):
        stream.accept(samples)
        # Chunk k is there 57.5 ms behind its end at 160 (k + 1) ms.
        heard = stream.seconds - 0.0575 + 1e-9
        assert int(stream.encoder_state.processed_lens) == 4 * max(int(heard / 0.16), 0)


def test_utterances_without_a_frame_have_one_chunk_without_a_frame(system):
    with torch.no_grad():
        ((out, lens),) = encode_chunks(system.model.encoder, torch.zeros(2, 7, 80), torch.tensor([0, 0]), Chunks(4, 8))
    assert out.shape[:2] == (2, 4) and lens.tolist() == [0, 0]


@pytest.mark.parametrize("chunks", [Chunks(-1, -1), Chunks(4, -1)])
def test_a_stream_without_end_to_its_chunks_is_refused(system, chunks):
    with pytest.raises(ConfigError, match="needs a finite chunk and a finite left context"):
        Stream(system.model.encoder, GreedySearch(system.model), chunks)


def test_a_search_that_needs_whole_utterances_is_refused(system):
    with pytest.raises(ConfigError, match="CtcGreedySearch needs whole utterances"):
        Stream(system.model.encoder, CtcGreedySearch(system.model), Chunks(4, 8))


def test_samples_come_from_a_pipe_in_any_pieces():
    samples = np.random.default_rng(0).integers(-32768, 32767, 1001, dtype=np.int16)

    class Pipe(io.RawIOBase):
        data = samples.astype("<i2").tobytes()

        def read1(self, size):
            size = min(size, 7)
            piece, self.data = self.data[:size], self.data[size:]
            return piece

    found = torch.cat(list(read_pcm16(Pipe(), 100)))
    assert torch.equal(found, torch.from_numpy(samples.astype(np.float32)) / 32768)
    with pytest.raises(DataError, match="half a sample"):
        list(read_pcm16(io.BytesIO(b"abc"), 100))


def test_stream_wav_prints_partial_results_of_a_file_and_of_a_pipe(trained, repo):
    audio, exp_dir = trained
    file = audio / "utt-c.wav"
    line = [sys.executable, str(repo / "local/stream_wav.py"), "--exp-dir", str(exp_dir), "--device", "cpu"]
    line += ["--num-threads", "1", "--wav"]
    from_file = subprocess.run([*line, str(file)], capture_output=True, text=True, check=True).stdout
    raw, _ = soundfile.read(file, dtype="int16")
    done = subprocess.run([*line, "-"], input=raw.astype("<i2").tobytes(), capture_output=True, check=True)
    lines = [[x.split(" s", 1) for x in out.splitlines()] for out in (from_file, done.stdout.decode())]
    finals = [run[-1][1] for run in lines]
    assert finals[0] == finals[1] and finals[0].startswith("  final:  ") and len(finals[0]) > 15
    assert all(len(run) > 3 for run in lines)  # partial results came
    assert float(lines[0][-1][0]) == pytest.approx(len(raw) / 16000, abs=0.01)
    missing = subprocess.run([*line, str(audio / "no.wav")], capture_output=True, text=True)
    assert missing.returncode == 4 and "no.wav cannot be read" in missing.stderr
    for words in (["--block", "0"], ["--chunk-by-chunk", "false"]):
        refused = subprocess.run([*line, str(file), *words], capture_output=True, text=True)
        assert refused.returncode == 2 and " ".join(words) in refused.stderr.replace(" is 0.0", " 0")


def test_ctrl_c_ends_the_recorder_and_what_was_heard_is_printed(trained, repo):
    audio, exp_dir = trained
    line = [sys.executable, str(repo / "local/stream_wav.py"), "--exp-dir", str(exp_dir), "--device", "cpu"]
    raw, _ = soundfile.read(audio / "utt-c.wav", dtype="int16")
    with subprocess.Popen([*line, "--wav", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdin.write(raw.astype("<i2").tobytes())
        child.stdin.flush()
        child.stdout.readline()  # it listens
        child.send_signal(signal.SIGINT)
        child.stdin.close()
        printed = child.stdout.read().decode()
    assert child.returncode == 0 and "final:" in printed.splitlines()[-1]


def test_a_recording_of_another_rate_is_resampled_and_two_channels_are_refused(tmp_path):
    wave = np.sin(np.arange(8000) / 8000 * 2 * np.pi * 440)
    soundfile.write(tmp_path / "a.wav", wave, 8000)
    assert sum(map(len, read_recording(str(tmp_path / "a.wav"), 999))) == 16_000
    soundfile.write(tmp_path / "b.wav", np.stack([wave, wave], axis=1), 8000)
    with pytest.raises(DataError, match="2 channels"):
        read_recording(str(tmp_path / "b.wav"), 999)
