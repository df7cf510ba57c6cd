"""Label keys name audio content: they survive renaming and follow every change of the audio's time."""

import hashlib
from fractions import Fraction

import pytest
from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.cut import PaddingCut
from lhotse.cut.set import deserialize_cut
from lhotse.utils import fastcopy

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels import keys
from icefall_kd.labels.shard import key_hash


def make_cut(num_samples=48_000, rate=16_000, recording="rec", start=0, length=None, channels=1):
    channel_ids = list(range(channels))
    rec = Recording(
        recording,
        [AudioSource("file", channel_ids, "none.wav")],
        rate,
        num_samples,
        num_samples / rate,
        channel_ids=channel_ids,
    )
    length = num_samples - start if length is None else length
    cut = MonoCut(f"{recording}-cut", start / rate, length / rate, 0, recording=rec)
    cut.supervisions = [SupervisionSegment("s", recording, 0, length / rate, text="a b")]
    return cut


def through_json(cut):
    return deserialize_cut(cut.to_dict())


def test_key_of_a_plain_cut_and_of_a_renamed_one():
    cut = make_cut(start=1601, length=32_000)
    assert keys.label_key(cut) == "rec|1601|32000|1/1"
    assert keys.label_key(cut.with_id("anything-else")) == keys.label_key(cut)
    assert keys.label_key(through_json(cut)) == keys.label_key(cut)


@pytest.mark.parametrize("affix", [True, False])
def test_speed_copies_have_three_keys_and_one_unperturbed_key(affix):
    cut = keys.stamp_source(make_cut(num_samples=51_237, start=1_003, length=50_001))
    copies = [cut] + [cut.perturb_speed(f, affix_id=affix) for f in (0.9, 1.1)]
    found = [keys.label_key(through_json(c)) for c in copies]
    assert found == [f"rec|1003|50001|{s}" for s in ("1/1", "9/10", "11/10")]
    assert {keys.unperturbed_key(k) for k in found} == {"rec|1003|50001|1/1"}
    assert len({key_hash(k) for k in found}) == 3 and len(key_hash(found[0])) == 16


def test_stamped_copies_are_exact_and_unstamped_ones_within_one_sample():
    for length in range(20_000, 22_000, 7):
        cut = make_cut(num_samples=60_000, start=length % 977, length=length)
        for speed in ("9/10", "11/10", "1"):
            copy = keys.speed_copy(cut, speed)
            parsed = keys.parse_key(keys.label_key(copy))
            assert (parsed.start, parsed.num_samples) == (length % 977, length)
            assert parsed.speed == Fraction(speed)
            unstamped = keys.parse_key(keys.label_key(cut.perturb_speed(float(Fraction(speed)))))
            assert unstamped.speed == Fraction(speed)
            worst = 1 if parsed.speed > 1 else 0
            assert abs(unstamped.start - parsed.start) <= worst
            assert abs(unstamped.num_samples - parsed.num_samples) <= worst


@pytest.mark.parametrize("stamped", [True, False])
@pytest.mark.parametrize("speed", ["1", "9/10", "11/10"])
def test_truncating_changes_the_key(speed, stamped):
    cut = make_cut(num_samples=160_000)
    copy = keys.speed_copy(cut, speed) if stamped else cut.perturb_speed(float(Fraction(speed)))
    part = copy.truncate(offset=1.0, duration=2.0)
    parsed = keys.parse_key(keys.label_key(part))
    assert parsed.speed == Fraction(speed)
    assert abs(parsed.start - 16_000 * parsed.speed) <= 1
    assert abs(parsed.num_samples - 32_000 * parsed.speed) <= 1
    shorter = keys.parse_key(keys.label_key(copy.truncate(duration=copy.duration - 2 / 16_000)))
    assert shorter.num_samples < 160_000 and shorter.start == 0


def test_truncating_then_perturbing_a_stamped_cut_keeps_the_key_of_the_part():
    cut = keys.stamp_source(make_cut(num_samples=160_000))
    first = keys.label_key(cut.truncate(offset=1.0, duration=2.0).perturb_speed(0.9))
    assert first == "rec|16000|32000|9/10"


def test_resampled_recordings_keep_native_samples():
    cut = make_cut(num_samples=24_000, rate=8_000, start=801, length=16_001)
    assert keys.label_key(cut.resample(16_000)) == "rec|801|16001|1/1"
    for either in (cut, keys.stamp_source(cut)):
        for copy in (either.resample(16_000).perturb_speed(0.9), either.perturb_speed(0.9).resample(16_000)):
            parsed = keys.parse_key(keys.label_key(copy))
            assert parsed.speed == Fraction(9, 10) and abs(parsed.num_samples - 16_001) <= 1
    assert keys.label_key(keys.stamp_source(cut).resample(16_000).perturb_speed(1.1)) == "rec|801|16001|11/10"


def test_noise_and_right_padding_keep_the_key():
    cut = keys.speed_copy(make_cut(), "9/10")
    noise = fastcopy(make_cut(recording="noise"), supervisions=[])
    mixed = cut.mix(noise, snr=10).pad(duration=10.0)
    assert keys.label_key(mixed) == keys.label_key(cut)
    assert keys.label_key(cut.perturb_volume(2.0)) == keys.label_key(cut)


def test_what_shifts_or_joins_speech_is_refused():
    cut, other = make_cut(), make_cut(recording="other")
    with pytest.raises(DataError, match="late"):
        keys.label_key(cut.pad(duration=10.0, direction="left"))
    with pytest.raises(DataError, match="concatenates"):
        keys.label_key(cut.append(other))
    with pytest.raises(DataError, match="tempo"):
        keys.label_key(cut.perturb_tempo(0.9))
    with pytest.raises(DataError, match="PaddingCut"):
        keys.label_key(PaddingCut("pad", 1.0, 16_000, -23.0, num_samples=16_000))


def test_two_channels_of_a_recording_have_two_keys():
    cut = make_cut(channels=2)
    assert keys.label_key(cut) == "rec#0|0|48000|1/1"
    assert keys.label_key(fastcopy(cut, channel=1)) == "rec#1|0|48000|1/1"


def test_a_copy_on_disk_is_stamped_with_its_source():
    source = make_cut(num_samples=160_000, start=1_000, length=20_003)
    file_copy = make_cut(num_samples=source.perturb_speed(1.1).num_samples, recording="rec-on-disk")
    with pytest.raises(ConfigError, match="source="):
        keys.stamp_source(file_copy, "11/10")
    stamped = keys.stamp_source(file_copy, "11/10", source=source)
    assert keys.label_key(stamped) == "rec|1000|20003|11/10"
    part = keys.parse_key(keys.label_key(stamped.truncate(offset=0.5)))
    assert part.start == 1_000 + 8_800 and part.speed == Fraction(11, 10)


def test_audio_moved_into_a_file_of_its_own_keeps_its_key():
    cut = keys.speed_copy(make_cut(num_samples=160_000, start=16_000, length=48_000), "9/10")
    moved = make_cut(num_samples=cut.num_samples, recording="moved")
    moved = fastcopy(moved, custom=cut.custom)
    assert keys.label_key(moved) == "rec|16000|48000|9/10"
    stamped_before = keys.stamp_source(make_cut(num_samples=160_000, start=16_000, length=48_000))
    with pytest.raises(DataError, match="stamp the cut before"):
        keys.label_key(fastcopy(moved, custom=stamped_before.custom))


def test_a_stamp_of_four_fields_is_read():
    cut = make_cut(start=160, length=32_000)
    stamp = {"recording_id": "rec", "start": 160, "num_samples": 32_000, "speed": "9/10"}
    copy = fastcopy(cut.perturb_speed(0.9), custom={"source": stamp})
    assert keys.label_key(copy) == "rec|160|32000|9/10"


def test_keys_parse_and_refuse_nonsense():
    assert keys.parse_key("a|b|3|4|9/10").recording_id == "a|b"
    for bad in ("rec", "rec|1|2", "rec|x|2|1/1", "rec|1|2|2/2", "rec|1|2|1/0", "rec|01|2|1/1"):
        with pytest.raises(DataError, match="label key"):
            keys.parse_key(bad)
    assert keys.as_speed(0.9) == Fraction(9, 10) and keys.as_speed(1) == 1
    with pytest.raises(ConfigError):
        keys.as_speed("fast")


@pytest.mark.parametrize("number", [0, 1, 300])
def test_the_fingerprint_of_a_corpus_is_that_of_the_sorted_digests_of_keys_and_texts(number):
    """In the form that label sets on disk hold, whatever the order of the cuts."""
    texts = [f"said {i}" for i in range(number)]
    digests = sorted(hashlib.sha256(f"key {i}\0{text}".encode()).digest() for i, text in enumerate(texts))
    expected = hashlib.sha256(b"".join(digests)).hexdigest()
    for order in (range(number), reversed(range(number))):
        corpus = keys.CorpusFingerprint()
        for i in order:
            supervision = SupervisionSegment(id="s", recording_id="r", start=0, duration=1, text=texts[i])
            corpus.add(f"key {i}", MonoCut(id="c", start=0, duration=1, channel=0, supervisions=[supervision]))
        assert corpus.hexdigest() == expected
