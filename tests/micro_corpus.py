"""A corpus of noise, its features, its tokenizer and label sets, small enough for every test."""

from pathlib import Path

import numpy as np
import soundfile
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from icefall_kd.data.features import FbankExtractor, store_features
from icefall_kd.frames import SSL_CONV
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.labels.keys import label_key, speed_copy
from icefall_kd.labels.shard import key_hash
from icefall_kd.labels.store import LabelStore, shard_of
from icefall_kd.text.tokenizer import Tokenizer

RATE = 16_000
WORDS = ["one two", "three", "four", "two two", "one", "three one two", "four four", "two"]


def write_part(folder: Path, part: str, durations, speeds=("1",), rate=RATE, features=True, seed=0) -> CutSet:
    """Write ``manifests/cuts_<part>.jsonl.gz`` (and ``fbank/``) of noise recordings; return the plain cuts."""
    audio = folder / "audio"
    audio.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    cuts = []
    for i, seconds in enumerate(durations):
        path = audio / f"{part}{i}.wav"
        wave = 0.1 * rng.standard_normal(round(seconds * rate))
        soundfile.write(path, wave.astype(np.float32), rate, subtype="PCM_16")
        recording = Recording.from_file(path, recording_id=f"{part}{i}")
        cut = MonoCut(f"{part}{i}-0", 0.0, recording.duration, 0, recording=recording)
        text = WORDS[i % len(WORDS)]
        cut.supervisions = [SupervisionSegment(cut.id, recording.id, 0.0, recording.duration, text=text)]
        cuts += [speed_copy(cut, speed) for speed in speeds]
    manifest = folder / "manifests" / f"cuts_{part}.jsonl.gz"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    CutSet.from_cuts(cuts).to_file(manifest)
    if features:
        store_features([manifest], folder / "fbank", FbankExtractor(sampling_rate=rate, backend="lhotse"))
    return CutSet.from_cuts(cuts)


def _write_noise(path: Path, seconds: float, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE)), RATE)


def write_librispeech(folder: Path, parts, num: int = 2) -> Path:
    """Write ``LibriSpeech/<part>/<speaker>/<chapter>/``: ``num`` utterances of noise a part."""
    for speaker, part in enumerate(parts, 1):
        chapter = folder / "LibriSpeech" / part / str(speaker) / "7"
        lines = ""
        for i in range(num):
            _write_noise(chapter / f"{speaker}-7-{i:04d}.flac", 0.6 + 0.1 * i, 100 * speaker + i)
            lines += f"{speaker}-7-{i:04d} {WORDS[i % len(WORDS)].upper()}\n"
        (chapter / f"{speaker}-7.trans.txt").write_text(lines)
    return folder


def write_trans(folder: Path, parts=("train", "dev"), num: int = 2) -> Path:
    """Write a folder of audio with ``*.trans.txt`` files, as people have them."""
    for k, part in enumerate(parts):
        for i in range(num):
            _write_noise(folder / part / f"{part}-{i}.wav", 0.6 + 0.1 * i, 100 * k + i)
        lines = "".join(f"{part}-{i} {WORDS[i % len(WORDS)]}\n" for i in range(num))
        (folder / part / "mine.trans.txt").write_text(lines)
    return folder


def write_aishell(folder: Path, parts=("train", "dev", "test"), num: int = 2) -> Path:
    """Write ``data_aishell/{wav,transcript}``: ``num`` utterances of noise a part."""
    lines = ""
    for k, part in enumerate(parts):
        for i in range(num):
            utt = f"BAC009S000{k}W{i:04d}"
            _write_noise(folder / "data_aishell/wav" / part / f"S000{k}" / f"{utt}.wav", 0.6 + 0.1 * i, 100 * k + i)
            lines += f"{utt} {'而对 楼市 成交'[i % 3 * 3:][:2]}\n"
    (folder / "data_aishell/transcript").mkdir()
    (folder / "data_aishell/transcript/aishell_transcript_v0.8.txt").write_text(lines, encoding="utf-8")
    return folder


def write_corpus(folder: Path, num_train: int = 12, speeds=("1",)) -> Path:
    """Write parts train, dev and noise, and the tokenizer in ``lang_char``."""
    write_part(folder, "train", [0.6 + 0.1 * (i % 7) for i in range(num_train)], speeds, seed=1)
    write_part(folder, "dev", [0.7, 0.9, 1.1], seed=2)
    write_part(folder, "noise", [0.5, 2.0, 3.0], seed=3)
    Tokenizer.train_char(WORDS).save(folder / "lang_char")
    return folder


def read_cuts(folder: Path, part: str = "train") -> CutSet:
    """Return the cuts of a part with their features."""
    return CutSet.from_file(folder / "fbank" / f"cuts_{part}.jsonl.gz").to_eager()


def label_info(**changes) -> LabelSetInfo:
    """Return the provenance of a toy label set of two codebooks of 16 entries."""
    base = {
        "kind": "codebook_indexes",
        "dtype": "uint8",
        "width": 2,
        "dim": 8,
        "teacher": "toy",
        "teacher_sha256": "aaaa",
        "layer": 3,
        "layer_convention": "1-based",
        "normalization": "none",
        "frame_formula": SSL_CONV.to_dict(),
        "num_codebooks": 2,
        "codebook_size": 16,
        "quantizer_sha256": "bbbb",
        "corpus_fingerprint": "cccc",
    }
    return LabelSetInfo(**{**base, **changes})


def write_labels(path: Path, cuts, info: LabelSetInfo | None = None, num_shards: int = 2, values=None, extra=0) -> Path:
    """Write a label set for ``cuts``: random values, or those of ``values`` (key -> array).

    Args:
        path: folder of the set.
        cuts: the cuts that get labels.
        info: its provenance.
        num_shards: shards of the set.
        values: labels by key.
        extra: samples that the labelled audio has more than the cut: labels of other audio.
    """
    info = info or label_info()
    rng = np.random.default_rng(7)
    writers = [LabelStore.create(path, info).writer(k, num_shards) for k in range(num_shards)]
    for key, samples in {label_key(cut): cut.num_samples + extra for cut in cuts}.items():
        shape = (SSL_CONV.num_frames(samples), info.width)
        if values is not None:
            array = values[key]
        elif info.dtype == "uint8":
            array = rng.integers(0, info.codebook_size, shape, dtype=np.uint8)
        else:
            array = rng.standard_normal(shape).astype(info.dtype)
        writers[shard_of(key_hash(key), num_shards)].add(key, array, samples)
    for writer in writers:
        writer.finish()
    return path
