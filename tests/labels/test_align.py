"""Teacher frames meet student frames exactly, and what the formulas do not explain is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from lhotse import CutSet

from icefall_kd.data.batch import IGNORE, Batch, Labels
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import (
    FBANK_CONV2D,
    SSL_CONV,
    WHISPER_CONV,
    FrameFormula,
    conv2d_subsampled_len,
    fbank_num_frames,
)
from icefall_kd.labels import align
from icefall_kd.systems.mvq import OnlineTeacher

FORMULAS = {"hubert": SSL_CONV, "whisper": WHISPER_CONV, "ours": FBANK_CONV2D}


@pytest.mark.parametrize("name", FORMULAS)
def test_healthy_lengths_pass_and_stay_within_the_derived_bounds(name, recwarn):
    formula = FORMULAS[name]
    low, high = align.surplus_bounds(formula)
    seen = set()
    for num_samples in range(1, 30_000):
        encoder_len = conv2d_subsampled_len(fbank_num_frames(num_samples))
        label_len = formula.num_frames(num_samples)
        align.check_lengths(label_len, num_samples, formula, encoder_len)
        if encoder_len > 0:
            seen.add(label_len - align.label_ratio(formula) * encoder_len)
    assert (min(seen), max(seen)) == (low, high)  # the bounds hold and are attained
    assert not recwarn.list


@pytest.mark.parametrize("name", FORMULAS)
def test_every_wrong_length_is_refused_with_both_values(name):
    formula = FORMULAS[name]
    for num_samples in range(1_200, 60_000, 997):
        encoder_len = conv2d_subsampled_len(fbank_num_frames(num_samples))
        label_len = formula.num_frames(num_samples)
        for wrong in (label_len - 1, label_len + 1):
            with pytest.raises(DataError, match=rf"utt-7.*rec\|0.*{wrong} label frames.*{label_len}"):
                align.check_lengths(wrong, num_samples, formula, encoder_len, "utt-7", "rec|0")
        with pytest.raises(DataError, match=f"student has {encoder_len + 1} frames.*give {encoder_len}"):
            align.check_lengths(label_len, num_samples, formula, encoder_len + 1)


def test_labels_of_the_unperturbed_audio_are_refused_for_a_speed_copy():
    # lhotse keeps the labels of a cut when it perturbs the speed; ours are found by key and checked by length.
    plain, slow = 64_000, 71_111
    with pytest.raises(DataError, match=r"199 label frames.*221"):
        align.check_lengths(SSL_CONV.num_frames(plain), slow, SSL_CONV, conv2d_subsampled_len(fbank_num_frames(slow)))


def test_lhotse_loads_the_samples_that_it_declares_for_speed_copies(tmp_path):
    from label_toys import write_cuts

    cuts = CutSet.from_file(write_cuts(tmp_path, durations=[0.83, 1.01]))
    for cut in cuts:
        for factor in (0.9, 1.1):
            copy = cut.perturb_speed(factor)
            assert copy.load_audio().shape[1] == copy.num_samples


def test_ratio_follows_from_the_two_rates():
    assert align.label_ratio(SSL_CONV) == align.label_ratio(WHISPER_CONV) == 2
    assert align.label_ratio(FBANK_CONV2D) == 1
    with pytest.raises(ConfigError, match=r"100.*40"):
        align.label_ratio(FrameFormula(kernels=(160,), strides=(160,)), student_hop=400)


def test_joining_puts_the_first_frame_in_the_first_columns_and_ignores_the_rest():
    q = 3
    arrays = [np.arange(n * q, dtype=np.uint8).reshape(n, q) for n in (7, 4, 0)]
    labels = align.collate_codes(arrays)
    assert labels.values.dtype == torch.int64 and labels.values.shape == (3, 7, q)
    lens = torch.tensor([3, 3, 2])
    joined = align.join_frames(labels, lens, 2)
    assert joined.shape == (3, 3, 2 * q)
    for i, array in enumerate(arrays):
        for t in range(3):
            for r in range(2):
                frame = 2 * t + r
                wanted = array[frame] if frame < len(array) and t < lens[i] else [IGNORE] * q
                assert joined[i, t, r * q : (r + 1) * q].tolist() == list(wanted)


def test_what_lies_in_the_padding_of_labels_is_never_used():
    values = torch.arange(2 * 6 * 2).reshape(2, 6, 2)
    joined = align.join_frames(Labels(values, torch.tensor([6, 3])), torch.tensor([3, 3]), 2)
    assert joined[1].tolist() == [[12, 13, 14, 15], [16, 17, IGNORE, IGNORE], [IGNORE] * 4]


def test_embeddings_are_joined_like_codes_with_a_mask():
    arrays = [np.random.randn(n, 5).astype(np.float16) for n in (9, 5)]
    labels = align.collate_embeddings(arrays)
    joined, mask = align.join_embeddings(labels, torch.tensor([4, 4]), 2)
    assert joined.shape == (2, 4, 10) and mask.shape == (2, 4, 2) and joined.dtype == torch.float32
    assert torch.equal(joined[0].reshape(8, 5), torch.from_numpy(arrays[0][:8]).float())
    assert mask.reshape(2, 8).sum(1).tolist() == [8, 5]
    assert joined[1].reshape(8, 5)[5:].abs().sum() == 0


def test_utterances_without_labels_are_ignored_everywhere():
    labels = align.collate_codes([None, np.zeros((4, 2), np.uint8)], 2)
    assert labels.lens.tolist() == [0, 4] and (labels.values[0] == IGNORE).all()
    assert align.collate_embeddings([None, None], 6).values.shape == (2, 0, 6)
    assert (align.join_frames(align.collate_codes([None], 2), torch.tensor([2]), 2) == IGNORE).all()
    with pytest.raises(DataError, match="width"):
        align.collate_codes([np.zeros((4, 2)), np.zeros((4, 3))])


@pytest.mark.parametrize("quantized", [True, False], ids=["codes", "embeddings"])
def test_online_labels_are_checked_like_stored_ones(quantized):
    from label_toys import ToyTeacher, toy_quantizer

    class Shifted(ToyTeacher):
        shift = 0

        def extract(self, batch):
            out = super().extract(batch)
            return type(out)(out.arrays, {"embeddings": out.lens["embeddings"] + torch.tensor([0, self.shift])})

    lengths = [24_001, 15_999]
    frames = torch.tensor([fbank_num_frames(n) for n in lengths])
    batch = Batch.from_audio([torch.randn(n) for n in lengths], ["first", "second"])
    online = OnlineTeacher(Shifted(), toy_quantizer() if quantized else None, refine_iters=1)
    labels = online.labels(dataclasses.replace(batch, x_lens=frames))
    assert labels.lens.tolist() == [74, 49] and labels.values.shape[:2] == (2, 74)
    for student in (25, 23):  # of 15,999 samples are 24
        with pytest.raises(DataError, match=rf"second.*student has {student} frames.*give 24"):
            online.labels(dataclasses.replace(batch, x_lens=torch.tensor([150, 4 * student + 3])))
    online.teacher.shift = -1
    with pytest.raises(DataError, match=r"second.*48 label frames.*gives 49 for its 15999 samples"):
        online.labels(dataclasses.replace(batch, x_lens=frames))


def test_delayed_labels_keep_padding_on_both_ends():
    codes = torch.tensor([[[1], [2], [3], [4], [5]], [[6], [7], [8], [IGNORE], [IGNORE]]])
    lens = torch.tensor([5, 3])
    late = align.delay_frames(codes, lens, 2, IGNORE)[..., 0].tolist()
    assert late == [[IGNORE, IGNORE, 1, 2, 3], [IGNORE, IGNORE, 6, IGNORE, IGNORE]]
    assert align.delay_frames(codes, lens, 0, IGNORE) is codes
    for delay in (5, 9):
        assert (align.delay_frames(codes, lens, delay, IGNORE) == IGNORE).all()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert align.delay_frames(mask, torch.tensor([3, 2]), 1, 0).tolist() == [[False, True, True], [False, True, False]]


def test_delayed_labels_move_by_frames_of_the_student():
    # Two teacher frames a student frame: label frame 2t + k of frame t is seen at frame t + delay.
    values = torch.arange(24).reshape(1, 8, 3)
    lens = torch.tensor([4])
    joined = align.join_frames(Labels(values, torch.tensor([8])), lens, 2)
    late = align.delay_frames(joined, lens, 1, IGNORE)
    assert torch.equal(late[0, 1:], joined[0, :-1])
    assert late[0, 1].tolist() == values[0, :2].flatten().tolist()
