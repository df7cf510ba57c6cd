import dataclasses
import json

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from icefall_kd.config import TeacherConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import DataError
from icefall_kd.frames import WHISPER_CONV
from icefall_kd.teachers.base import TeacherOutput
from icefall_kd.teachers.check import (
    CheckConfig,
    Sample,
    check_teacher,
    draw_sample,
    embedding_statistics,
    format_report,
    neighbour_accuracy,
    run_check,
)
from tests.teachers.tiny_models import whisper_model, write_ct2


def smooth(num_frames: int, dim: int = 6) -> torch.Tensor:
    return torch.randn(num_frames, dim).cumsum(dim=0)


class FaultyTeacher:
    """Smooth embeddings that depend on the audio alone, until a fault is chosen."""

    sampling_rate, dim, frame_formula, max_samples = 16000, 6, WHISPER_CONV, None

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def num_frames(self, num_samples: int) -> int:
        return self.frame_formula.num_frames(num_samples)

    def provenance(self) -> dict:
        return {"teacher": "faulty", "family": "test", "layer": 1, "dim": 6, "normalization": "none"}

    def extract(self, batch: Batch) -> TeacherOutput:
        lens = torch.tensor([self.num_frames(n) for n in batch.audio_lens.tolist()])
        lens = lens + 1 if self.fault == "frames" else lens
        out = torch.zeros(len(batch), int(lens.max()), self.dim)
        for row, count in enumerate(lens.tolist()):
            generator = torch.Generator().manual_seed(int(batch.audio_lens[row]))
            values = torch.randn(count, self.dim, generator=generator)
            out[row, :count] = values if self.fault == "noise" else values.cumsum(dim=0)
        if self.fault == "nan":
            out[0, 0, 0] = torch.nan
        if self.fault == "constant":
            out[:] = 1.0
        if self.fault == "batch":
            out += 1e-3 * len(batch)
        return TeacherOutput({"embeddings": out}, {"embeddings": lens})


def sample(lengths=(16000, 20001, 24320)) -> Sample:
    return Sample([f"utt{i}" for i in range(len(lengths))], [torch.randn(n) for n in lengths], [None] * len(lengths))


def failed(report: dict) -> list[str]:
    return [c["name"] for c in report["checks"] if not c["passed"]]


def test_a_healthy_teacher_passes():
    report = check_teacher(FaultyTeacher(), sample())
    assert report["passed"] and not failed(report)
    assert report["frames"] == 50 + 63 + 76
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("frames", "formula"),
        ("nan", "non-finite"),
        ("constant", "constant"),
        ("batch", "alone"),
        ("noise", "random one"),
    ],
)
def test_every_fault_is_found_by_its_check(fault, name):
    report = check_teacher(FaultyTeacher(fault), sample())
    assert not report["passed"]
    assert any(name in x for x in failed(report)), failed(report)
    json.dumps(report, allow_nan=False)


def test_transcripts_of_mandarin_are_told_in_characters_and_in_pinyin():
    class Writer(FaultyTeacher):
        def transcribe(self, waves):
            return ["東南。", "Shū fu"][: len(waves)]

    heard = sample()
    heard.texts[:] = ["东南", "舒服", "。"]  # the last one holds nothing to compare with
    report = check_teacher(Writer(), heard)
    decoding = report["decoding"]
    assert [(u["ref"], u["hyp"]) for u in decoding["utterances"]] == [("东南", "東南"), ("舒服", "SHŪFU")]
    # One traditional character and five letters for two characters; d ong1 n an2 are right.
    assert (decoding["name"], decoding["errors"], decoding["units"]) == ("CER", 6, 4)
    assert (decoding["pinyin"]["name"], decoding["pinyin"]["errors"], decoding["pinyin"]["units"]) == ("TER", 5, 8)
    assert "CER of its own" in format_report(report) and "TER in pinyin of its own" in format_report(report)
    heard.texts[:] = ["A CAT", None, "?!"]
    assert check_teacher(Writer(), heard)["decoding"]["name"] == "WER"
    heard.texts[:] = ["?!", None, ""]
    assert check_teacher(Writer(), heard)["decoding"] is None


def test_neighbour_accuracy_is_chance_for_independent_frames():
    torch.manual_seed(1)
    assert abs(neighbour_accuracy([torch.randn(3000, 8), torch.randn(3000, 8)]) - 0.5) < 0.05
    assert neighbour_accuracy([smooth(500), smooth(500)]) > 0.9
    assert neighbour_accuracy([torch.randn(1, 4)]) == 0.0


def test_statistics_name_the_dimension_that_dominates():
    frames = torch.randn(400, 20)
    frames[:, 7] *= 500
    frames[:, 3] = 2.0
    found = embedding_statistics(frames)
    assert found["outlier_dims"] == [7]
    assert found["constant_dims"] == 1
    assert found["top_dim_share"] > 0.99
    assert found["fits_float16"] and not embedding_statistics(frames * 1e5)["fits_float16"]


@pytest.fixture()
def cuts(tmp_path):
    made = []
    for i in range(6):
        path = tmp_path / f"utt{i}.wav"
        rate = 8000 if i == 5 else 16000
        soundfile.write(path, 0.1 * np.random.default_rng(i).standard_normal(rate), rate)
        recording = Recording.from_file(path)
        supervision = SupervisionSegment(id=f"utt{i}", recording_id=recording.id, start=0, duration=1, text="HELLO")
        made.append(
            MonoCut(id=f"utt{i}", start=0, duration=1, channel=0, recording=recording, supervisions=[supervision])
        )
    path = tmp_path / "cuts.jsonl.gz"
    CutSet.from_cuts(made).to_file(path)
    return path


def test_the_sample_is_seeded_and_resampled(cuts):
    first, again, other = (draw_sample(cuts, 3, seed, 16000) for seed in (1, 1, 2))
    assert first.ids == again.ids and len(first.ids) == 3
    assert first.ids != other.ids or not torch.equal(first.waves[0], other.waves[0])
    assert all(len(w) == 16000 for w in draw_sample(cuts, 10, 0, 16000).waves)
    with pytest.raises(DataError, match=r"no cut set .*none.jsonl"):
        draw_sample(cuts.with_name("none.jsonl"), 3, 1, 16000)
    cuts.with_name("utt3.wav").write_bytes(b"RIFF no audio")
    with pytest.raises(DataError, match=r"cut utt3 of .*audio cannot be read.*--check-seed"):
        draw_sample(cuts, 6, 0, 16000)


def test_the_report_is_written_even_when_a_check_fails(cuts, tmp_path, capsys):
    folder = write_ct2(tmp_path / "whisper", whisper_model())
    teacher = TeacherConfig(teacher=str(folder), teacher_device="cpu")
    config = CheckConfig(
        cuts=cuts, out=tmp_path / "report.json", check_utts=2, min_neighbour_accuracy=0.0, teacher=teacher
    )
    run_check(config)
    assert "next frame closer" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] and report["decoding"] is None
    with pytest.raises(DataError, match="fails the check"):
        run_check(dataclasses.replace(config, min_neighbour_accuracy=1.01))
    assert not json.loads((tmp_path / "report.json").read_text())["passed"]
