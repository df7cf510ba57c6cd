"""Several layers of one teacher: a label set each, from one pass."""

import dataclasses

import numpy as np
import pytest
import torch
from label_toys import ToyTeacher, config_for, write_cuts

from icefall_kd.cli import parse_config
from icefall_kd.config import ExtractLayersConfig, TeacherConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.extract import extract_layers
from icefall_kd.labels.store import LabelStore
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.teachers.base import tap
from icefall_kd.teachers.pretrained import Precision
from icefall_kd.teachers.speech_ssl import SpeechSslTeacher
from icefall_kd.teachers.windows import WindowedTeacher
from tests.teachers.tiny_models import ssl_model

IDENTITY = {"teacher": "tiny", "source": "random", "weights_sha256": "0"}


@pytest.fixture
def cuts(tmp_path):
    return write_cuts(tmp_path / "audio", [0.31, 0.44, 0.5, 0.63, 0.77, 0.9, 1.2])


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(2)
    return ssl_model("hubert", feat_extract_norm="layer", stable=True).state_dict()


@pytest.fixture
def teacher(weights):
    """Return a function from a layer to a HuBERT of always the same weights, which notes what it hears."""

    def make(layer: int):
        model = ssl_model("hubert", feat_extract_norm="layer", stable=True)
        model.load_state_dict(weights)
        precision = Precision(device=torch.device("cpu"))
        made = SpeechSslTeacher(model, layer=layer, precision=precision, identity=IDENTITY)
        made.heard, extract = [], made.extract
        made.extract = lambda batch: made.heard.extend(batch.ids) or extract(batch)
        return made

    return make


def quantizers(count: int, seed: int = 3) -> list[Quantizer]:
    torch.manual_seed(seed)
    return [Quantizer(32, 4, 16) for _ in range(count)]


def configs_for(cuts, folder, layers, **options):
    return [
        config_for(cuts, folder / f"set{i}", teacher=TeacherConfig(layer=layer), **options)
        for i, layer in enumerate(layers)
    ]


def set_bytes(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.safetensors"))} | {
        "info": (folder / "label_set.json").read_bytes()
    }


def test_the_sets_of_one_pass_are_those_of_a_run_each(tmp_path, cuts, teacher):
    layers = [1, -1, 2]
    together, made = teacher(-1), quantizers(3)
    reports = extract_layers(configs_for(cuts, tmp_path / "one", layers), together, made)
    assert [(r.utterances, r.skipped) for r in reports] == [(7, False)] * 3
    assert len(together.heard) == 7  # every utterance once for all layers
    for i, layer in enumerate(layers):
        config = configs_for(cuts, tmp_path / "each", layers)[i]
        extract_layers([config], teacher(layer), [made[i]])
        assert set_bytes(tmp_path / "one" / f"set{i}") == set_bytes(tmp_path / "each" / f"set{i}")
    infos = [LabelStore(tmp_path / "one" / f"set{i}").info for i in range(3)]
    assert [info.layer for info in infos] == [1, 3, 2]
    assert all("hidden_states[L]" in info.layer_convention for info in infos)
    assert all("layer_results[L-1][0]" in info.origin["layer_elsewhere"] for info in infos)
    assert [info.quantizer_sha256 for info in infos] == [q.sha256 for q in made]


def test_what_is_there_is_not_made_again(tmp_path, cuts, teacher):
    configs, made = configs_for(cuts, tmp_path, [1, 2, 3]), quantizers(3)
    extract_layers(configs[:2], teacher(2), made[:2])
    whole = set_bytes(tmp_path / "set1")
    (next((tmp_path / "set1").glob("*.safetensors"))).unlink()
    third = teacher(3)
    reports = extract_layers(configs, third, made)
    assert [r.skipped for r in reports] == [True, False, False] and len(third.heard) == 7
    assert set_bytes(tmp_path / "set1") == whole
    silent = teacher(3)
    assert all(r.skipped for r in extract_layers(configs, silent, made)) and silent.heard == []


def test_one_layer_with_two_quantizers(tmp_path, cuts, teacher):
    made, once = quantizers(2), teacher(2)
    extract_layers(configs_for(cuts, tmp_path, [2, 2]), once, made)
    stores = [LabelStore(tmp_path / f"set{i}") for i in range(2)]
    assert len(once.heard) == 7 and [s.info.layer for s in stores] == [2, 2]
    assert any(not np.array_equal(stores[0].get(k), stores[1].get(k)) for k in stores[0].keys())


def test_an_utterance_that_one_layer_cannot_label_is_rejected_there_alone(tmp_path, cuts, teacher):
    made = teacher(2)
    extract = made.extract

    def spoilt(batch):
        out = extract(batch)
        if "rec3-0" in batch.ids:
            out.arrays["layer1"][batch.ids.index("rec3-0"), 0, 0] = float("nan")
        return out

    made.extract = spoilt
    reports = extract_layers(configs_for(cuts, tmp_path, [1, 2], max_reject_ratio=0.2), made, quantizers(2))
    assert [(r.utterances, r.rejected) for r in reports] == [(6, 1), (7, 0)]


def test_rejected_utterances_are_tried_again_for_every_layer(tmp_path, cuts, teacher):
    configs, made = configs_for(cuts, tmp_path, [1, 2]), quantizers(2)
    audio = tmp_path / "audio/rec3.wav"
    sound = audio.read_bytes()
    audio.write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 7 utterances were rejected, .*set0"):
        extract_layers(configs, teacher(2), made)
    audio.write_bytes(sound)
    assert [r.rejected for r in extract_layers(configs, teacher(2), made)] == [0, 0]


def test_windows_have_all_layers(teacher):
    wave = 0.1 * torch.randn(9000)
    made = teacher(3)
    assert tap(WindowedTeacher(_limited(made)), [1, 3]) == ["layer1", "embeddings"]
    out = WindowedTeacher(_limited(made), 3200).extract(Batch.from_audio([wave, wave[:4000]]))
    assert out.arrays.keys() == {"layer1", "embeddings"}
    assert all(lens.tolist() == [made.num_frames(9000), made.num_frames(4000)] for lens in out.lens.values())


def _limited(teacher):
    teacher.max_samples = 6400
    return teacher


def test_a_teacher_of_one_layer_is_refused(tmp_path, cuts, teacher):
    with pytest.raises(ConfigError, match="a ToyTeacher gives one layer in a pass, --layer asks for 1, 2"):
        extract_layers(configs_for(cuts, tmp_path, [1, 2]), ToyTeacher(32), quantizers(2))
    with pytest.raises(ConfigError, match=r"layer 3: teacher tiny, cut there, has blocks 1 to 2"):
        tap(teacher(2), [1, 3])


def test_the_command_line_names_a_layer_a_folder_and_a_quantizer_for_each_set():
    options = ["--cuts", "c", "--shard", "1", "--num-shards", "2", "--teacher", "t"]
    config = parse_config(
        ExtractLayersConfig, [*options, "--layer", "6,12", "--label-dir", "a,b", "--quantizer", "qa,qb"]
    )
    first, second = config.each()
    assert (first.teacher.layer, str(first.label_dir), str(first.quantizer)) == (6, "a", "qa")
    assert (second.teacher.layer, str(second.label_dir), str(second.quantizer)) == (12, "b", "qb")
    assert dataclasses.replace(first, label_dir=second.label_dir, quantizer=second.quantizer) == dataclasses.replace(
        second, teacher=first.teacher
    )
    alone = parse_config(ExtractLayersConfig, [*options, "--label-dir", "a", "--kind", "embeddings"])
    assert [c.teacher.layer for c in alone.each()] == [-1]
    for wrong, message in (
        (["--layer", "6,12", "--label-dir", "a,b", "--quantizer", "qa"], "2 layers, .* --quantizer 1 files"),
        (["--layer", "6,12", "--label-dir", "a,a", "--quantizer", "qa,qb"], "one folder twice: a, a"),
        (["--layer", "6,12", "--label-dir", "a,b/../a", "--quantizer", "qa,qb"], "one folder twice: a, b/../a"),
        (["--layer", "6", "--label-dir", "a,b", "--kind", "embeddings"], "1 layers, --label-dir 2 folders"),
        (["--label-dir", "a"], "--quantizer 0 files"),
        (["--label-dir", "a", "--quantizer", "q", "--part-utterances", "0"], "--part-utterances"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(ExtractLayersConfig, [*options, *wrong])
