"""A teacher of one's own: the one of the documentation makes labels, and its code is part of what they are."""

import re
import sys
from pathlib import Path

import pytest
import torch
from own_teacher import PAGE, write_own_teacher

from icefall_kd.config import ExtractConfig, TeacherConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.extract import extract_labels
from icefall_kd.labels.store import LabelStore
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.teachers import build_teacher

sys.path.insert(0, str(Path(__file__).parents[1] / "labels"))
from label_toys import write_cuts


@pytest.fixture
def name(tmp_path) -> str:
    return write_own_teacher(tmp_path)


def config(name: str, **options) -> TeacherConfig:
    return TeacherConfig(teacher=name, **options)


def test_the_documented_teacher_has_forty_lines():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 40


def test_the_documented_teacher_makes_labels(tmp_path, name):
    cuts, options = write_cuts(tmp_path / "audio", [0.3, 0.5, 0.9]), {"teacher": config(name)}
    extract_labels(ExtractConfig(cuts=[cuts], label_dir=tmp_path / "floats", kind="embeddings", **options))
    store = LabelStore(tmp_path / "floats")
    assert store.verify() == [] and len(store) == 3
    teacher = build_teacher(config(name))
    assert store.info.layer == 2 and store.info.extra["code_sha256"] == teacher.provenance()["code_sha256"]
    assert store.info.teacher == name
    torch.manual_seed(1)
    Quantizer(32, 4, 16).save(tmp_path / "quantizer.safetensors", {"teacher": teacher.provenance()})
    options["quantizer"] = tmp_path / "quantizer.safetensors"
    extract_labels(ExtractConfig(cuts=[cuts], label_dir=tmp_path / "codes", **options))
    assert LabelStore(tmp_path / "codes").verify() == []
    # An edited teacher is another one, for its labels and for its quantizer.
    file = tmp_path / "my_teacher.py"
    file.write_text(file.read_text() + "# edited\n")
    with pytest.raises(DataError, match=r"extra is .*code_sha256"):
        extract_labels(
            ExtractConfig(cuts=[cuts], label_dir=tmp_path / "floats", kind="embeddings", teacher=config(name))
        )
    with pytest.raises(DataError, match="whose code_sha256 is"):
        extract_labels(ExtractConfig(cuts=[cuts], label_dir=tmp_path / "new", **options))


def test_the_documented_teacher_keeps_what_it_owes(name):
    teacher = build_teacher(config(name))
    waves = [0.1 * torch.randn(n) for n in (16000, 399, 5000, 0)]
    whole = teacher.extract(Batch.from_audio(waves))
    assert whole.lens["embeddings"].tolist() == [teacher.num_frames(len(w)) for w in waves]
    for i in (0, 2):
        alone = teacher.extract(Batch.from_audio([waves[i]])).arrays["embeddings"][0]
        assert (whole.arrays["embeddings"][i, : len(alone)] - alone).abs().max() <= 1e-5 * alone.abs().max()
    with pytest.raises(ConfigError, match="MyTeacher gives one layer in a pass"):
        teacher.tap([1, 2])
    with pytest.raises(ConfigError, match="--layer is 7"):
        build_teacher(config(name, layer=7))


def test_a_limit_makes_windows(tmp_path, name):
    file = tmp_path / "my_teacher.py"
    file.write_text(file.read_text().replace("max_samples = None", "max_samples = 16000"))
    teacher, reject = build_teacher(config(name)), build_teacher(config(name, long_utterances="reject"))
    assert (teacher.max_samples, reject.max_samples) == (None, 16000)
    out = teacher.extract(Batch.from_audio([0.1 * torch.randn(40000)]))
    assert out.lens["embeddings"].tolist() == [reject.num_frames(40000)]


def test_a_file_may_import_the_package_of_its_name(tmp_path, name):
    code = (tmp_path / "my_teacher.py").read_text()
    (tmp_path / "colorsys.py").write_text(f"import colorsys\nassert colorsys.rgb_to_hsv\n{code}")
    assert build_teacher(config(f"{tmp_path}/colorsys.py:MyTeacher")).dim == 32
    import colorsys

    assert not hasattr(colorsys, "MyTeacher")


def test_a_file_may_import_one_beside_it(tmp_path, name, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "my_teacher.py"
    (tmp_path / "net_of_mine.py").write_text("LAYER = 2\n")
    file.write_text(f"from net_of_mine import LAYER\n{file.read_text()}".replace('"layer": 2', '"layer": LAYER'))
    monkeypatch.chdir(tmp_path)
    assert build_teacher(config("my_teacher.py:MyTeacher")).provenance()["layer"] == 2


@pytest.mark.parametrize(("old", "new", "message"), [
    ("dim = 32", "size = 32", "lacks dim; see teachers/base.py"),
    ('"layer": 2, ', "", r"provenance\(\) lacks layer;"),
    ("class MyTeacher", "class Other", "defines no MyTeacher"),
])  # fmt: skip
def test_what_is_missing_is_named(tmp_path, name, old, new, message):
    file = tmp_path / "my_teacher.py"
    file.write_text(file.read_text().replace(old, new).replace("self.dim", "32"))
    with pytest.raises(ConfigError, match=message):
        build_teacher(config(name))


@pytest.mark.parametrize(("wrong", "message"), [
    ("none.py:MyTeacher", rf"{Path.cwd()}/none\.py does not exist; write FILE\.py:CLASS"),
    ("none.py", r"no class is named; write FILE\.py:CLASS"),
])  # fmt: skip
def test_a_name_that_leads_nowhere_is_explained(wrong, message):
    with pytest.raises(ConfigError, match=message):
        build_teacher(config(wrong))
