"""Export of CIF recognisers: the graphs, and the driver that needs nothing of this project."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hkd_toys import hkd_config
from students import babble, write_student

from icefall_kd.config import DecodeConfig, ExportConfig
from icefall_kd.data.features import FbankExtractor
from icefall_kd.decode.cif_beam import CifGreedySearch
from icefall_kd.errors import ConfigError
from icefall_kd.export.exporter import export
from icefall_kd.export.onnx_files import open_onnx
from icefall_kd.frames import pooled_seconds
from icefall_kd.recipe import load_system
from icefall_kd.text.tokenizer import Tokenizer

pytest.importorskip("onnxruntime")
TOKENS = Tokenizer.train_char(["ONE TWO THREE"])
DRIVER = Path(__file__).parents[2] / "local/onnx_cif.py"


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory):
    """An untrained recogniser that fires now and then and says all kinds of tokens."""
    return write_student(tmp_path_factory.mktemp("recogniser"), TOKENS, hkd_config())


@pytest.fixture(scope="module")
def exported(recogniser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export(ExportConfig(exp_dir=recogniser, out_dir=folder, format="onnx"))
    return folder


def load_driver():
    spec = importlib.util.spec_from_file_location("onnx_cif", DRIVER)
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    return driver


def trained(recogniser):
    return load_system(DecodeConfig(exp_dir=recogniser, device="cpu"))


def test_lengths_are_exact_and_vectors_and_logits_equal_the_models(recogniser, exported):
    record = json.loads((exported / "export.json").read_text())
    assert record["files"] == {"fp32": {"encoder": "encoder.onnx", "decoder_step": "decoder_step.onnx"}}
    assert all(check["largest_difference"] < 1e-4 for check in record["checks"].values())
    model, lengths = trained(recogniser).system.model, set()
    encoder, step = open_onnx(exported / "encoder.onnx"), open_onnx(exported / "decoder_step.onnx")
    for seed in range(12):
        torch.manual_seed(seed)
        lens = torch.randint(3, 400, (3,))
        features = torch.randn(3, int(lens.max()), 80) * 4 - 6
        c, c_lens, frames = encoder(features, lens)
        with torch.no_grad():
            out = model.encoder(torch.nn.functional.pad(features, (0, 0, 0, 7)), lens)
            fired = model.fire(out.encoder_out, out.encoder_out_lens)
        assert torch.equal(c_lens, fired.lens)
        for i, n in enumerate(c_lens.tolist()):
            torch.testing.assert_close(c[i, :n], fired.c[i, :n], atol=1e-4, rtol=1e-4)
            assert torch.equal(frames[i, :n], fired.weights[i, :n].argmax(dim=1))
            assert not c[i, n:].any()
            lengths.add(n)
    assert len(lengths) > 5
    # A whole text, step by step, against one call of the model's decoder.
    n = int(c_lens.max())
    y = torch.randint(3, 9, (3, n))
    y[:, 0] = model.sos_id
    layers, heads, width = record["cache"]
    keys = values = torch.zeros(layers, 3, heads, 0, width)
    logits, before = [], torch.zeros_like(c[:, 0])
    for u in range(n):
        found, keys, values = step(y[:, u], before, c[:, u].contiguous(), keys, values)
        before = c[:, u].contiguous()
        logits.append(found)
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(logits, dim=1), model.decoder(y, c[:, :n])[0], atol=1e-4, rtol=1e-4)


def test_the_driver_finds_what_greedy_search_finds(recogniser, exported):
    driver, system, texts = load_driver(), trained(recogniser).system, set()
    # The last ones: an odd length, one frame of the encoder, none, not one window.
    for seed, num_samples in enumerate((48000, 31000, 80000, 2000, 16001, 400, 560, 100)):
        wave = babble(num_samples, seed)
        features = FbankExtractor(backend="lhotse").extract(torch.from_numpy(wave))
        features = torch.nn.functional.pad(features, (0, 0, 0, 7), value=-23.0).unsqueeze(0)
        with torch.no_grad():
            out = system.model.encoder(features, torch.tensor([features.shape[1] - 7]))
            (hyp,) = CifGreedySearch(system.model).decode(out.encoder_out, out.encoder_out_lens)[0]
        text, seconds = driver.recognise(exported, np.asarray(wave))
        assert text == TOKENS.decode(hyp.tokens)
        assert seconds == pytest.approx([pooled_seconds(t) for t in hyp.timestamps])
        texts.add(text)
    assert len(texts) > 3


def test_another_frame_rate_and_no_ctc_head_are_exported_too(tmp_path):
    cif = {"pool_layers": [2], "cif_ctc_scale": 0.0, "cif_initial_rate": 0.5}
    exp_dir = write_student(tmp_path / "exp", TOKENS, hkd_config(cif=cif))
    export(ExportConfig(exp_dir=exp_dir, out_dir=tmp_path / "out", format="onnx"))
    driver, search = load_driver(), CifGreedySearch(trained(exp_dir).system.model)
    wave = babble(32000, 0)
    features = FbankExtractor(backend="lhotse").extract(torch.from_numpy(wave)).unsqueeze(0)
    with torch.no_grad():
        out = search.model.encoder(features, torch.tensor([features.shape[1]]))
    (hyp,) = search.decode(out.encoder_out, out.encoder_out_lens)[0]
    text, seconds = driver.recognise(tmp_path / "out", wave)
    assert text == TOKENS.decode(hyp.tokens) and hyp.tokens
    assert seconds == pytest.approx([0.04 * t for t in hyp.timestamps])


def test_the_driver_is_short_and_does_without_this_project(exported, tmp_path):
    text = DRIVER.read_text()
    assert "icefall_kd" not in text and "torch" not in text
    assert len([line for line in text.split('"""', 2)[2].splitlines() if line.strip()]) <= 44
    soundfile.write(tmp_path / "eight.wav", babble(8000, 0), 8000)
    command = [sys.executable, str(DRIVER), str(exported), str(tmp_path / "eight.wav")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0 and "give it 16000 and one channel" in run.stderr and "Traceback" not in run.stderr


def test_the_threshold_of_the_tail_is_that_of_the_export(recogniser, tmp_path):
    export(ExportConfig(exp_dir=recogniser, out_dir=tmp_path / "never", format="torchscript", tail_threshold=1.0))
    assert json.loads((tmp_path / "never/export.json").read_text())["tail_threshold"] == 1.0
    never = torch.jit.load(tmp_path / "never/encoder.pt")
    model, lens = trained(recogniser).system.model, torch.arange(20, 320, 20)
    features = torch.randn(len(lens), 300, 80) * 4 - 6
    with torch.no_grad():
        out = model.encoder(torch.nn.functional.pad(features, (0, 0, 0, 7)), lens)
        quantity = model.fire(out.encoder_out, out.encoder_out_lens).quantity
    found = never(features, lens)[1]
    assert torch.equal(found, torch.floor(quantity + 1e-4).long())
    assert (quantity - found > 0.4).any()  # of which the usual threshold makes one more


def test_what_would_change_the_lengths_or_is_not_run_is_refused(recogniser, tmp_path):
    with pytest.raises(ConfigError, match="other weights would change how many tokens it hears"):
        export(ExportConfig(exp_dir=recogniser, out_dir=tmp_path / "out", format="onnx", quantize="int8"))
    with pytest.raises(ConfigError, match=r"is a CIF recogniser, which sherpa-onnx does not run.*local/onnx_cif.py"):
        export(ExportConfig(exp_dir=recogniser, out_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
