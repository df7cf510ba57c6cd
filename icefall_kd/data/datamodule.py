"""Batches for training, validation and decoding, out of lhotse cuts and stored teacher labels."""

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset.sampling import DynamicBucketingSampler
from lhotse.dataset.sampling.base import TimeConstraint
from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from icefall_kd.config import AugmentConfig, DataConfig
from icefall_kd.data.augment import FeatureAugment, NoiseAugment
from icefall_kd.data.batch import LOG_EPS, Batch
from icefall_kd.data.features import FRAME_SHIFT, SILENCE, FbankExtractor
from icefall_kd.data.filters import SAMPLE_RATE, Fitness, check_cuts, cut_into_pieces, filter_cuts
from icefall_kd.data.loader import Loader, audio_of, features_of
from icefall_kd.data.manifests import iterate_cuts
from icefall_kd.data.transcripts import pad_tokens, transcript
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.compat import check_label_compat
from icefall_kd.labels.join import JoinReport
from icefall_kd.labels.keys import key_of, label_key
from icefall_kd.labels.reading import read_labels
from icefall_kd.labels.store import LabelStore
from icefall_kd.labels.text_reading import coverage, read_text_states
from icefall_kd.runtime.dist import get_rank, get_world_size
from icefall_kd.runtime.files import fingerprint
from icefall_kd.runtime.seeds import stable_seed
from icefall_kd.systems.base import LabelSpec
from icefall_kd.text.alignment import Unit
from icefall_kd.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def cuts_path(manifest_dir: Path, part: str) -> Path:
    """Return the cuts file of ``part``: a path of its own, or a name in ``manifest_dir``."""
    direct = Path(part)
    path = direct if direct.suffix in (".gz", ".jsonl") else Path(manifest_dir) / f"cuts_{part}.jsonl.gz"
    if not path.is_file():
        known = sorted(p.name[5:-9] for p in Path(manifest_dir).glob("cuts_*.jsonl.gz"))
        raise DataError(f"there is no cut set {path}; parts in {manifest_dir}: {', '.join(known) or 'none'}")
    return path


def load_cuts(manifest_dir: Path, parts: Iterable[str]) -> CutSet:
    """Return the cuts of all parts, in memory and in order; DataError when a part is missing, damaged or empty."""
    cuts: list[Cut] = []
    for part in parts:
        cuts += iterate_cuts(cuts_path(manifest_dir, part))
    return CutSet.from_cuts(cuts)


class Buckets:
    """Ranges of duration with about equally much audio, as lhotse's sampler makes them."""

    def __init__(self, cuts: CutSet, num_buckets: int) -> None:
        """Divide the durations of ``cuts`` (each with ``custom["num_tokens"]``) into at most ``num_buckets`` ranges."""
        num_buckets = max(1, min(num_buckets, len(cuts) // 4))
        # lhotse's estimate, of as many cuts as it takes by default, knows no single bucket.
        self.bins = estimate_duration_buckets(islice(cuts, 10000), num_buckets) if num_buckets > 1 else []
        self.cuts: list[list[Cut]] = [[] for _ in range(len(self.bins) + 1)]
        for cut in cuts:
            self.cuts[self.index(cut)].append(cut)
        self.most_tokens = [max((c.custom["num_tokens"] for c in some), default=0) for some in self.cuts]

    def index(self, cut: Cut) -> int:
        """Return the bucket of a cut."""
        return TimeConstraint().select_bucket(self.bins, cut)


@dataclass
class DurationAndTokens(TimeConstraint):
    """A batch limit on seconds of audio and on padded tokens.

    The sampler draws from one bucket and adds a cut before it looks, so that the last one may carry the padded
    audio beyond ``max_duration`` by the width of its bucket (as everywhere with lhotse).  Texts of one duration
    differ much more, so tokens are counted as the most that any cut of the bucket has: ``max_tokens`` holds.
    """

    max_tokens: int | None = None
    buckets: Buckets | None = None
    most_tokens: int = 0

    def add(self, example: Cut) -> None:
        """Count one cut."""
        super().add(example)
        if self.max_tokens is not None:
            # Buckets of a stream know a sample of their cuts.
            most = max(self.buckets.most_tokens[self.buckets.index(example)], example.custom["num_tokens"])
            self.most_tokens = max(self.most_tokens, most)

    def exceeded(self) -> bool:
        """Return whether either limit is passed."""
        return super().exceeded() or self._too_many(self.num_cuts)

    def close_to_exceeding(self) -> bool:
        """Return whether one more cut like the largest would pass a limit."""
        return super().close_to_exceeding() or self._too_many(self.num_cuts + 1)

    def _too_many(self, num_cuts: int) -> bool:
        return self.max_tokens is not None and num_cuts > 1 and num_cuts * self.most_tokens > self.max_tokens

    def reset(self) -> None:
        """Begin a new batch."""
        super().reset()
        self.most_tokens = 0


class CutBatches(Dataset):
    """Turn (epoch, batch index, cuts) into a :class:`Batch`; runs in the loader's workers."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        features: str = "precomputed",
        augment: AugmentConfig | None = None,
        stores: dict[str, LabelStore] | None = None,
        text_alignment: Unit = "token",
        with_audio: bool = False,
        seed: int = 0,
        tail_padding: float = 0.0,
    ) -> None:
        self.tokenizer, self.tokens = tokenizer, tokenizer.tokens if tokenizer else []
        self.tail_padding = tail_padding
        self.extractor = FbankExtractor() if features == "on_the_fly" else None
        self.spec_aug = FeatureAugment(augment) if augment is not None and augment.spec_aug else None
        self.noise = NoiseAugment(augment, features) if augment is not None and augment.musan_cuts else None
        self.stores, self.text_alignment = stores or {}, text_alignment
        # Cut sets that name no spans of recordings can be decoded and trained on, but not joined with labels of audio.
        self.with_keys = any(store.info.key_kind == "audio" for store in self.stores.values())
        self.with_audio = with_audio
        self.seed = seed
        # Whether an utterance without labels gets made-up ones of the right length, for a look at the memory.
        self.label_all = False

    def __getitem__(self, plan: tuple[int, int, CutSet]) -> Batch:
        epoch, index, cuts = plan
        clean = list(cuts)
        heard = clean
        if self.noise is not None:
            # The first cut tells the ranks apart.
            heard = self.noise(cuts, stable_seed(self.seed, epoch, index, "noise", clean[0].id))
        features = [self._features(cut) for cut in heard]
        if self.spec_aug is not None:
            features = [
                self.spec_aug(x, stable_seed(self.seed, epoch, index, i, cut.id))
                for i, (x, cut) in enumerate(zip(features, clean, strict=True))
            ]
        keys = [label_key(cut) for cut in clean] if self.with_keys else []
        frames = [len(x) for x in features]
        texts, ids, y, y_lens = [], [], None, None
        if self.tokenizer is not None:
            texts = [transcript(cut) for cut in clean]
            y, y_lens = pad_tokens(self.tokenizer, texts)
            ids = [row[:n] for row, n in zip(y.tolist(), y_lens.tolist(), strict=True)]
        audio = audio_lens = None
        if self.with_audio:
            silence = round(self.tail_padding * SAMPLE_RATE)
            waves = [F.pad(audio_of(cut), (0, silence)) for cut in clean]
            audio_lens = torch.tensor([len(w) for w in waves])
            audio = pad_sequence(waves, batch_first=True)
        return Batch(
            ids=[cut.id for cut in clean],
            keys=keys,
            features=pad_sequence(features, batch_first=True, padding_value=LOG_EPS),
            x_lens=torch.tensor(frames),
            audio=audio,
            audio_lens=audio_lens,
            texts=texts,
            y=y,
            y_lens=y_lens,
            labels={
                name: read_text_states(
                    store, texts, [len(i) for i in ids], self.tokenizer, self.text_alignment, self.label_all
                )
                if store.info.key_kind == "text"
                else read_labels(store, clean, keys, frames, ids or [[]] * len(clean), self.tokens, self.label_all)
                for name, store in ((name, store.of(clean)) for name, store in self.stores.items())
            },
            durations=[cut.duration for cut in clean],
        )

    def _features(self, cut: Cut) -> Tensor:
        """Return the features (T, C) of a cut, with those of the silence that is put behind it."""
        if self.extractor is not None:
            wave = audio_of(cut)
            if self.tail_padding:
                wave = F.pad(wave, (0, round(self.tail_padding * self.extractor.sampling_rate)))
            return self.extractor.extract(wave)
        features = features_of(cut)
        if not self.tail_padding:
            return features
        # Stored features know nothing of what follows: windows that cross the end differ from those of padded audio.
        return F.pad(features, (0, 0, 0, round(self.tail_padding / FRAME_SHIFT)), value=SILENCE)


def _keys(cuts: Iterable[Cut], store: LabelStore) -> Iterator[str]:
    return (key_of(cut, store.info.key_kind) for cut in cuts)


def _content(cut: Cut) -> str:
    """Return the label key of a cut, or its id when it names no single span of one recording."""
    try:
        return label_key(cut)
    except DataError:
        return cut.id


class _Plans:
    """The sampler's batches of an epoch, numbered, without the first ``skip`` ones."""

    def __init__(self, sampler, epoch: int, skip: int) -> None:
        self.sampler, self.epoch, self.skip = sampler, epoch, skip

    def __iter__(self) -> Iterator[tuple[int, int, CutSet]]:
        numbered = enumerate(iter(self.sampler))
        return ((self.epoch, index, cuts) for index, cuts in islice(numbered, self.skip, None))


def _spread(cuts: CutSet, count: int | None) -> CutSet:
    """Return ``count`` cuts at even distances, or all when there are no more."""
    total = len(cuts)
    if count is None or count >= total:
        return cuts
    kept = list(cuts)
    return CutSet.from_cuts(kept[i * total // count] for i in range(count))


class DataModule:
    """The data of one training: deterministic in (seed, epoch, rank), whatever the number of workers."""

    def __init__(
        self,
        config: DataConfig,
        augment: AugmentConfig,
        tokenizer: Tokenizer | None,
        *,
        label_specs: list[LabelSpec] = (),
        min_coverage: float = 1.0,
        text_alignment: Unit = "token",
        with_audio: bool = False,
        own_audio: bool = False,
        own_labels: bool = False,
        transducer: bool = True,
        ctc: bool = True,
        end_token: bool = False,
        num_encoder_frames=None,
        min_encoder_frames: int = 1,
        crop_duration: float | None = None,
        seed: int = 42,
    ) -> None:
        """Read the cut sets and keep what can be trained on.

        Args:
            config, augment: where the data is, and what the student hears of it.
            tokenizer: of the transcripts; None: there are none, batches hold audio and features alone.
            label_specs, min_coverage, text_alignment: teacher labels, and how they meet the utterances.
            with_audio: whether training batches hold audio.
            own_audio: whether those of validation do, too: for a model that hears samples itself.
            own_labels: whether they hold the teacher's labels, too: for a model that learns from these alone.
            transducer, ctc, end_token, num_encoder_frames, min_encoder_frames: of filters.filter_cuts.
            crop_duration: longer utterances are cut into equal pieces of at most so many seconds; None: not.
            seed: of shuffling and augmentation.
        """
        self.config, self.tokenizer, self.seed, self.crop_duration = config, tokenizer, seed, crop_duration
        self.with_audio = with_audio
        cuts = self._training_cuts()
        valid_cuts = load_cuts(config.manifest_dir, config.valid_parts)
        for name, some in ((self.train_option, cuts), ("--valid-parts", valid_cuts)):
            check_cuts(some, config.features, name)
        if crop_duration is not None:
            valid_cuts = cut_into_pieces(valid_cuts, crop_duration)
        keep = {
            "tokenizer": tokenizer,
            "min_duration": config.min_utt_duration,
            "max_duration": config.max_utt_duration,
            "transducer": transducer,
            "ctc": ctc,
            "end_token": end_token,
            "num_encoder_frames": num_encoder_frames,
            "min_encoder_frames": min_encoder_frames,
        }
        self.fitness = Fitness(**keep)
        self.train_cuts, self.rejected = filter_cuts(self._cropped(cuts), **keep)
        self.valid_cuts = _spread(filter_cuts(valid_cuts, **keep)[0], config.valid_utts)
        if len(self.train_cuts) == 0:
            raise DataError(f"no training utterance is left of {len(cuts)}: {self.rejected[:3]}")
        self.buckets = Buckets(self.train_cuts, config.num_buckets)
        self.stores = {spec.name: self._open_labels(spec) for spec in label_specs if spec.path}
        warp = augment.spec_aug_time_warp_factor if augment.spec_aug else 0
        if with_audio and warp >= 1:
            raise ConfigError(
                f"--spec-aug-time-warp-factor is {warp}, online teacher labels need 0: time warp moves the student's "
                "frames away from the teacher's"
            )
        kinds = {spec.name: spec.kind for spec in label_specs}
        self.text_coverage: dict | None = None  # how the training's texts meet a language model's states
        for name, store in self.stores.items():
            wanted = {"kind": kinds[name], "tokenizer_hash": tokenizer.hash if tokenizer else None}
            check_label_compat(store.info, str(store.path), time_warp_factor=warp, **wanted)
            logger.info("labels %s: %s", name, self._join(store, min_coverage))
            if store.info.key_kind == "text":
                self._report_alignment(name, store, text_alignment)
        self.train_data = CutBatches(
            tokenizer,
            features=config.features,
            augment=augment,
            stores=self.stores,
            text_alignment=text_alignment,
            with_audio=with_audio,
            seed=seed,
        )
        labels = {"stores": self._labels_of_validation(label_specs, min_coverage)} if own_labels else {}
        self.valid_data = CutBatches(tokenizer, features=config.features, with_audio=own_audio, **labels)
        self._log_size()

    train_option = "--train-parts"
    """Where the training cuts come from, for messages."""

    def _training_cuts(self) -> CutSet:
        """Return the cuts to train on, before anything is left out."""
        return load_cuts(self.config.manifest_dir, self.config.train_parts)

    def _cropped(self, cuts: CutSet) -> CutSet:
        """Return the pieces that training hears of its cuts, or the cuts."""
        return cuts if self.crop_duration is None else cut_into_pieces(cuts, self.crop_duration)

    def _open_labels(self, spec: LabelSpec) -> LabelStore:
        return LabelStore(spec.path, expect=spec.expect)

    def _join(self, store: LabelStore, min_coverage: float) -> JoinReport:
        """Return how the training cuts meet their labels; a DataError below ``min_coverage``."""
        return store.join(_keys(self.train_cuts, store), min_coverage=min_coverage)

    def _labels_of_validation(self, specs: Iterable[LabelSpec], min_coverage: float) -> dict[str, LabelStore]:
        """Return the label sets by name, joined with the cuts of validation."""
        stores = {spec.name: self._open_whole(spec) for spec in specs if spec.path}
        for name, store in stores.items():
            report = store.join(_keys(self.valid_cuts, store), min_coverage=min_coverage)
            logger.info("labels %s of validation: %s", name, report)
        return stores

    def _open_whole(self, spec: LabelSpec) -> LabelStore:
        return self.stores[spec.name]

    @property
    def train_seconds(self) -> float:
        """Seconds of audio of an epoch, over all ranks."""
        return sum(cut.duration for cut in self.train_cuts)

    def _log_size(self) -> None:
        logger.info(
            "training on %d utterances, %.2f h (%d left out by the filters), validating on %d",
            len(self.train_cuts), self.train_seconds / 3600, len(self.rejected), len(self.valid_cuts),
        )  # fmt: skip

    def _cuts_with(self, store: LabelStore) -> Sequence[Cut]:
        """Return the training cuts, or a sample of them, whose labels can be asked for."""
        return list(self.train_cuts)

    def _report_alignment(self, name: str, store: LabelStore, unit: Unit) -> None:
        """Log how the states of a language model meet the tokens; a DataError when no text can be aligned."""
        cuts = self._cuts_with(store)
        report = coverage(store.of(cuts), map(transcript, cuts), self.tokenizer, unit)
        # Many unknown pieces: texts of another case, or of another language.
        strange = report.misaligned or 10 * report.unknown > report.units
        level = logging.WARNING if strange else logging.INFO
        logger.log(level, "labels %s, by %s: %s", name, unit, report)
        if not report.aligned:
            raise DataError(f"no text of the training aligns with the states in {store.path}: {report}")
        names = ("utterances", "aligned", "missing", "misaligned")
        self.text_coverage = {"unit": unit, **{n: getattr(report, n) for n in names}}

    def state(self) -> dict:
        """Return what must not change between a stop and a resume."""
        keys = [_content(cut) for cut in self.train_cuts]
        return {"train_cuts": fingerprint(keys), "labels": {n: s.info.fingerprint for n, s in self.stores.items()}}

    def train_batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Return the batches of ``epoch`` (from 1) for this rank, without its first ``skip`` ones.

        Skipped batches are drawn from the sampler but never read.
        """
        return iter(Loader(self.train_data, _Plans(self._sampler(epoch), epoch, skip), self.config.num_workers))

    def num_batches(self, epoch: int) -> int:
        """Return how many batches an epoch has for each rank, by drawing them without reading any."""
        return sum(1 for _ in self._sampler(epoch))

    def _sampler(self, epoch: int) -> DynamicBucketingSampler:
        with warnings.catch_warnings():
            # Lazy cuts save memory alone; ours are filtered, counted and joined with labels before the first batch.
            warnings.filterwarnings("ignore", "You are using DynamicBucketingSampler with an eagerly read CutSet")
            sampler = DynamicBucketingSampler(
                self.train_cuts,
                constraint=self._limits(),
                duration_bins=self.buckets.bins,
                shuffle=True,
                drop_last=self.config.drop_last,
                seed=self.seed,
                rank=get_rank(),
                world_size=get_world_size(),
            )
        sampler.set_epoch(epoch)
        return sampler

    def valid_batches(self) -> Iterator[Batch]:
        """Return the validation batches of this rank, longest first, without augmentation or labels."""
        plans = _fixed_batches(self.valid_cuts, self.config.max_duration, rank=True)
        return iter(Loader(self.valid_data, plans, self.config.num_workers))

    def worst_batches(self) -> list[Batch]:
        """Return the worst that the sampler can do: most padded audio, most padded tokens, most utterances.

        In a bucket it is the smallest cuts until one more like them would pass a limit, and then the largest one.
        Labels are attached, made-up ones where an utterance has none (--min-coverage below 1): with labels it would
        need more.
        """
        measures = (lambda cut: cut.duration, lambda cut: cut.custom["num_tokens"])
        candidates = []
        for cuts in filter(None, self.buckets.cuts):
            for measure in measures:
                *others, largest = sorted(cuts, key=measure)
                limits, chosen = self._limits(), [largest]
                for cut in others:
                    limits.add(cut)
                    if limits.close_to_exceeding():
                        break
                    chosen.append(cut)
                candidates.append(chosen)
        sizes = [*(lambda some, m=m: len(some) * max(map(m, some)) for m in measures), len]
        worst = [max(candidates, key=size) for size in sizes]
        data = copy.copy(self.train_data)
        data.label_all = True
        return [data[(0, i, CutSet.from_cuts(self._with_data(some)))] for i, some in enumerate(worst)]

    def _with_data(self, cuts: list[Cut]) -> list[Cut]:
        """Return the cuts of a bucket with what their features and labels are read from."""
        return cuts

    def _limits(self) -> DurationAndTokens:
        config = self.config
        return DurationAndTokens(
            max_duration=config.max_duration, max_tokens=config.max_tokens, buckets=self.buckets
        )


def _fixed_batches(cuts: Iterable[Cut], max_duration: float, rank: bool = False) -> list[tuple[int, int, CutSet]]:
    """Cut a list of utterances, sorted by duration, into batches; with ``rank`` only this rank's share."""
    plans: list[list[Cut]] = [[]]
    for cut in sorted(cuts, key=lambda c: (-c.duration, c.id)):
        if plans[-1] and (len(plans[-1]) + 1) * plans[-1][0].duration > max_duration:
            plans.append([])
        plans[-1].append(cut)
    chosen = plans[get_rank() :: get_world_size()] if rank else plans
    return [(0, i, CutSet.from_cuts(p)) for i, p in enumerate(chosen) if p]


def decoding_batches(
    cuts: CutSet,
    tokenizer: Tokenizer,
    *,
    max_duration: float,
    features: str,
    num_workers: int = 1,
    tail_padding: float = 0.0,
    with_audio: bool = False,
) -> Iterable[Batch]:
    """Return batches of all ``cuts``, longest first, without augmentation, filters or labels; read when iterated.

    With ``tail_padding``, so many seconds of silence follow each utterance: streaming models emit late.

    Raises:
        DataError: a cut is not at 16 kHz, or lacks what its features are read from.
    """
    check_cuts(cuts, features, "the cuts to decode")
    data = CutBatches(tokenizer, features=features, tail_padding=tail_padding, with_audio=with_audio)
    return Loader(data, _fixed_batches(cuts, max_duration), num_workers)
