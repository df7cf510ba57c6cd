"""MFCC as a teacher: Kaldi's, with differences, at the frames of HuBERT's convolutions."""

import math

import numpy as np
import pytest
import torch

from icefall_kd.config import TeacherConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError
from icefall_kd.frames import SSL_CONV
from icefall_kd.teachers import build_teacher
from icefall_kd.teachers.base import Teacher
from icefall_kd.teachers.mfcc import differences


def kaldi_mfcc(wave: np.ndarray) -> np.ndarray:
    """Kaldi's MFCC in float64, step by step."""
    hertz_to_mel = lambda f: 1127 * math.log(1 + f / 700)  # noqa: E731
    low, high = hertz_to_mel(20), hertz_to_mel(8000)
    edges = [low + (high - low) * i / 24 for i in range(25)]
    bins = [hertz_to_mel(16000 * k / 512) for k in range(256)]
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    rows = []
    for start in range(0, len(wave) - 399, 160):
        x = wave[start : start + 400].astype(np.float64)
        x = x - x.mean()
        x = x - 0.97 * np.concatenate([x[:1], x[:-1]])
        power = np.abs(np.fft.rfft(x * window, 512)) ** 2
        mel = []
        for m in range(23):
            a, b, c = edges[m : m + 3]
            weights = [max(0.0, min((f - a) / (b - a), (c - f) / (c - b))) for f in bins]
            mel.append(math.log(max(np.dot(weights, power[:256]), 1.1920928955078125e-07)))
        row = []
        for k in range(13):
            scale = math.sqrt((1 if k == 0 else 2) / 23)
            value = scale * sum(v * math.cos(math.pi * k * (m + 0.5) / 23) for m, v in enumerate(mel))
            row.append(value * (1 + 11 * math.sin(math.pi * k / 22)))
        rows.append(row)
    return np.array(rows)


def slopes(x: np.ndarray) -> np.ndarray:
    at = lambda t: x[min(max(t, 0), len(x) - 1)]  # noqa: E731
    return np.array([sum(n * (at(t + n) - at(t - n)) for n in (1, 2)) / 10 for t in range(len(x))])


@pytest.fixture
def teacher():
    return build_teacher(TeacherConfig(teacher="mfcc"))


def test_values_are_those_of_kaldi(teacher):
    assert isinstance(teacher, Teacher)
    wave = (0.1 * np.random.default_rng(0).standard_normal(4000)).astype(np.float32)
    due = kaldi_mfcc(wave)
    first = slopes(due)
    due = np.concatenate([due, first, slopes(first)], axis=1)[::2]
    found = teacher.extract(Batch.from_audio([torch.from_numpy(wave)])).arrays["embeddings"][0].numpy()
    assert found.shape == due.shape == (SSL_CONV.num_frames(4000), 39)
    np.testing.assert_allclose(found, due, atol=2e-2)


def test_frames_are_huberts_and_an_utterance_does_not_see_its_batch(teacher):
    waves = [0.1 * torch.randn(n) for n in (399, 400, 719, 720, 5000, 8001)]
    output = teacher.extract(Batch.from_audio(waves))
    assert output.lens["embeddings"].tolist() == [SSL_CONV.num_frames(len(w)) for w in waves]
    for row, wave in enumerate(waves[1:], 1):
        alone = teacher.extract(Batch.from_audio([wave])).arrays["embeddings"][0]
        assert torch.equal(output.arrays["embeddings"][row, : len(alone)], alone)
        assert not output.arrays["embeddings"][row, len(alone) :].any()


def test_differences_of_a_line_are_its_slope():
    x = torch.arange(10.0).unsqueeze(1) * torch.tensor([1.0, -3.0])
    torch.testing.assert_close(differences(x)[2:-2], torch.tensor([[1.0, -3.0]]).expand(6, 2))


def test_mfcc_have_no_layers(teacher):
    with pytest.raises(ConfigError, match="MFCC have no layers"):
        build_teacher(TeacherConfig(teacher="mfcc", layer=3))
    assert teacher.provenance()["layer"] is None
    other = build_teacher(TeacherConfig(teacher="mfcc", teacher_dtype="bfloat16"))
    assert other.provenance() == teacher.provenance()
