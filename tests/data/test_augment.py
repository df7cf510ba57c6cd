"""Augmentation: a pure function of its seed, of single utterances, that moves neither frames nor labels."""

import random

import numpy as np
import pytest
import torch
from lhotse import CutSet
from micro_corpus import RATE, read_cuts, write_part

from icefall_kd.config import AugmentConfig
from icefall_kd.data.augment import FeatureAugment, NoiseAugment, seeded
from icefall_kd.data.features import FbankExtractor
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.keys import label_key


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("augment")
    # Lengths around the rounding of frames, and noises that are shorter and longer than the speech.
    write_part(folder, "train", [0.7, 16_079 / RATE, 16_080 / RATE, 12_345 / RATE, 1.9], ("1", "9/10"), seed=1)
    write_part(folder, "noise", [0.3, 2.5, 0.8], seed=2)
    return folder


def noise_config(corpus, where="fbank", **options) -> AugmentConfig:
    return AugmentConfig(musan_cuts=corpus / where / "cuts_noise.jsonl.gz", **{"musan_p": 0.7, **options})


def test_seeding_a_block_gives_the_generators_back():
    before = random.random(), np.random.rand(), torch.rand(())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with seeded(2**62 + 5):
        inside = random.random(), np.random.rand(), torch.rand(())
    assert (random.random(), np.random.rand(), torch.rand(())) == expected
    with seeded(2**62 + 5):
        assert inside == (random.random(), np.random.rand(), torch.rand(()))
    assert len({float(x) for x in (*before, *expected, *inside)}) == 9


def test_masks_are_a_function_of_the_seed_and_leave_the_input_alone():
    augment = FeatureAugment(AugmentConfig(spec_aug_p=1.0))
    x = torch.randn(200, 80)
    kept = x.clone()
    one, again, other = augment(x, 1), augment(x, 1), augment(x, 2)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(x, kept) and one.shape == x.shape
    # Masked values are the utterance's mean, all others are untouched.
    changed = one != x
    assert changed.any() and torch.allclose(one[changed], x.mean(), atol=1e-6)


@pytest.mark.parametrize("num_frames", [0, 1, 7, 19])
def test_the_shortest_utterances_are_not_masked(num_frames):
    x = torch.randn(num_frames, 80)
    assert torch.equal(FeatureAugment(AugmentConfig(spec_aug_p=1.0))(x, 3), x)


@pytest.mark.parametrize("options", [
    {"max_frames_mask_fraction": 0.01},
    {"max_frames_mask_fraction": 1.0, "num_frame_masks": 1},
    {"frames_mask_size": 2},
    {"num_feature_masks": 0},
    {"num_feature_masks": 1},
])  # fmt: skip
def test_no_option_and_length_breaks_the_masks(options):
    augment = FeatureAugment(AugmentConfig(spec_aug_p=1.0, **options))
    for num_frames in [*range(18, 45), 99, 100, 101, 500]:
        assert augment(torch.randn(num_frames, 80), num_frames).shape == (num_frames, 80)


@pytest.mark.parametrize("options", [
    {"max_frames_mask_fraction": 0.0}, {"num_frame_masks": 0}, {"spec_aug_p": 1.5}, {"musan_p": -0.1},
    {"frames_mask_size": 1},
])  # fmt: skip
def test_impossible_options_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is {value}"):
        AugmentConfig(**options)


@pytest.mark.parametrize("where", ["fbank", "manifests"])
def test_noise_keeps_order_ids_lengths_and_label_keys(corpus, where):
    cuts = CutSet.from_file(corpus / where / "cuts_train.jsonl.gz").to_eager()
    noise = NoiseAugment(noise_config(corpus, where), "precomputed" if where == "fbank" else "on_the_fly")
    extractor = FbankExtractor(backend="lhotse")

    def features(cut):
        if where == "fbank":
            return torch.from_numpy(cut.load_features())
        return extractor.extract(torch.from_numpy(cut.load_audio()[0]))

    num_mixed = 0
    for seed in range(4):
        mixed, again = noise(cuts, seed), noise(cuts, seed)
        assert [m.id for m in mixed] == [c.id for c in cuts]
        assert [label_key(m) for m in mixed] == [label_key(c) for c in cuts]
        for m, a, c in zip(mixed, again, cuts, strict=True):
            assert m.duration == c.duration and m.num_samples == c.num_samples
            x = features(m)
            assert x.shape == features(c).shape and torch.equal(x, features(a))
            num_mixed += not torch.equal(x, features(c))
    assert 0.4 < num_mixed / (4 * len(cuts)) < 0.95
    assert len({m.id for m in mixed}) == len(cuts)


@pytest.mark.parametrize("where", ["fbank", "manifests"])
def test_noise_has_the_wanted_power(corpus, where):
    # Speech and noise are both white noise of one level; noise at 10 dB adds a tenth of the speech's power.
    cuts = CutSet.from_file(corpus / where / "cuts_train.jsonl.gz").to_eager().filter(lambda c: c.duration > 1.5)
    on_the_fly = where == "manifests"
    config = noise_config(corpus, where, musan_p=1.0, musan_snr=(10.0, 10.0))
    noise = NoiseAugment(config, "on_the_fly" if on_the_fly else "precomputed")
    for cut, mixed in zip(cuts, noise(cuts, 1), strict=True):
        if on_the_fly:
            ratio = np.square(mixed.load_audio()).sum() / np.square(cut.load_audio()).sum()
        else:
            ratio = np.exp(mixed.load_features()).sum() / np.exp(cut.load_features()).sum()
        assert ratio == pytest.approx(1.1, abs=0.03)


def test_noise_that_cannot_be_mixed_is_refused(corpus, tmp_path):
    with pytest.raises(DataError, match="has no stored features"):
        NoiseAugment(noise_config(corpus, "manifests"), "precomputed")
    with pytest.raises(DataError, match=r"does not exist.*--musan true"):
        NoiseAugment(AugmentConfig(musan_cuts=tmp_path / "cuts_none.jsonl.gz"))
    write_part(tmp_path, "noise", [0.5], rate=8000, features=False)
    with pytest.raises(DataError, match=r"8000 Hz.*16000"):
        NoiseAugment(noise_config(tmp_path, "manifests"), "on_the_fly")
    assert len(read_cuts(corpus, "noise")) == 3
