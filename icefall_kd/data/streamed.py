"""Batches for training out of a Shar (data/shar.py), streamed by rank and worker, resumable at any batch."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lhotse import CutSet
from lhotse.cut import Cut
from torch.utils.data import Dataset

from icefall_kd.data.batch import Batch
from icefall_kd.data.datamodule import CutBatches, DataModule
from icefall_kd.data.loader import Loader
from icefall_kd.data.shar import Shar, StreamedLabels
from icefall_kd.data.stream import PLACE, Plan, Position, Stream, StreamState
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.labels.join import JoinReport
from icefall_kd.labels.store import LabelStore
from icefall_kd.runtime import dist
from icefall_kd.systems.base import LabelSpec

logger = logging.getLogger(__name__)

# Cuts that buckets, the look at the memory and the first filtering know of a Shar.
SAMPLE = 10_000
# Of these, cuts whose texts are aligned with a language model's states before the training.
ALIGNED = 1000


class SharDataModule(DataModule):
    """The data of one training, out of a Shar: deterministic in (seed, epoch, rank), whatever the number of workers.

    What the data module of cut sets learns from all cuts, this one learns from a sample of some shards and from the
    rows of all: nothing grows with the number of cuts.  Cuts are filtered as they come.  An epoch ends on all ranks
    when the first has no batch left.
    """

    train_option = "--shar-dir"

    def _training_cuts(self) -> CutSet:
        """Return a sample: the cuts of some shards at even distances, and of those with the longest audio and text."""
        config = self.config
        self.shar = Shar(config.shar_dir)
        wanted = "features" if config.features == "precomputed" else "recording"
        self.shar.require([wanted], f"--features {config.features}")
        if self.with_audio:
            self.shar.require(["recording"], "a teacher or a model that hears samples")
        if self.shar.info.pieces != self.crop_duration:
            written, wanted = self.shar.info.pieces, self.crop_duration
            raise ConfigError(
                f"--shar-dir {self.shar.path} holds {_pieces(written)}, this training hears {_pieces(wanted)}; export "
                "with --pieces as this training's --crop-duration"
            )
        rows = self.shar.rows
        count = min(len(rows), -(-SAMPLE * len(rows) // self.shar.num_cuts))
        chosen = {i * len(rows) // count for i in range(count)}
        chosen |= {max(rows, key=lambda row: row.longest).shard, max(rows, key=lambda row: row.most_text).shard}
        cuts = []
        for shard in sorted(chosen):
            for offset, cut in enumerate(self.shar.read(shard, ())):
                cut.custom[PLACE] = [shard, offset]
                cuts.append(cut)
        return CutSet.from_cuts(cuts)

    def _cropped(self, cuts: CutSet) -> CutSet:
        return cuts  # when it was written

    def _open_labels(self, spec: LabelSpec) -> StreamedLabels:
        LabelSetInfo.load(Path(spec.path)).check(spec.expect, spec.path)
        return StreamedLabels(self.shar, self.shar.field_of(spec.path))

    def _join(self, store: StreamedLabels, min_coverage: float) -> JoinReport:
        report = self.shar.coverage(store.field)
        if report.coverage < min_coverage:
            raise DataError(
                f"--shar-dir {self.shar.path} has too few labels of {store.field}: {report}; --min-coverage is "
                f"{min_coverage}. Extract labels of these cuts and export them again"
            )
        return report

    def _cuts_with(self, store: StreamedLabels) -> list[Cut]:
        # One shard is a random sample, and a language model's states of all of them would fill the memory.
        return self._with_data(list(itertools.islice(self.train_cuts, ALIGNED)), [store.field])

    def _open_whole(self, spec: LabelSpec) -> LabelStore:
        # Validation is of cut sets, whose labels are looked up.
        try:
            return DataModule._open_labels(self, spec)
        except DataError as error:
            raise DataError(
                f"{error}. The cuts of validation need their labels: --label-dir must be the whole label set, not what "
                "a Shar knows of it"
            ) from error

    @property
    def train_seconds(self) -> float:
        """Seconds of audio of an epoch, over all ranks, before the filters."""
        return self.shar.seconds

    def _log_size(self) -> None:
        logger.info(
            "streaming %d utterances, %.2f h, in %d shards, %d streams a rank (of a sample of %d, the filters leave "
            "out %d), validating on %d",
            self.shar.num_cuts, self.train_seconds / 3600, len(self.shar.rows), self.config.shar_streams,
            len(self.train_cuts) + len(self.rejected), len(self.rejected), len(self.valid_cuts),
        )  # fmt: skip
        # Refuses too few shards for the ranks before the first epoch does.
        plan = self._plan(())
        some, lanes = len(self.shar.rows), plan.num_streams * plan.world_size
        if some % lanes and some < 20 * lanes:
            logger.warning(
                "%d shards are dealt to %d streams: some have one more, and an epoch ends when the first rank has read "
                "its own; export with a multiple of %d, or with many more shards", some, lanes, lanes,
            )  # fmt: skip
        held = self.config.shar_buffer * sum(c.duration for c in self.train_cuts) / len(self.train_cuts)
        if held < 2 * self.config.max_duration * (len(self.buckets.bins) + 1):
            logger.warning(
                "--shar-buffer %d holds about %.0f s of audio, less than two batches of %.0f s for each of %d buckets: "
                "some batches will be small; raise it, or lower --num-buckets",
                self.config.shar_buffer, held, self.config.max_duration, len(self.buckets.bins) + 1,
            )  # fmt: skip

    def state(self) -> dict:
        """Return what must not change between a stop and a resume."""
        labels = {name: store.info.fingerprint for name, store in self.stores.items()}
        return {"train_cuts": self.shar.fingerprint, "labels": labels}

    def train_batches(self, epoch: int, skip: int = 0, position: dict | None = None) -> Iterator[Batch]:
        """Return the batches of ``epoch`` (from 1) for this rank, from ``position`` on (``Batch.position``).

        Raises:
            DataError: ``skip`` batches are done and nothing says where the streams stood then.
        """
        if skip and position is None:
            raise DataError(
                f"the training stopped behind batch {skip} of epoch {epoch}, and its checkpoint does not say where the "
                "streams of the Shar stood; continue from an epoch-N.pt, or use another --exp-dir"
            )
        return _together(self._batches(epoch, position))

    def num_batches(self, epoch: int) -> int:
        """Return how many batches an epoch has for each rank, by drawing them without reading any.

        Each rank draws its own, which takes as long as reading the cuts of its shards.
        """
        plan, drawn = self._plan(()), 0
        for number in range(plan.num_streams):
            stream = Stream(plan, epoch, number, StreamState())
            while stream.next_batch() is not None:
                drawn += 1
        return min(dist.gather_objects(drawn))

    def _plan(self, fields: Sequence[str]) -> Plan:
        config = self.config
        return Plan(
            shar=self.shar,
            fields=tuple(fields),
            fitness=self.fitness,
            bins=list(self.buckets.bins),
            limits=self._limits(),
            num_streams=config.shar_streams,
            buffer_size=config.shar_buffer,
            drop_last=config.drop_last,
            seed=self.seed,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
        )

    @property
    def _fields(self) -> list[str]:
        """Names of what training reads of a shard."""
        data = ["features"] if self.config.features == "precomputed" else []
        if self.with_audio or not data:
            data.append("recording")
        return [*data, *(store.field for store in self.stores.values())]

    def _batches(self, epoch: int, position: dict | None) -> Iterator[Batch]:
        count = self.config.shar_streams
        at = Position(0, (StreamState(),) * count) if position is None else Position.from_dict(position)
        streams, ended = list(at.streams), set()
        turns = itertools.count(at.turn)
        data = _Turns(self.train_data, self._plan(self._fields), epoch, at.streams)
        for turn, item in zip(itertools.count(at.turn), Loader(data, turns, self.config.num_workers), strict=False):
            if item is None:
                ended.add(turn % count)
                if len(ended) == count:
                    break
                continue
            batch, streams[turn % count] = item
            yield replace(batch, position=Position(turn + 1, tuple(streams)).to_dict())
        # What the last batches of its streams did not see is not counted.
        logger.info("the streams of this rank end; the filters left out %d cuts", sum(s.left_out for s in streams))

    def _with_data(self, cuts: list[Cut], fields: Sequence[str] | None = None) -> list[Cut]:
        fields = self._fields if fields is None else fields
        places = [tuple(cut.custom[PLACE]) for cut in cuts]
        found = {}
        for shard in sorted({shard for shard, _ in places}):
            last = max(offset for k, offset in places if k == shard)
            for offset, cut in enumerate(itertools.islice(self.shar.read(shard, fields), last + 1)):
                found[shard, offset] = cut
        return [found[place] for place in places]


def _pieces(seconds: float | None) -> str:
    return "utterances" if seconds is None else f"pieces of at most {seconds} s"


class _Turns(Dataset):
    """The batch of a turn, drawn from the stream whose turn it is; a worker has some of the streams of its rank.

    Workers are asked in turn, and their number divides that of the streams: each is asked for its own streams alone, in
    order.
    """

    def __init__(self, data: CutBatches, plan: Plan, epoch: int, starts: Sequence[StreamState]) -> None:
        self.data, self.plan, self.epoch, self.starts = data, plan, epoch, starts
        self.streams: dict[int, Stream] = {}

    def __getitem__(self, turn: int) -> tuple[Batch, StreamState] | None:
        number = turn % self.plan.num_streams
        if number not in self.streams:
            self.streams[number] = Stream(self.plan, self.epoch, number, self.starts[number])
        stream = self.streams[number]
        cuts = stream.next_batch()
        return None if cuts is None else (self.data[self.epoch, turn, cuts], stream.state)


def _together(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches until the first of all ranks has none: ranks that read other shards do not have equally many."""
    if dist.get_world_size() == 1:
        yield from batches
        return
    device = dist.collective_device()
    while not dist.any_rank((batch := next(batches, None)) is None, device):
        yield batch
