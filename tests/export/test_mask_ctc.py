"""Export of Mask-CTC students: the graphs, and the driver that needs nothing of this project."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from nar_toys import nar_config, write_exp_dir

from icefall_kd.config import DecodeConfig, ExportConfig
from icefall_kd.data.features import FbankExtractor
from icefall_kd.decode.mask_ctc import MaskPredict
from icefall_kd.errors import ConfigError
from icefall_kd.export.exporter import export
from icefall_kd.export.onnx_files import open_onnx
from icefall_kd.recipe import load_system
from icefall_kd.text.tokenizer import Tokenizer
from tests.students import babble

pytest.importorskip("onnxruntime")
TOKENS = Tokenizer.train_char(["ONE TWO THREE"])
DRIVER = Path(__file__).parents[2] / "local/onnx_mask_predict.py"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    exp_dir = tmp_path_factory.mktemp("student")
    write_exp_dir(exp_dir, nar_config(), TOKENS)
    return exp_dir


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export(ExportConfig(exp_dir=student, out_dir=folder, format="onnx", quantize="int8"))
    return folder


def load_driver():
    spec = importlib.util.spec_from_file_location("onnx_mask_predict", DRIVER)
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    return driver


def trained(student):
    return load_system(DecodeConfig(exp_dir=student, device="cpu"))


def test_outputs_equal_the_models_within_the_tolerance(student, exported):
    record = json.loads((exported / "export.json").read_text())
    assert record["files"]["fp32"] == {"encoder": "encoder.onnx", "masked_decoder": "masked_decoder.onnx"}
    assert record["mask_id"] == TOKENS.mask_id and record["blank_id"] == 0
    # Log-probabilities of the toy reach -1000, where float32 numbers are 0.00006 apart.
    checks = [record["checks"][file] for file in record["files"]["fp32"].values()]
    assert all(c["relative_rms_difference"] < 1e-6 and c["largest_difference"] < 1e-3 for c in checks)
    model = trained(student).system.model
    features, lens = torch.randn(3, 230, 80) * 4 - 6, torch.tensor([230, 101, 9])
    encoder_out, out_lens, log_probs = open_onnx(exported / "encoder.onnx")(features, lens)
    with torch.no_grad():
        expected = model.encoder(features, lens)
        assert torch.equal(out_lens, expected.encoder_out_lens)
        y, y_lens = torch.tensor([[3, 11, 4, 11], [11, 5, 0, 0], [11, 0, 0, 0]]), torch.tensor([4, 2, 1])
        memory = model.decoder.memory(expected.encoder_out, out_lens)
        logits = open_onnx(exported / "masked_decoder.onnx")(encoder_out, out_lens, y, y_lens)[0]
        for i, (t, u) in enumerate(zip(out_lens.tolist(), y_lens.tolist(), strict=True)):
            wanted = model.ctc_log_probs(expected.encoder_out)[i, :t]
            torch.testing.assert_close(log_probs[i, :t], wanted, atol=1e-4, rtol=1e-4)
            wanted = model.decoder(y, y_lens, memory)[i, :u]
            torch.testing.assert_close(logits[i, :u], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("passes", [10, 2])
def test_the_driver_finds_what_mask_predict_finds(student, exported, monkeypatch, passes):
    driver = load_driver()
    monkeypatch.setattr(driver, "PASSES", passes)
    system = trained(student).system
    search = MaskPredict(system.model, passes=passes, mask_threshold=driver.THRESHOLD)
    masked = []
    for seed, num_samples in enumerate((48000, 31000, 80000, 2000, 16000, 100)):
        wave = babble(num_samples, seed)
        features = FbankExtractor(backend="lhotse").extract(torch.from_numpy(wave))
        features = torch.nn.functional.pad(features, (0, 0, 0, 7), value=-23.0).unsqueeze(0)
        lens = torch.tensor([features.shape[1] - 7])
        with torch.no_grad():
            out = system.model.encoder(features, lens)
            (hyp,) = search.decode(out.encoder_out, out.encoder_out_lens)[0]
        assert driver.recognise(exported, np.asarray(wave)) == TOKENS.decode(hyp.tokens)
        masked.append(hyp.masked)
    assert max(masked) >= 4 and min(masked) == 0  # with two passes, several masks a pass; and none at all


@pytest.mark.parametrize("texts", [["DA QI", "A  B"], ["\u4f60\u597d\u4e2d\u56fd"]], ids=["char", "pinyin"])
def test_the_driver_writes_tokens_as_the_tokenizer_does(tmp_path, texts, monkeypatch):
    kind = Tokenizer.train_char if texts[0].isascii() else Tokenizer.train_pinyin
    tokens = kind(texts)
    tokens.save(tmp_path)
    said = tokens.encode(texts[-1])
    driver = load_driver()
    monkeypatch.setattr(driver, "THRESHOLD", 0.0)
    facts = {"blank_id": 0, "sos_id": 1, "unk_id": 2, "mask_id": tokens.mask_id}
    (tmp_path / "export.json").write_text(json.dumps(facts))
    frames = [i for token in said for i in (token, 0)]

    class Session:
        """An encoder that says these tokens, with a blank between each two."""

        def __init__(self, path, providers):
            assert path.suffix == ".onnx" and providers

        def run(self, outputs, inputs):
            log_probs = np.full((1, len(frames), tokens.vocab_size), -9.0, np.float32)
            log_probs[0, np.arange(len(frames)), frames] = 0.0
            return [np.zeros((1, len(frames), 4)), np.array([len(frames)]), log_probs]

    monkeypatch.setattr(driver.onnxruntime, "InferenceSession", Session)
    assert driver.recognise(tmp_path, babble(8000, 0)) == tokens.decode(said) != ""


def test_the_driver_refuses_audio_that_it_would_hear_wrongly(exported, tmp_path):
    soundfile.write(tmp_path / "eight.wav", babble(8000, 0), 8000)
    soundfile.write(tmp_path / "two.wav", np.zeros((16000, 2)), 16000)
    for name in ("eight.wav", "two.wav"):
        command = [sys.executable, str(DRIVER), str(exported), str(tmp_path / name)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode != 0 and "give it 16000 and one channel" in run.stderr and "Traceback" not in run.stderr


def test_the_driver_is_short_and_does_without_this_project():
    text = DRIVER.read_text()
    assert "icefall_kd" not in text and "torch" not in text
    code = [line for line in text.split('"""', 2)[2].splitlines() if line.strip()]
    assert len(code) <= 44


def test_what_is_no_student_or_no_format_of_one_is_refused(student, tmp_path):
    write_exp_dir(tmp_path / "teacher", nar_config("ar"), TOKENS)
    with pytest.raises(ConfigError, match="autoregressive teacher"):
        export(ExportConfig(exp_dir=tmp_path / "teacher", out_dir=tmp_path / "out", format="onnx"))
    with pytest.raises(ConfigError, match=r"--format sherpa-onnx: .* is a Mask-CTC student"):
        export(ExportConfig(exp_dir=student, out_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    record = export(ExportConfig(exp_dir=student, out_dir=tmp_path / "script", format="torchscript"))
    assert set(record["files"]["fp32"].values()) == {"encoder.pt", "masked_decoder.pt"}
