"""sherpa-onnx, which nobody here wrote, says what our greedy search says."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from students import STUDENTS, babble, load

from icefall_kd.config import ExportConfig
from icefall_kd.data.features import FbankExtractor
from icefall_kd.decode.streaming import encode_chunks
from icefall_kd.decode.transducer import GreedySearch
from icefall_kd.errors import ConfigError
from icefall_kd.export.exporter import export
from icefall_kd.export.sherpa import SherpaRecognizer

REPO = Path(__file__).resolve().parents[2]
SAMPLES = (9001, 33333, 64000)


def ours(trained, wave):
    """Return text and best hypothesis of our greedy search; a stream ends in silence that fills its last chunk."""
    encoder, search = trained.system.model.encoder, GreedySearch(trained.system.model)
    if encoder.cfg.streaming:
        num_chunks = -(-len(wave) // (4 * 160 * encoder.chunks.chunk_size))
        wave = np.pad(wave, (0, 8000))
    features = FbankExtractor(backend="lhotse").extract(torch.from_numpy(wave)).unsqueeze(0)
    x_lens = torch.tensor([features.shape[1]])
    with torch.no_grad():
        if encoder.cfg.streaming:
            state = search.start(1)
            for encoder_out, lens in itertools.islice(
                encode_chunks(encoder, features, x_lens, encoder.chunks), num_chunks
            ):
                search.advance(state, encoder_out, lens)
            best = search.result(state)[0][0]
        else:
            out = encoder(features, x_lens)
            best = search.decode(out.encoder_out, out.encoder_out_lens)[0][0]
    return trained.tokenizer.decode(best.tokens), best


@pytest.mark.parametrize("name", STUDENTS)
def test_sherpa_says_the_same_at_the_same_time(student, tmp_path, name):
    trained = load(student(name))
    export(ExportConfig(exp_dir=student(name), out_dir=tmp_path, quantize="int8"))
    recognizer, int8 = SherpaRecognizer(tmp_path), SherpaRecognizer(tmp_path, "int8")
    emitted = 0
    for seed, samples in enumerate(SAMPLES):
        wave = babble(samples, seed)
        text, best = ours(trained, wave)
        found = recognizer.transcribe(wave)
        assert found.text == text
        assert found.timestamps == pytest.approx([0.04 * frame for frame in best.timestamps])
        emitted += len(best.tokens)
        assert abs(len(int8.transcribe(wave).tokens) - len(best.tokens)) < 0.3 * len(best.tokens) + 3
    assert emitted > 20


def test_silence_behind_a_stream_is_heard(student, tmp_path):
    """More chunks are decoded, those before them as without it."""
    export(ExportConfig(exp_dir=student("streaming-bpe"), out_dir=tmp_path))
    recognizer, wave = SherpaRecognizer(tmp_path), babble(30000, 1)
    short, long = recognizer.transcribe(wave), recognizer.transcribe(wave, tail_padding=2.0)
    assert long.tokens[: len(short.tokens)] == short.tokens and len(long.tokens) >= len(short.tokens)


def test_a_recording_without_an_encoder_frame_is_no_text(student, tmp_path):
    export(ExportConfig(exp_dir=student("offline-char"), out_dir=tmp_path))
    recognizer = SherpaRecognizer(tmp_path)
    for samples in (0, 1, 79, 81, 1039):  # below 6.5 frames of 10 ms
        assert recognizer.transcribe(babble(samples, 0)).text == "", samples


def test_the_lines_that_the_pages_show_print_the_text(student, tmp_path, monkeypatch, capsys):
    blocks = []
    for page in ("README.md", "docs/export.md"):
        text = (REPO / page).read_text(encoding="utf-8")
        blocks += [x for x in re.findall(r"```python\n(.*?)```", text, flags=re.S) if "sherpa_onnx" in x]
    assert ["OnlineRecognizer" in block for block in blocks] == [False, False, True]
    monkeypatch.chdir(tmp_path)
    wave = babble(40000, 2)
    soundfile.write("speech.wav", wave, 16000, subtype="FLOAT")
    for block in blocks:
        name = "streaming-bpe" if "OnlineRecognizer" in block else "offline-char"
        export(ExportConfig(exp_dir=student(name), out_dir=Path("exported")))
        exec(block, {})
        text = " ".join(capsys.readouterr().out.splitlines()[-1].split())
        expected = ours(load(student(name)), wave)[0]
        # The stream of the page hears more silence at its end.
        assert expected and (text.startswith(expected) if name == "streaming-bpe" else text == expected)


def test_other_exports_are_refused(student, tmp_path):
    export(ExportConfig(exp_dir=student("offline-char"), out_dir=tmp_path, format="onnx"))
    with pytest.raises(ConfigError, match="export with --format sherpa-onnx"):
        SherpaRecognizer(tmp_path)
    export(ExportConfig(exp_dir=student("offline-char"), out_dir=tmp_path))
    with pytest.raises(ConfigError, match="export with --quantize int8"):
        SherpaRecognizer(tmp_path, "int8")
