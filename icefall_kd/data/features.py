"""Log-mel features: the extractor (kaldifeat where it imports, else lhotse) and the stage that stores them."""

import functools
import logging
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lhotse
import numpy as np
import torch
from lhotse import CutSet, Features
from lhotse.cut import Cut
from lhotse.features.io import LilcomChunkyWriter
from torch import Tensor

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import fbank_num_frames
from icefall_kd.runtime.files import atomic_path, fingerprint, sha256_file, write_json

logger = logging.getLogger(__name__)

NUM_BINS = 80
FRAME_SHIFT = 0.01
# Icefall's features: 25 ms Povey window, 20 Hz to 400 Hz below Nyquist, floor 1e-10, no dither.
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


def store_features(manifest: Path, out_dir: Path, extractor: FbankExtractor, nj: int = 1) -> int:
    """Compute the features of a cut set and write ``out_dir/cuts_<part>.jsonl.gz`` with them attached.

    Each of ``nj`` splits writes a shard ``feats_<part>-<k>-of-<n>.lca`` and its cuts under temporary names and
    renames them; a split that is done is not computed again, unless cuts, extractor or ``nj`` changed.

    Args:
        manifest: ``cuts_<part>.jsonl.gz``.
        out_dir: folder of the result.
        extractor: what computes the features.
        nj: processes; clipped to the number of cuts.
    Returns:
        The number of cuts written.
    """
    part = manifest.name.removeprefix("cuts_").removesuffix(".jsonl.gz")
    cuts = list(CutSet.from_file(manifest))
    if not cuts:
        raise DataError(f"{manifest} holds no cuts; run the manifest stage again")
    nj = max(1, min(nj, len(cuts)))
    inputs = fingerprint([sha256_file(manifest), extractor.info(), nj])
    out_dir = out_dir.absolute()
    out_dir.mkdir(parents=True, exist_ok=True)
    splits = [cuts[len(cuts) * k // nj : len(cuts) * (k + 1) // nj] for k in range(nj)]
    names = [f"{part}-{k + 1}-of-{nj}" for k in range(nj)]
    jobs = [(extractor, split, out_dir, name, inputs) for split, name in zip(splits, names, strict=True)]
    if nj == 1:
        files = [_store_split(*jobs[0])]
    else:
        with ProcessPoolExecutor(nj, mp_context=multiprocessing.get_context("spawn")) as pool:
            files = list(pool.map(_store_split, *zip(*jobs, strict=True)))
    done = [cut for file in files for cut in CutSet.from_file(file)]
    with atomic_path(out_dir / f"cuts_{part}.jsonl.gz") as path:
        CutSet.from_cuts(done).to_file(path)
    write_json(out_dir / "feature_extractor.json", extractor.info())
    for file in files:
        file.unlink()
    _remove_other_shards(out_dir, part, names)
    return len(done)


def _store_split(extractor: FbankExtractor, cuts: Sequence[Cut], out_dir: Path, name: str, inputs: str) -> Path:
    """Write one split's shard and cuts, unless they are there; return the file of its cuts."""
    finished = out_dir / f".split-{name}-{inputs[:16]}.jsonl.gz"
    archive = out_dir / f"feats_{name}.lca"
    if finished.is_file() and archive.is_file():
        return finished
    torch.set_num_threads(1)
    with_features = []
    with atomic_path(archive) as path, LilcomChunkyWriter(path) as writer:
        for cut in cuts:
            try:
                wave = torch.from_numpy(np.ascontiguousarray(cut.load_audio()[0]))
                features = extractor.extract(wave).numpy()
            except (OSError, RuntimeError, ValueError, AssertionError) as error:
                raise DataError(
                    f"cut {cut.id}: no features ({error}); run the manifest stage with --check-audio full"
                ) from error
            with_features.append(_attach(cut, features, writer.write(cut.id, features), archive))
    with atomic_path(finished) as path:
        CutSet.from_cuts(with_features).to_file(path)
    return finished


def _attach(cut: Cut, features: np.ndarray, storage_key: str, archive: Path) -> Cut:
    """Return ``cut`` with stored features; their number of frames is the array's."""
    described = Features(
        type="icefall_kd-fbank",
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


def _remove_other_shards(out_dir: Path, part: str, names: Sequence[str]) -> None:
    """Remove the shards of earlier runs with another number of jobs."""
    kept = {f"feats_{name}.lca" for name in names}
    for file in [*out_dir.glob(f"feats_{part}-*-of-*.lca"), *out_dir.glob(f".split-{part}-*-of-*.jsonl.gz")]:
        if file.name not in kept:
            file.unlink()
