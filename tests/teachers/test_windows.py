from itertools import pairwise

import pytest
import torch

from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError
from icefall_kd.frames import (
    FBANK_CONV2D,
    SSL_CONV,
    WHISPER_CONV,
    FrameFormula,
    conv2d_subsampled_len,
    fbank_num_frames,
)
from icefall_kd.teachers.base import TeacherOutput
from icefall_kd.teachers.windows import WindowedTeacher, plan_windows


class RampTeacher:
    """Embeds frame t of what it hears as the value of sample t * hop: a join that slips is seen at once."""

    sampling_rate, dim = 16000, 1

    def __init__(self, formula: FrameFormula, max_samples: int) -> None:
        self.frame_formula, self.max_samples = formula, max_samples

    def num_frames(self, num_samples: int) -> int:
        return self.frame_formula.num_frames(num_samples)

    def provenance(self) -> dict:
        return {"family": "ramp"}

    def extract(self, batch: Batch) -> TeacherOutput:
        assert int(batch.audio_lens.max()) <= self.max_samples
        lens = torch.tensor([self.num_frames(n) for n in batch.audio_lens.tolist()])
        out = torch.zeros(len(batch), int(lens.max()), 1)
        for row, count in enumerate(lens.tolist()):
            out[row, :count, 0] = batch.audio[row, :: self.frame_formula.hop][:count]
        return TeacherOutput({"embeddings": out}, {"embeddings": lens})


FORMULAS = {"whisper": WHISPER_CONV, "ssl": SSL_CONV, "fbank": FBANK_CONV2D}


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
@pytest.mark.parametrize(("limit", "overlap"), [(480000, 80000), (6400, 1280), (7001, 960)])
def test_kept_frames_are_the_utterance_s_frames_once_and_in_order(formula, limit, overlap):
    generator = torch.Generator().manual_seed(7)
    lengths = [0, 1, 79, 399, 400, limit - 1, limit, limit + 1, limit + 319, limit + 320, 2 * limit, 3 * limit + 17]
    lengths += torch.randint(0, 6 * limit, (1500,), generator=generator).tolist()
    for n in lengths:
        plan = plan_windows(n, limit, overlap, formula)
        assert [f for w in plan for f in range(w.keep_from, w.keep_to)] == list(range(formula.num_frames(n))), n
        for window in plan:
            assert window.num_samples <= limit
            assert window.start_sample == window.start_frame * formula.hop
            assert window.start_frame <= window.keep_from
            assert window.keep_to <= window.start_frame + formula.num_frames(window.num_samples)
            assert window.start_sample + window.num_samples <= max(n, 1)
        assert plan[-1].start_sample + plan[-1].num_samples == n
        for left, right in pairwise(plan):
            assert left.start_sample + left.num_samples - right.start_sample >= overlap


@pytest.mark.parametrize("formula", [WHISPER_CONV, SSL_CONV], ids=["whisper", "ssl"])
def test_windowed_embeddings_are_those_of_the_unlimited_teacher(formula):
    windowed = WindowedTeacher(RampTeacher(formula, 6400), overlap_samples=1280)
    unlimited = RampTeacher(formula, 10**9)
    waves = [torch.arange(n, dtype=torch.float32) for n in (0, 500, 6400, 6401, 20000, 33333)]
    batch = Batch.from_audio(waves)
    got, expected = windowed.extract(batch), unlimited.extract(batch)
    assert torch.equal(got.lens["embeddings"], expected.lens["embeddings"])
    assert torch.equal(got.arrays["embeddings"], expected.arrays["embeddings"])
    assert windowed.max_samples is None
    assert windowed.provenance()["windows"] == {"max_samples": 6400, "overlap_samples": 1280}


def test_windows_that_cannot_overlap_are_refused():
    with pytest.raises(ConfigError, match="cannot overlap"):
        plan_windows(10000, 6400, 6400, WHISPER_CONV)
    with pytest.raises(ConfigError, match="cannot overlap"):
        plan_windows(10000, 6400, 0, SSL_CONV)


def test_the_fbank_formula_is_the_encoder_s_own_arithmetic():
    for n in range(20000):
        assert FBANK_CONV2D.num_frames(n) == max(0, conv2d_subsampled_len(fbank_num_frames(n)))
    assert FrameFormula.from_dict(FBANK_CONV2D.to_dict()) == FBANK_CONV2D
