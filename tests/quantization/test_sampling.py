"""The sample of training utterances."""

import random

import pytest
from lhotse import Recording
from lhotse.cut import MonoCut

from icefall_kd.errors import DataError
from icefall_kd.quantization.sampling import sample_hash, sample_utterances


def items(count: int = 200) -> list[tuple]:
    generator = random.Random(1)
    return [(f"utt-{i}", generator.uniform(1, 20), "1/1") for i in range(count)]


def test_the_same_seed_gives_the_same_list_whatever_the_order():
    first = sample_utterances(items(), 20, seed=3)
    shuffled = items()
    random.Random(9).shuffle(shuffled)
    assert sample_utterances(shuffled, 20, seed=3) == first
    assert sample_utterances(items(), 20, seed=4) != first
    assert sample_hash(first) != sample_hash(first[::-1])
    assert len(set(first)) == 20


def test_every_class_of_duration_gives_one_utterance():
    pool = items()
    durations = {name: duration for name, duration, _ in pool}
    chosen = sorted(durations[name] for name in sample_utterances(pool, 20, seed=3))
    ordered = sorted(durations.values())
    for i, duration in enumerate(chosen):
        assert ordered[10 * i] <= duration <= ordered[10 * i + 9]


def test_perturbed_copies_are_never_drawn():
    pool = items(30) + [(f"utt-{i}_sp0.9", 5.0, "9/10") for i in range(300)]
    chosen = sample_utterances(pool, 100, seed=1)
    assert sorted(chosen) == sorted(f"utt-{i}" for i in range(30))


def test_cuts_tell_their_perturbation_by_transform_or_stamp():
    recording = Recording(id="r", sources=[], sampling_rate=16000, num_samples=32000, duration=2.0)
    plain = MonoCut(id="plain", start=0, duration=2.0, channel=0, recording=recording)
    resampled = MonoCut(id="resampled", start=0, duration=2.0, channel=0, recording=recording.resample(8000))
    copies = [plain.perturb_speed(0.9), plain.perturb_volume(2.0)]
    stored = MonoCut(
        id="stored", start=0, duration=2.0, channel=0, recording=recording, custom={"source": {"speed": "11/10"}}
    )
    chosen = sample_utterances([plain, resampled, *copies, stored], 10, seed=1)
    assert sorted(chosen) == ["plain", "resampled"]


def test_nothing_to_draw_and_repeated_ids_are_errors():
    with pytest.raises(DataError, match="unperturbed"):
        sample_utterances([("a", 1.0, "9/10")], 1, seed=1)
    with pytest.raises(DataError, match="a occurs twice"):
        sample_utterances([("a", 1.0, "1/1"), ("a", 2.0, "1/1")], 1, seed=1)
