"""Log-mel features: the extractor (kaldifeat where it imports, else lhotse) and the stage that stores them."""

import collections
import contextlib
import functools
import itertools
import logging
import multiprocessing
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lhotse
import numpy as np
import torch
from lhotse import Features
from lhotse.cut import Cut
from lhotse.features.base import register_extractor
from lhotse.features.io import LilcomChunkyWriter
from torch import Tensor

from icefall_kd.data.manifests import cuts_file, iterate_cuts, part_of, write_cuts
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import fbank_num_frames
from icefall_kd.labels.audio import UNREADABLE
from icefall_kd.runtime.files import TMP_PATTERN, atomic_path, fingerprint, sha256_file, write_json
from icefall_kd.runtime.signals import end_with_parent

logger = logging.getLogger(__name__)

NUM_BINS = 80
FRAME_SHIFT = 0.01
# Features of digital silence: the logarithm of torch's float32 epsilon.
SILENCE = -15.9424
# Icefall's features: 25 ms Povey window, 20 Hz to 400 Hz below Nyquist, no dither.
_OPTIONS: dict[str, Any] = {
    "num_filters": NUM_BINS,
    "frame_length": 0.025,
    "frame_shift": FRAME_SHIFT,
    "window_type": "povey",
    "dither": 0.0,
    "snip_edges": False,
    "low_freq": 20.0,
    "high_freq": -400.0,
    "energy_floor": 1e-10,
}


# The type that stored features carry.
FEATURES_TYPE = "icefall_kd-fbank"


@register_extractor
class _Mixing:
    """Tells lhotse how stored features of our type are mixed: as log-mel energies.

    Energy is the mean over frames, as it is in audio: with lhotse's sum, noise shorter than the speech is too loud.
    """

    name = FEATURES_TYPE
    mix = staticmethod(lhotse.Fbank.mix)
    scale = staticmethod(lhotse.Fbank.scale)

    @staticmethod
    def compute_energy(features: np.ndarray) -> float:
        """Return the mean energy of a frame of (T, C) features."""
        return float(np.exp(features).sum() / len(features))


@functools.cache
def _kaldifeat():
    """Return the kaldifeat module, or None; a broken one is named and passed over."""
    try:
        import kaldifeat
    except ModuleNotFoundError as error:
        if error.name != "kaldifeat":
            logger.warning("kaldifeat does not import (%s); features come from lhotse", error)
        return None
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("kaldifeat does not import (%s); features come from lhotse", error)
        return None
    return kaldifeat


class FbankExtractor:
    """80-bin log-mel features, 10 ms a frame, of 16 kHz audio in [-1, 1]; may be sent to workers."""

    def __init__(self, sampling_rate: int = 16000, backend: str = "auto") -> None:
        """Choose the implementation.

        Args:
            sampling_rate: of the audio, in Hz.
            backend: "kaldifeat", "lhotse", or "auto": kaldifeat where it imports.
        Raises:
            ConfigError: unknown backend, or kaldifeat asked for and absent.
        """
        if backend not in ("auto", "kaldifeat", "lhotse"):
            raise ConfigError(f"feature backend is {backend!r}; it must be auto, kaldifeat or lhotse")
        if backend == "kaldifeat" and _kaldifeat() is None:
            raise ConfigError("kaldifeat does not import; install it, or use the backend lhotse")
        if backend == "auto":
            backend = "kaldifeat" if _kaldifeat() is not None else "lhotse"
        self.sampling_rate, self.backend = sampling_rate, backend
        self._extractor = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_extractor": None}

    def info(self) -> dict:
        """Return which extractor this is, its version and options: the record kept beside stored features."""
        try:
            package = version(self.backend)
        except PackageNotFoundError:
            package = "unknown"
        return {"extractor": self.backend, "version": package, "sampling_rate": self.sampling_rate, **_OPTIONS}

    def extract(self, wave: Tensor) -> Tensor:
        """Return the features of one waveform.

        Args:
            wave: (S,) float32 in [-1, 1].
        Returns:
            (T, 80) float32, T = frames.fbank_num_frames(S).
        Raises:
            DataError: the waveform is empty or holds no finite numbers.
        """
        if wave.ndim != 1 or len(wave) == 0:
            raise DataError(f"features need a waveform (S,) with S > 0, got shape {tuple(wave.shape)}")
        num_frames = fbank_num_frames(len(wave), round(self.sampling_rate * FRAME_SHIFT))
        if num_frames == 0:
            return torch.zeros(0, NUM_BINS)
        features = self._compute(wave.float())
        if features.shape != (num_frames, NUM_BINS):
            raise DataError(
                f"{self.backend} gave {tuple(features.shape)} for {len(wave)} samples, not ({num_frames}, 80)"
            )
        if not torch.isfinite(features).all():
            raise DataError(f"features of {len(wave)} samples are not finite; check the audio")
        return features

    def _compute(self, wave: Tensor) -> Tensor:
        if self._extractor is None:
            make = _make_kaldifeat if self.backend == "kaldifeat" else _make_lhotse
            self._extractor = make(self.sampling_rate)
        # The reflected edges of snip_edges=False need half a window; shorter audio is padded and the rest cut off.
        least = round(0.025 * self.sampling_rate)
        if len(wave) < least:
            full = self._extractor(torch.nn.functional.pad(wave, (0, least - len(wave))))
            return full[: fbank_num_frames(len(wave), round(self.sampling_rate * FRAME_SHIFT))]
        return self._extractor(wave)


@functools.cache
def _snipped(kind: str, device: torch.device) -> torch.nn.Module:
    """Return lhotse's batched extractor of whole windows on a device: "fbank" with our options, "mfcc" with Kaldi's."""
    from lhotse.features.kaldi import layers

    with warnings.catch_warnings():  # that lhotse's manifests count frames otherwise
        warnings.simplefilter("ignore")
        if kind == "fbank":
            made = layers.Wav2LogFilterBank(sampling_rate=16000, **{**_OPTIONS, "snip_edges": True})
        else:
            made = layers.Wav2MFCC(sampling_rate=16000, num_ceps=13, low_freq=20.0, high_freq=0.0, snip_edges=True)
    return made.eval().to(device)


def _whole_windows(kind: str, audio: Tensor) -> Tensor:
    if audio.shape[1] < 400:
        raise DataError(f"a batch of {audio.shape[1]} samples gives no frame; utterances need 400")
    return _snipped(kind, audio.device)(audio)


def snipped_fbank(audio: Tensor) -> Tensor:
    """Return the log-mel features of whole windows only, on the audio's device, as HuBERT's Fbank students hear them.

    Args:
        audio: (N, S) float32 samples at 16 kHz in [-1, 1].
    Returns:
        (N, F, 80) float32, F = frames.FBANK_SNIPPED.num_frames(S).
    Raises:
        DataError: S is less than one window of 400 samples.
    """
    return _whole_windows("fbank", audio)


def snipped_mfcc(audio: Tensor) -> Tensor:
    """Return 13 MFCC of whole windows only, on the audio's device: 25 ms every 10 ms, 23 mel bins, no dither.

    Args:
        audio: (N, S) float32 samples at 16 kHz in [-1, 1].
    Returns:
        (N, F, 13) float32, F = frames.FBANK_SNIPPED.num_frames(S).
    Raises:
        DataError: S is less than one window of 400 samples.
    """
    return _whole_windows("mfcc", audio)


def _make_lhotse(sampling_rate: int):
    extractor = lhotse.Fbank(lhotse.FbankConfig(sampling_rate=sampling_rate, **_OPTIONS))
    return lambda wave: extractor.extract(wave, sampling_rate)


def _make_kaldifeat(sampling_rate: int):
    kaldifeat = _kaldifeat()
    options = kaldifeat.FbankOptions()
    options.energy_floor = _OPTIONS["energy_floor"]
    options.frame_opts.samp_freq = sampling_rate
    options.frame_opts.frame_length_ms = 1000 * _OPTIONS["frame_length"]
    options.frame_opts.frame_shift_ms = 1000 * FRAME_SHIFT
    options.frame_opts.window_type = _OPTIONS["window_type"]
    options.frame_opts.dither = _OPTIONS["dither"]
    options.frame_opts.snip_edges = _OPTIONS["snip_edges"]
    options.mel_opts.num_bins = NUM_BINS
    options.mel_opts.low_freq = _OPTIONS["low_freq"]
    options.mel_opts.high_freq = _OPTIONS["high_freq"]
    extractor = kaldifeat.Fbank(options)
    return lambda wave: extractor(wave)


@dataclass(frozen=True, kw_only=True)
class _Split:
    """One job of the feature stage: a contiguous range of a part's cuts."""

    manifest: Path
    name: str
    first: int
    last: int
    out_dir: Path
    inputs: str

    @property
    def archive(self) -> Path:
        return self.out_dir / f"feats_{self.name}.lca"

    @property
    def cuts(self) -> Path:
        """Written last, so it says that the split is done for these inputs."""
        return self.out_dir / f".split-{self.name}-{self.inputs[:16]}.jsonl.gz"


def store_features(
    manifests: Sequence[Path], out_dir: Path, extractor: FbankExtractor, nj: int = 1, shard: int | None = None
) -> dict[str, int]:
    """Compute the features of cut sets and write ``out_dir/cuts_<part>.jsonl.gz`` with them attached.

    Each of ``nj`` splits of a part writes a shard ``feats_<part>-<k>-of-<n>.lca`` and its cuts under temporary
    names and renames them; a split that is done is not computed again, unless cuts, extractor or ``nj`` changed.

    Args:
        manifests: ``cuts_<part>.jsonl.gz`` files.
        out_dir: folder of the result.
        extractor: what computes the features.
        nj: splits and processes; clipped to the number of cuts of a part.
        shard: compute this split of each part alone, from 0, and leave the rest to a run without it.
    Returns:
        The number of cuts by part, none of a single split.
    Raises:
        ConfigError: there is no such split.
    """
    if shard is not None and not 0 <= shard < nj:
        raise ConfigError(f"--shard is {shard}; with --nj {nj} it must be from 0 to {nj - 1}")
    out_dir = out_dir.absolute()
    out_dir.mkdir(parents=True, exist_ok=True)
    plan = {manifest: _plan_splits(manifest, out_dir, extractor, nj) for manifest in manifests}
    wanted = slice(None) if shard is None else slice(shard, shard + 1)
    jobs = [split for splits in plan.values() for split in splits[wanted] if not _is_done(split)]
    with exclusive_pool(min(nj, len(jobs))) as run:
        for i, name in enumerate(run(functools.partial(_store_split, extractor), jobs), 1):
            logger.info("features of %s done, %d of %d", name, i, len(jobs))
    if shard is not None:
        return {}
    write_json(out_dir / "feature_extractor.json", extractor.info())
    counts = {}
    for manifest, splits in plan.items():
        part = part_of(manifest)
        counts[part] = write_cuts(cuts_file(out_dir, part), (cut for s in splits for cut in iterate_cuts(s.cuts)))
        _remove_other_files(out_dir, part, {s.archive.name for s in splits})
    return counts


@contextlib.contextmanager
def exclusive_pool(nj: int):
    """Yield a ``map`` over ``nj`` fresh processes (never more than cores), or the plain one when one is enough."""
    nj = min(nj, os.cpu_count() or 1)
    if nj <= 1:
        yield map
        return
    # Fresh processes: a fork of one that runs threads (torch) may hang.
    with ProcessPoolExecutor(nj, multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool:
        yield pool.map


def _plan_splits(manifest: Path, out_dir: Path, extractor: FbankExtractor, nj: int) -> list[_Split]:
    total = sum(1 for _ in iterate_cuts(manifest))
    nj = max(1, min(nj, total))
    inputs = fingerprint([sha256_file(manifest), extractor.info(), nj])
    return [
        _Split(
            manifest=manifest,
            name=f"{part_of(manifest)}-{k + 1}-of-{nj}",
            first=total * k // nj,
            last=total * (k + 1) // nj,
            out_dir=out_dir,
            inputs=inputs,
        )
        for k in range(nj)
    ]


def _is_done(split: _Split) -> bool:
    """Return whether a split was stored before, and neither its cuts nor its archive were cut off since."""
    if not (split.cuts.is_file() and split.archive.is_file()):
        return False
    try:
        (last,) = collections.deque(iterate_cuts(split.cuts), maxlen=1)
    except (DataError, ValueError) as error:
        logger.warning("%s: %s; its features are computed again", split.cuts, error)
        return False
    # A key holds where the chunks of an utterance begin in the archive, and their sizes; the last one ends the file.
    end, size = sum(map(int, last.features.storage_key.split(","))), split.archive.stat().st_size
    if size != end:
        logger.warning("%s has %d of %d bytes; its features are computed again", split.archive, size, end)
    return size == end


def _store_split(extractor: FbankExtractor, split: _Split) -> str:
    """Write one split's shard, then its cuts; return its name."""
    torch.set_num_threads(1)
    with_features = []
    with atomic_path(split.archive) as path, LilcomChunkyWriter(path) as writer:
        for cut in itertools.islice(iterate_cuts(split.manifest), split.first, split.last):
            try:
                wave = torch.from_numpy(np.ascontiguousarray(cut.load_audio()[0]))
                features = extractor.extract(wave).numpy()
            except UNREADABLE as error:
                message = f"cut {cut.id}: no features ({error}); run the manifest stage with --check-audio full"
                raise DataError(message) from error
            with_features.append(_attach(cut, features, writer.write(cut.id, features), split.archive))
    write_cuts(split.cuts, with_features)
    return split.name


def _attach(cut: Cut, features: np.ndarray, storage_key: str, archive: Path) -> Cut:
    """Return ``cut`` with stored features; their number of frames is the array's."""
    described = Features(
        type=FEATURES_TYPE,
        num_frames=features.shape[0],
        num_features=features.shape[1],
        frame_shift=FRAME_SHIFT,
        sampling_rate=cut.sampling_rate,
        start=cut.start,
        duration=cut.duration,
        storage_type=LilcomChunkyWriter.name,
        storage_path=os.fspath(archive),
        storage_key=storage_key,
        recording_id=cut.recording_id,
        channels=cut.channel,
    )
    return lhotse.utils.fastcopy(cut, features=described)


def _remove_other_files(out_dir: Path, part: str, archives: set[str]) -> None:
    """Remove the cuts of splits, shards of earlier runs with another number of jobs, and what a killed run left."""
    own = re.compile(rf"({TMP_PATTERN})?(feats_|\.split-){re.escape(part)}-\d+-of-\d+[.-]")
    for file in out_dir.iterdir():
        if own.match(file.name) and file.name not in archives:
            file.unlink()
