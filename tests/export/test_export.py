"""Exported graphs against the model, a loop over the graphs alone, and what export refuses."""

import re

import numpy as np
import onnx
import pytest
import torch
from students import load

from icefall_kd.config import ExportConfig
from icefall_kd.data.features import FbankExtractor
from icefall_kd.decode.transducer import GreedySearch
from icefall_kd.errors import ConfigError, NumericError
from icefall_kd.export import exporter
from icefall_kd.export.exporter import RECORD, export
from icefall_kd.export.onnx_files import open_onnx
from icefall_kd.runtime.files import read_json


def features_of(*lens):
    torch.manual_seed(3)
    return torch.randn(len(lens), max(lens), 80) * 4 - 6, torch.tensor(lens)


def greedy(graphs, encoder_out, context_size):
    """Decode (T', J) as somebody would who has the three graphs alone: one symbol a frame at most."""
    context, tokens = [-1] * (context_size - 1) + [0], []
    for frame in encoder_out:
        (decoder_out,) = graphs["decoder"](torch.tensor([context[-context_size:]]))
        (logit,) = graphs["joiner"](frame.unsqueeze(0), decoder_out)
        best = int(logit.argmax())
        if best not in (0, 2):
            context.append(best)
            tokens.append(best)
    return tokens


def opened(folder, precision="fp32"):
    files = read_json(folder / RECORD)["files"][precision]
    return {name: exporter._open(folder / file) for name, file in files.items()}


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
@pytest.mark.parametrize("name", ["offline-char", "offline-pinyin"])
def test_the_graphs_alone_find_what_greedy_search_finds(student, tmp_path, format, name):
    exp_dir = student(name)
    export(ExportConfig(exp_dir=exp_dir, out_dir=tmp_path / "out", format=format))
    system = load(exp_dir).system
    features, x_lens = features_of(301, 150, 61, 9)
    with torch.no_grad():
        out = system.model.encoder(features, x_lens)
    expected = [nbest[0].tokens for nbest in GreedySearch(system.model).decode(out.encoder_out, out.encoder_out_lens)]
    assert sum(map(len, expected)) > 20
    graphs = opened(tmp_path / "out")
    encoder_out, lens = graphs["encoder"](features, x_lens)
    context_size = system.model.decoder.context_size
    assert [greedy(graphs, x[:n], context_size) for x, n in zip(encoder_out, lens.tolist(), strict=True)] == expected


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
def test_an_utterance_does_not_depend_on_its_batch_and_may_be_too_short(student, tmp_path, format):
    export(ExportConfig(exp_dir=student("offline-char"), out_dir=tmp_path, format=format))
    encoder = opened(tmp_path)["encoder"]
    features, x_lens = features_of(97, 61, 8, 7, 6, 0)
    together, lens = encoder(features, x_lens)
    assert lens.tolist() == [23, 14, 1, 1, 0, 0]  # ((T - 1) // 2 - 1) // 2
    for i, (length, frames) in enumerate(zip(x_lens.tolist(), lens.tolist(), strict=True)):
        alone, alone_lens = encoder(features[i : i + 1, :length], x_lens[i : i + 1])
        assert alone_lens.tolist() == [frames]
        torch.testing.assert_close(alone[0, :frames], together[i, :frames], rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
@pytest.mark.parametrize("name", ["streaming-bpe", "streaming-chunk"])
def test_chunks_give_what_the_whole_utterance_gives_under_the_mask(student, tmp_path, format, name):
    export(ExportConfig(exp_dir=student(name), out_dir=tmp_path, format=format, decode_chunk_size=2))
    encoder = opened(tmp_path)["encoder"]
    system = load(student(name), decode_chunk_size=2, left_context_frames=8).system
    # 20 chunks of 2 frames; behind them one frame that the last chunk hears, and none that it does not.
    features, x_lens = features_of(165, 165, 165)
    with torch.no_grad():
        expected = system.model.joiner.encoder_proj(system.model.encoder(features, x_lens).encoder_out)
    layers, dim, past = 2, 32, 4 if name == "streaming-bpe" else 2
    caches = (torch.zeros(layers, 8, 3, dim), torch.zeros(layers, past, 3, dim))
    found = []
    for begin in range(0, 160, 8):
        out, *caches = encoder(features[:, begin : begin + 13], *caches, torch.full((3,), begin))
        found.append(out)
    found = torch.cat(found, dim=1)
    torch.testing.assert_close(found, expected[:, :40], rtol=0, atol=1e-4)


def test_a_streaming_model_is_exported_for_whole_utterances_too(student, tmp_path):
    record = export(ExportConfig(exp_dir=student("streaming-bpe"), out_dir=tmp_path, decode_chunk_size=-1))
    assert not record["streaming"] and set(record["graphs"]["encoder"]["inputs"]) == {"x", "x_lens"}


def test_int8_holds_every_matrix_in_bytes_and_stays_near(student, tmp_path):
    record = export(ExportConfig(exp_dir=student("offline-char"), out_dir=tmp_path, format="onnx", quantize="int8"))
    model = load(student("offline-char")).system.model
    linears = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Linear)]
    weights = onnx.load(tmp_path / record["files"]["int8"]["encoder"]).graph.initializer
    matrices = [tuple(x.dims) for x in weights if x.data_type == onnx.TensorProto.UINT8 and len(x.dims) == 2]
    expected = [(m.in_features, m.out_features) for m in [*linears, model.joiner.encoder_proj]]
    assert sorted(matrices) == sorted(expected)
    features, x_lens = features_of(200)
    full, small = (opened(tmp_path, precision)["encoder"](features, x_lens)[0] for precision in ("fp32", "int8"))
    error = (full - small).norm() / full.norm()
    assert 1e-4 < error < 0.05  # another function, and a near one


def test_the_metadata_are_what_the_model_is(student, tmp_path):
    export(ExportConfig(exp_dir=student("streaming-bpe"), out_dir=tmp_path, left_context_frames=16))
    found = {}
    for name in ("encoder", "decoder", "joiner"):
        found |= {entry.key: entry.value for entry in onnx.load(tmp_path / f"{name}.onnx").metadata_props}
    # Four frames of 40 ms advance by 16 frames of 10 ms and hear 5 more; the causal kernel of 5 keeps 4 frames.
    expected = {"num_encoder_layers": 2, "T": 21, "decode_chunk_len": 16, "left_context": 16, "encoder_dim": 32}
    expected |= {"pad_length": 5, "cnn_module_kernel": 5, "vocab_size": 20, "context_size": 2, "joiner_dim": 24}
    assert {key: int(found[key]) for key in expected} == expected
    assert found["model_type"] == "conformer"


def damaged(write):
    """Return a writer whose files differ a little from the graph."""

    def write_and_damage(graph, path, metadata):
        write(graph, path, metadata)
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            array = onnx.numpy_helper.to_array(tensor)
            if tensor.name.endswith("bias"):
                tensor.CopyFrom(onnx.numpy_helper.from_array(array + np.float32(0.01), tensor.name))
        onnx.save(model, path)

    return write_and_damage


def test_a_graph_that_differs_replaces_nothing(student, tmp_path, monkeypatch):
    config = ExportConfig(exp_dir=student("offline-char"), out_dir=tmp_path / "out")
    export(config)
    before = {path.name: path.read_bytes() for path in config.out_dir.iterdir()}
    monkeypatch.setattr(exporter, "write_onnx", damaged(exporter.write_onnx))
    with pytest.raises(NumericError, match=r"the exported encoder differs from the model: largest difference"):
        export(config)
    assert {path.name: path.read_bytes() for path in config.out_dir.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    (config.out_dir / "silero_vad.onnx").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds silero_vad\.onnx beside an earlier export"):
        export(config)
    (config.out_dir / "silero_vad.onnx").rename(tmp_path / "silero_vad.onnx")
    export(config)  # an earlier export is replaced
    assert {path.name for path in config.out_dir.iterdir()} == set(before)


def test_what_cannot_be_exported_is_refused(student, ctc_student, tmp_path, monkeypatch):
    def refused(exp_dir, message, **options):
        with pytest.raises(ConfigError, match=message):
            export(ExportConfig(exp_dir=exp_dir, out_dir=tmp_path / "out", **options))
        assert not (tmp_path / "out").exists()

    offline, streaming = student("offline-char"), student("streaming-bpe")
    refused(ctc_student, "has no transducer")
    refused(tmp_path / "nowhere", "does not exist")
    refused(offline, "epoch-7", epoch=7)
    refused(offline, "trained without --streaming true", decode_chunk_size=16)
    refused(streaming, "trained with --chunk-size", decode_chunk_size=1)
    refused(streaming, "one size", left_context_frames=-1)
    refused(offline, "TorchScript is offered in float32 alone", format="torchscript", quantize="int8")
    with monkeypatch.context() as without:
        without.setitem(__import__("sys").modules, "onnxruntime", None)
        refused(offline, re.escape("pip install -e '.[export]'"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(ConfigError, match=f"holds no {RECORD}"):
        export(ExportConfig(exp_dir=offline, out_dir=tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_same_model_gives_the_same_files(student, tmp_path):
    for name in ("a", "b"):
        export(ExportConfig(exp_dir=student("offline-char"), out_dir=tmp_path / name, quantize="int8"))
    for path in (tmp_path / "a").glob("*.onnx"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert open_onnx(tmp_path / "a" / "decoder.onnx")(torch.tensor([[-1, 0]]))[0].shape == (1, 24)


def test_features_of_the_record_are_those_of_the_extractor(student, tmp_path):
    record = export(ExportConfig(exp_dir=student("offline-char"), out_dir=tmp_path, format="torchscript"))
    wave = torch.zeros(record["features"]["sampling_rate"])
    shape = FbankExtractor(sampling_rate=16000, backend="lhotse").extract(wave).shape
    assert shape == (round(1 / record["features"]["frame_shift"]), record["features"]["bins"])
