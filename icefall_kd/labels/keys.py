"""Label keys: names of audio content that survive renamed cuts (our design).

A key is ``recording_id|start|num_samples|p/q``: a span in samples of the unperturbed recording at its
native rate, and the speed p/q (a reduced fraction) at which it is heard.  Display ids of cuts play no part.

Lhotse rounds at every perturbation, so an unstamped cut's native span is known to within one sample: it is
``round(samples * speed * native_rate / rate)``, halves up, which inverts speeds below 1 exactly and speeds
above 1 to one sample.  A stamp (``cut.custom["source"]``) makes it exact: prepare stamps the unperturbed cut
and lhotse carries the stamp along; when the cut is truncated or perturbed afterwards, the key follows.
Transforms that do not move time (volume, reverberation, codecs) leave the key alone.

Labels of texts have keys that name texts: the SHA-256 of the normalised transcript.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

import numpy as np
from lhotse.augmentation import AudioTransform
from lhotse.cut import Cut, MixedCut, MonoCut, PaddingCut
from lhotse.utils import compute_num_samples, fastcopy, perturb_num_samples

from icefall_kd.data.transcripts import transcript
from icefall_kd.errors import ConfigError, DataError

# What lhotse appends to a recording's id, by transform.
_AFFIXES = {
    "Speed": "_sp{factor}",
    "Volume": "_vp{factor}",
    "Narrowband": "_nb_{codec}",
    "ReverbWithImpulseResponse": "_rvb",
}
_STAMP = "source"


@dataclass(frozen=True)
class ParsedKey:
    """The parts of a label key."""

    recording_id: str
    """Id of the unperturbed recording, with ``#channel`` when it has several channels."""
    start: int
    """First sample, at the native rate."""
    num_samples: int
    """Samples of the unperturbed span, at the native rate."""
    speed: Fraction
    """Speed at which the span is heard."""

    def __str__(self) -> str:
        return f"{self.recording_id}|{self.start}|{self.num_samples}|{self.speed.numerator}/{self.speed.denominator}"


@dataclass(frozen=True)
class _View:
    """A mono cut as its recording's transforms describe it."""

    recording_id: str
    start: int
    num_samples: int
    sampling_rate: int
    native_rate: int
    speed: Fraction


@lru_cache(maxsize=256)  # a corpus has three speeds, and a key asks several times
def as_speed(speed: Fraction | str | float | int) -> Fraction:
    """Return ``speed`` as a reduced fraction; floats are read as their decimal digits (0.9 is 9/10)."""
    try:
        value = Fraction(repr(speed) if isinstance(speed, float) else speed)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"speed {speed!r} is no fraction; write it as '9/10'") from error
    small = value.limit_denominator(1000)
    value = small if abs(small - value) < Fraction(1, 10**9) else value
    if value <= 0:
        raise ConfigError(f"speed is {speed}; it must be positive")
    return value


def label_key(cut: Cut) -> str:
    """Return the label key of a cut.

    Args:
        cut: a MonoCut, or a MixedCut whose speech track starts at offset 0 (noise or right padding added).
    Raises:
        DataError: the cut names no single span of one recording, or its tempo was changed.
    """
    return str(_parse_cut(speech_track(cut)))


def text_key(text: str) -> str:
    """Return the key of a normalised text, which equal texts share whoever says them, and however fast."""
    return hashlib.sha256(text.encode()).hexdigest()


def key_of(cut: Cut, key_kind: str) -> str:
    """Return the key of a cut in a label set of this ``key_kind``: "audio" or "text"."""
    return text_key(transcript(cut)) if key_kind == "text" else label_key(cut)


def unperturbed_key(key: str) -> str:
    """Return the key of the same span at speed 1, shared by all speed copies."""
    return str(replace(parse_key(key), speed=Fraction(1)))


def parse_key(key: str) -> ParsedKey:
    """Return the parts of ``key``; a DataError when it is none."""
    parts = key.rsplit("|", 3)
    try:
        recording_id, start, num_samples, speed = parts
        parsed = ParsedKey(recording_id, int(start), int(num_samples), Fraction(speed))
    except (ValueError, ZeroDivisionError) as error:
        raise DataError(f"{key!r} is no label key; expected recording_id|start|num_samples|p/q") from error
    if str(parsed) != key:
        raise DataError(f"label key {key!r} is not in canonical form, which is {str(parsed)!r}")
    return parsed


def corpus_fingerprint(cuts: Iterable[Cut]) -> str:
    """Return the SHA-256 of a corpus: its label keys and texts, whatever their order (cuts are read once).

    Ids repeat between corpora; a key together with what is said there does not.
    """
    corpus = CorpusFingerprint()
    for cut in cuts:
        corpus.add(label_key(cut), cut)
    return corpus.hexdigest()


def cut_text(cut: Cut) -> str:
    """Return what is said in a cut."""
    return " ".join(s.text or "" for s in cut.supervisions)


def two_texts(key: str, first: tuple[str, str], second: tuple[str, str], where: object) -> DataError:
    """Return the error of two cuts, each (id, text), of which the second stands in ``where``, with one label key."""
    return DataError(
        f"cuts {first[0]} and {second[0]} ({where}) have one label key {key!r}, and texts {first[1]!r} and "
        f"{second[1]!r}: ids of recordings repeat between corpora; make a label set for each corpus"
    )


class CorpusFingerprint:
    """Collects :func:`corpus_fingerprint` during a pass over the cuts that is made anyway."""

    def __init__(self) -> None:
        self._digests = bytearray()  # 32 bytes a cut: ten million are no reason to run out of memory

    def add(self, key: str, cut: Cut) -> None:
        """Take in one cut with its label key."""
        self._digests += hashlib.sha256(f"{key}\0{cut_text(cut)}".encode()).digest()

    def hexdigest(self) -> str:
        """Return the fingerprint of what was added so far."""
        words = np.frombuffer(bytes(self._digests), dtype=">u8").reshape(-1, 4)
        return hashlib.sha256(words[np.lexsort(words.T[::-1])].tobytes()).hexdigest()


def stamp_source(cut: MonoCut, speed: Fraction | str | float = 1, source: MonoCut | None = None) -> MonoCut:
    """Return ``cut`` with ``custom["source"]``, which makes its label key exact and permanent.

    Stamp the unperturbed cut (``speed=1``) and perturb afterwards, or use :func:`speed_copy`.

    Args:
        cut: the cut to stamp; its speed so far is read from its recording's transforms.
        speed: the total speed of ``cut`` relative to the recording.
        source: the unperturbed cut that ``cut`` was made from; needed when ``cut`` is a copy written to disk
            (its transforms no longer tell the speed), and exact to the sample for speeds above 1.
    """
    speed = as_speed(speed)
    view = _view(cut)
    if source is not None:
        span = _parse_cut(source)
        if span.speed != 1:
            raise ConfigError(f"cut {source.id} is at speed {span.speed}; the source of a copy must be unperturbed")
        native_rate = _native_rate(source)
    else:
        span, native_rate = _parse_cut(cut), _native_rate(cut)
        if span.speed != speed:
            raise ConfigError(
                f"cut {cut.id}: its transforms say speed {span.speed}, stamp_source was told {speed}; "
                "pass source=<the unperturbed cut> for a copy on disk"
            )
    stamp = {
        "recording_id": span.recording_id,
        "start": span.start,
        "num_samples": span.num_samples,
        "speed": f"{speed.numerator}/{speed.denominator}",
        "native_rate": native_rate,
        "of": {
            "recording_id": view.recording_id,
            "start": view.start,
            "num_samples": view.num_samples,
            "sampling_rate": view.sampling_rate,
            "speed": f"{view.speed.numerator}/{view.speed.denominator}",
        },
    }
    return fastcopy(cut, custom={**(cut.custom or {}), _STAMP: stamp})


def stamp_as(cut: MonoCut, key: str, source: MonoCut) -> MonoCut:
    """Return ``cut`` with a stamp that says that it is the audio of ``key``, wherever it is read from.

    Args:
        cut: the whole of a recording that begins where the cut begins, as Lhotse's Shar makes one of each cut.
        key: its label key.
        source: the cut that it was; tells the native rate.
    """
    parsed = parse_key(key)
    stamp = {
        "recording_id": parsed.recording_id,
        "start": parsed.start,
        "num_samples": parsed.num_samples,
        "speed": f"{parsed.speed.numerator}/{parsed.speed.denominator}",
        "native_rate": _native_rate(source),
        "of": {
            "recording_id": cut.recording.id,
            "start": 0,
            "num_samples": cut.num_samples,
            "sampling_rate": int(cut.sampling_rate),
            "speed": "1/1",
        },
    }
    return fastcopy(cut, custom={**(cut.custom or {}), _STAMP: stamp})


def speed_copy(cut: MonoCut, speed: Fraction | str | float) -> MonoCut:
    """Return ``cut`` stamped and lazily perturbed to ``speed`` (1: stamped only)."""
    speed = as_speed(speed)
    copy = cut if speed == 1 else cut.perturb_speed(float(speed))
    return stamp_source(copy, speed, source=cut)


def speech_track(cut: Cut) -> MonoCut:
    """Return the mono cut that carries the speech: the cut itself, or the first speech track of a mixture."""
    if isinstance(cut, MonoCut):
        return cut
    if not isinstance(cut, MixedCut):
        raise DataError(f"cut {cut.id} is a {type(cut).__name__}; labels need a MonoCut (see CutSet.to_mono)")
    tracks = [t for t in cut.tracks if not isinstance(t.cut, PaddingCut)]
    speech = [t for t in tracks if t.cut.supervisions] or tracks
    if not speech or not isinstance(speech[0].cut, MonoCut):
        raise DataError(f"mixed cut {cut.id} has no mono speech track to take labels from")
    first = speech[0]
    if first.offset != 0:
        raise DataError(
            f"mixed cut {cut.id}: its speech starts {first.offset} s late, so labels would be shifted; pad on the right"
        )
    for other in speech[1:]:
        if other.cut.supervisions and other.offset >= first.cut.duration:
            raise DataError(
                f"mixed cut {cut.id} concatenates {first.cut.id} and {other.cut.id}; labels are kept for single "
                "utterances: turn concatenation off"
            )
    return first.cut


def _transforms(cut: MonoCut) -> list[dict]:
    """Return the recording's transforms as plain dictionaries, in order of application."""
    found = (cut.recording.transforms or []) if cut.recording is not None else []
    return [t.to_dict() if isinstance(t, AudioTransform) else t for t in found]


def _native_rate(cut: MonoCut) -> int:
    """Return the rate of the recording before any transform (a stamp's, when there is one)."""
    stamp = (cut.custom or {}).get(_STAMP)
    if stamp and "native_rate" in stamp:
        return int(stamp["native_rate"])
    return _view(cut).native_rate


def _view(cut: MonoCut) -> _View:
    """Read a cut's span, speed and rates from its recording's transforms."""
    if not isinstance(cut, MonoCut) or cut.recording is None:
        raise DataError(f"cut {cut.id} has no recording; label keys name spans of recordings")
    recording = cut.recording
    rid, speed, native_rate = recording.id, Fraction(1), None
    for transform in reversed(_transforms(cut)):
        name, kwargs = transform["name"], transform["kwargs"]
        if name == "Tempo":
            raise DataError(f"cut {cut.id}: its tempo was changed by {kwargs['factor']}; labels know speeds only")
        if name == "Speed":
            speed *= as_speed(kwargs["factor"])
        if name == "Resample":
            native_rate = int(kwargs["source_sampling_rate"])
        if name in _AFFIXES:
            rid = rid.removesuffix(_AFFIXES[name].format(**kwargs))
    if len(recording.channel_ids or [0]) > 1:
        rid = f"{rid}#{cut.channel}"
    rate = int(cut.sampling_rate)
    return _View(rid, compute_num_samples(cut.start, rate), cut.num_samples, rate, native_rate or rate, speed)


def _parse_cut(cut: MonoCut) -> ParsedKey:
    """Return the key of a mono cut, from its stamp when it has one."""
    view = _view(cut)
    stamp = (cut.custom or {}).get(_STAMP)
    if stamp is not None:
        return _follow_stamp(cut, view, stamp)
    scale = view.speed * Fraction(view.native_rate, view.sampling_rate)
    return ParsedKey(view.recording_id, _round(view.start * scale), _round(view.num_samples * scale), view.speed)


def _follow_stamp(cut: MonoCut, view: _View, stamp: dict) -> ParsedKey:
    """Apply to the stamped span whatever happened to the cut since it was stamped."""
    try:
        recording_id, speed = stamp["recording_id"], as_speed(stamp["speed"])
        start, num_samples = int(stamp["start"]), int(stamp["num_samples"])
        native_rate = int(stamp.get("native_rate", view.native_rate))
        of = stamp.get("of") or _assumed_view(view, recording_id, start, num_samples, speed, native_rate)
        of_speed, of_rate, of_start = as_speed(of["speed"]), int(of["sampling_rate"]), int(of["start"])
        stamped = of["recording_id"], of_start, int(of["num_samples"]), of_rate, of_speed
        if not isinstance(recording_id, str) or min(native_rate, of_rate) < 1:
            raise ValueError("an id that is no text, or a rate below 1")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(
            f"cut {cut.id}: its stamp {stamp} is of another form ({type(error).__name__}: {error}); make it with "
            "keys.stamp_source"
        ) from error
    as_it_is = view.recording_id, view.start, view.num_samples, view.sampling_rate, view.speed
    if as_it_is == stamped and start >= 0 < num_samples:
        return ParsedKey(recording_id, start, num_samples, speed)  # the cut is as it was stamped; most are
    if view.recording_id != of["recording_id"]:
        # The audio was written to a file of its own, which begins where the stamped cut began.
        of_speed, of_start = Fraction(1), 0
    since = view.speed / of_speed
    # What lhotse makes of the stamped view by the perturbation and resampling that came later.
    expected = [_forward(x, since, of_rate, view.sampling_rate) for x in (of_start, int(of["num_samples"]))]
    if view.recording_id != of["recording_id"] and abs(cut.recording.num_samples - expected[1]) > 1:
        raise DataError(
            f"cut {cut.id}: recording {cut.recording.id} has {cut.recording.num_samples} samples, its stamp stands for "
            f"{expected[1]} samples of {of['recording_id']}; stamp the cut before its audio is written elsewhere"
        )
    # Resampling and perturbing in the other order may round differently.
    slack = 1 if of_rate != view.sampling_rate and since != 1 else 0
    speed *= since
    scale = speed * Fraction(native_rate, view.sampling_rate)
    if abs(view.start - expected[0]) > slack:
        start += _round((view.start - expected[0]) * scale)
    if abs(view.num_samples - expected[1]) > slack:
        num_samples = _round(view.num_samples * scale)
    if start < 0 or num_samples < 1:
        raise DataError(f"cut {cut.id} lies outside of the recording that its stamp {stamp} names; stamp it again")
    return ParsedKey(recording_id, start, num_samples, speed)


def _assumed_view(
    view: _View, recording_id: str, start: int, num_samples: int, speed: Fraction, native_rate: int
) -> dict:
    """Reconstruct the cut that a stamp of four fields alone was written for."""
    of_speed = speed if view.speed == speed else Fraction(1)
    spans = [_forward(x, speed, native_rate, view.sampling_rate) for x in (start, num_samples)]
    return {
        "recording_id": recording_id,
        "start": spans[0],
        "num_samples": spans[1],
        "sampling_rate": view.sampling_rate,
        "speed": of_speed,
    }


def _forward(samples: int, speed: Fraction, rate: int, new_rate: int) -> int:
    """Return lhotse's number of samples after resampling and perturbation."""
    if rate != new_rate:
        samples = _round(Fraction(samples * new_rate, rate))
    return samples if speed == 1 else perturb_num_samples(samples, float(speed))


def _round(x: Fraction | int) -> int:
    """Round halves up, exactly."""
    return int((2 * x + 1) // 2)
