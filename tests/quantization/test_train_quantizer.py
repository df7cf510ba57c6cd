"""From cuts to a quantizer file, with a teacher of the test's own."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording
from lhotse.cut import MonoCut

from icefall_kd.config import QuantizerConfig, TeacherConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import FrameFormula
from icefall_kd.labels.keys import label_key
from icefall_kd.quantization import collect
from icefall_kd.quantization.collect import TrainQuantizerConfig, draw_sample, train_quantizer
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.teachers.base import TeacherOutput


class SpectrumTeacher:
    """A log-spectrum of blocks of 160 samples."""

    sampling_rate = 16000
    dim = 20
    frame_formula = FrameFormula(kernels=(160,), strides=(160,))
    max_samples = None

    def __init__(self) -> None:
        self.utterances = 0

    def num_frames(self, num_samples: int) -> int:
        return self.frame_formula.num_frames(num_samples)

    def extract(self, batch: Batch) -> TeacherOutput:
        self.utterances += len(batch)
        lens = torch.tensor([self.num_frames(n) for n in batch.audio_lens.tolist()])
        blocks = batch.audio[:, : int(lens.max()) * 160].unflatten(1, (-1, 160))
        spectrum = torch.fft.rfft(blocks).abs().clamp(min=1e-4).log()[..., :20]
        return TeacherOutput({"embeddings": spectrum}, {"embeddings": lens})

    def provenance(self) -> dict:
        return {"family": "spectrum", "weights_sha256": "0" * 64, "layer": 1}


@pytest.fixture
def cuts(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    found = []
    for i in range(12):
        path = tmp_path / f"utt{i}.wav"
        soundfile.write(path, (generator.normal(size=4000 + 800 * i) * 0.1).astype(np.float32), 16000)
        recording = Recording.from_file(path, recording_id=f"utt{i}")
        found.append(MonoCut(id=f"utt{i}", start=0, duration=recording.duration, channel=0, recording=recording))
    found += [cut.perturb_speed(0.9) for cut in found]
    CutSet.from_cuts(found).to_file(tmp_path / "cuts.jsonl.gz")
    return tmp_path / "cuts.jsonl.gz"


def test_the_draw_holds_the_drawn_cuts_alone(cuts, tmp_path, monkeypatch):
    """Of a corpus it knows keys and durations; the cuts are those of the first line with their key."""
    double = tmp_path / "double.jsonl.gz"
    CutSet.from_cuts(cut.with_id(f"{cut.id}-again") for cut in CutSet.from_file(cuts)).to_file(double)
    made, most = [], []

    def watched(path, original=collect.iterate_cuts):
        for cut in original(path):
            made.append(weakref.ref(cut))
            yield cut
            del cut
            gc.collect()
            most.append(sum(ref() is not None for ref in made))

    monkeypatch.setattr(collect, "iterate_cuts", watched)
    sample = draw_sample([cuts, double], 3, 1)
    assert len(most) >= 48 and max(most) <= 3 + 2
    assert len(sample.cuts) == 3 and all(label_key(cut) == key for key, cut in sample.cuts.items())
    assert not any(cut.id.endswith("-again") for cut in sample.cuts.values())
    monkeypatch.undo()
    assert list(draw_sample([double, cuts], 3, 1).cuts) == list(sample.cuts)


def test_cut_sets_that_change_during_the_draw_are_refused(cuts, monkeypatch):
    reads = []

    def shrinking(path, original=collect.iterate_cuts):
        reads.append(path)
        return original(path) if len(reads) == 1 else iter(())

    monkeypatch.setattr(collect, "iterate_cuts", shrinking)
    with pytest.raises(DataError, match="changed while they were read: 3 of 3 utterances"):
        draw_sample([cuts], 3, 1)


@pytest.fixture
def config(cuts: Path, tmp_path: Path) -> TrainQuantizerConfig:
    return TrainQuantizerConfig(
        cuts=[cuts],
        out=tmp_path / "exp" / "quantizer.safetensors",
        save_every=5,
        quantizer=QuantizerConfig(
            num_codebooks=2, phase1_steps=8, phase2_steps=8, frames_per_step=64, quantizer_utts=8
        ),
        teacher=TeacherConfig(teacher_device="cpu"),
    )


def test_quantizer_report_and_list_are_written_and_kept(config):
    teacher = SpectrumTeacher()
    report = train_quantizer(config, teacher)
    quantizer = Quantizer.load(config.out, dim=20)
    assert report["sha256"] == quantizer.sha256
    assert quantizer.metadata["teacher"] == teacher.provenance()
    keys = config.out.with_suffix(".utterances.txt").read_text().split()
    assert len(keys) == 8 and all(key.endswith("|1/1") for key in keys)
    sample = draw_sample(config.cuts, config.quantizer.quantizer_utts, config.quantizer.quantizer_seed)
    assert keys == list(sample.cuts) and quantizer.metadata["utterances_sha256"] == sample.sha256
    assert keys == [label_key(cut) for cut in sample.cuts.values()]
    seconds = sum(cut.duration for cut in CutSet.from_file(config.cuts[0]))
    assert report["projection"]["corpus_hours"] == pytest.approx(seconds / 3600)
    assert report["frame_rate"] == 100
    assert sorted(p.name for p in config.out.parent.iterdir()) == [
        "quantizer.report.json", "quantizer.safetensors", "quantizer.utterances.txt",
    ]  # fmt: skip
    before = config.out.stat().st_mtime_ns
    assert train_quantizer(config, teacher) == json.loads(config.out.with_suffix(".report.json").read_text())
    assert teacher.utterances == 8 and config.out.stat().st_mtime_ns == before
    train_quantizer(replace(config, quantizer=replace(config.quantizer, quantizer_seed=1)), teacher)
    assert Quantizer.load(config.out).sha256 != quantizer.sha256


def test_a_killed_run_does_not_extract_again_and_ends_the_same(config, monkeypatch, tmp_path):
    expected = train_quantizer(replace(config, out=tmp_path / "other" / "q.safetensors"), SpectrumTeacher())
    run = collect.QuantizerTrainer.run

    def killed(self):
        run(self, max_steps=11)
        raise KeyboardInterrupt

    monkeypatch.setattr(collect.QuantizerTrainer, "run", killed)
    teacher = SpectrumTeacher()
    with pytest.raises(KeyboardInterrupt):
        train_quantizer(config, teacher)
    assert not config.out.exists()
    monkeypatch.undo()
    report = train_quantizer(config, teacher)
    assert teacher.utterances == 8
    assert report["sha256"] == expected["sha256"]


def test_a_recording_that_was_cut_off_is_an_error_and_whole_again_it_gives_the_same_quantizer(config, tmp_path):
    expected = train_quantizer(replace(config, out=tmp_path / "other" / "q.safetensors"), SpectrumTeacher())
    sample = draw_sample(config.cuts, config.quantizer.quantizer_utts, config.quantizer.quantizer_seed)
    name = next(iter(sample.cuts.values())).id
    recording = tmp_path / f"{name}.wav"
    whole = recording.read_bytes()
    for share in (0, 0.5, 0.9):
        recording.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DataError, match=f"1 of the 8 sampled utterances cannot be read; first: {name}"):
            train_quantizer(config, SpectrumTeacher())
        assert not list(config.out.parent.glob("*.safetensors"))
    recording.write_bytes(whole)
    assert train_quantizer(config, SpectrumTeacher())["sha256"] == expected["sha256"]


def test_a_sample_too_short_for_the_teacher_is_an_error(config):
    teacher = SpectrumTeacher()
    teacher.num_frames = lambda samples: 0
    with pytest.raises(DataError, match="none of the 8"):
        train_quantizer(config, teacher)


def test_the_input_of_the_first_block_has_a_quantizer_too(config, monkeypatch):
    class Tapped(SpectrumTeacher):
        def tap(self, layers):
            assert layers == [0]
            return ["layer0"]

        def extract(self, batch):
            found = super().extract(batch)
            spectrum, lens = found.arrays["embeddings"], found.lens["embeddings"]
            arrays = {"embeddings": torch.full_like(spectrum, float("nan")), "layer0": spectrum}
            return TeacherOutput(arrays, dict.fromkeys(arrays, lens))

    built = []
    monkeypatch.setattr(collect, "build_teacher", lambda teacher: built.append(teacher.layer) or Tapped())
    report = train_quantizer(replace(config, teacher=replace(config.teacher, layer=0)))
    quantizer = Quantizer.load(config.out)
    # No teacher is cut behind block 0; the quantizer fits labels of layer 0, and no others.
    assert built == [1] and quantizer.metadata["teacher"] == {**Tapped().provenance(), "layer": 0}
    assert report["sha256"] == quantizer.sha256
    quantizer.check_teacher({**Tapped().provenance(), "layer": 0})
    with pytest.raises(DataError, match="whose layer is 0, this one's is 1"):
        quantizer.check_teacher(Tapped().provenance())


def test_wrong_options_are_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="safetensors"):
        replace(config, out=tmp_path / "quantizer.pt")
    with pytest.raises(ConfigError, match="does not exist"):
        train_quantizer(replace(config, cuts=[tmp_path / "absent.jsonl.gz"]), SpectrumTeacher())
