"""Exported HuBERT models: one graph of any length, equal to the model."""

import pytest
import torch
from hubert_asr_toys import KINDS, hubert_config, write_cmvn
from students import load, tokenizer_of, write_student

from icefall_kd.config import ExportConfig
from icefall_kd.data.features import snipped_fbank
from icefall_kd.errors import ConfigError
from icefall_kd.export.exporter import export
from icefall_kd.export.onnx_files import open_onnx


@pytest.fixture(scope="module")
def exp_dir(tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            cmvn = write_cmvn(folder / "cmvn.safetensors")
            config = hubert_config(kind, cmvn=cmvn, tune={"time_mask_prob": 0.5}, exp_dir=folder)
            made[kind] = write_student(folder, tokenizer_of("char"), config)
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_says_what_the_model_says_at_every_length(kind, exp_dir, tmp_path):
    record = export(ExportConfig(exp_dir=exp_dir(kind), out_dir=tmp_path / "out", format="onnx"))
    assert list(record["graphs"]) == ["ctc"] and record["checks"]["ctc.onnx"]["largest_difference"] < 1e-4
    assert record["hears"] == ("log_mel" if kind == "deep_thin_fbank" else "samples")
    assert record["frame_seconds"] == (0.04 if kind == "fithubert" else 0.02)
    run = open_onnx(tmp_path / "out/ctc.onnx")
    trained = load(exp_dir(kind)).system
    torch.manual_seed(3)
    for lens in ((5000,), (5160, 3999), (24000, 400, 12345)):
        lens = torch.tensor(lens)
        audio = torch.randn(len(lens), int(lens.max())) * 0.1
        audio = audio.masked_fill(torch.arange(audio.shape[1]) >= lens.unsqueeze(1), 0.0)
        with torch.no_grad():
            out = trained.model.encoder(audio, lens)
            expected = trained.model.ctc_output(out.encoder_out).log_softmax(-1)
        heard, heard_lens = audio, lens
        if record["hears"] == "log_mel":
            heard, heard_lens = snipped_fbank(audio), (lens - 400) // 160 + 1
        found, found_lens = run(heard, heard_lens)
        assert found_lens.tolist() == out.encoder_out_lens.tolist()
        for row, n in enumerate(found_lens):
            torch.testing.assert_close(found[row, :n], expected[row, :n], rtol=0, atol=1e-4)


def test_what_is_not_offered_is_refused(exp_dir, tmp_path):
    def refused(message, source=None, **options):
        with pytest.raises(ConfigError, match=message):
            export(ExportConfig(exp_dir=source or exp_dir("deep_thin"), out_dir=tmp_path / "out", **options))
        assert not (tmp_path / "out").exists()

    refused("is a HuBERT model with CTC, which is exported with --format onnx")
    refused("HuBERT models are exported in float32", format="onnx", quantize="int8")
    asr = {"transducer_scale": 1.0, "ctc_scale": 0.0}
    source = tmp_path / "transducer"
    source.mkdir()
    write_student(source, tokenizer_of("char"), hubert_config(asr=asr, model={"decoder_dim": 16, "joiner_dim": 16}))
    refused("exported with its CTC head", source, format="onnx")
