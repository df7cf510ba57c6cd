"""Streams of a Shar: each reads its shards one after the other and makes batches of what it holds (our design).

A rank has some streams, each with shards of its own; batches come from its streams in turn.  The shards of an epoch are
dealt out anew, by its seed.  A stream holds ``buffer_size`` cuts with their data in buckets of duration (Lhotse's
DynamicBucketer), gives a batch out of one bucket and reads as many cuts as it gave.  What it draws is a function of the
seed, the epoch, the stream, the number of the batch and the cuts that it holds.  So (shard, offset) of where it reads
and of each cut that it holds is all that a resumed stream needs: it reads again what it held, and not what went before.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset.sampling.base import SamplingConstraint
from lhotse.dataset.sampling.dynamic_bucketing import DynamicBucketer

from icefall_kd.data.filters import Fitness, counted
from icefall_kd.data.shar import Shar
from icefall_kd.errors import ConfigError
from icefall_kd.runtime.seeds import stable_seed

# Custom field of a cut: the shard's place in the order of its stream, and the cut's in the shard.
PLACE = "place"


@dataclass(frozen=True)
class StreamState:
    """Where a stream stands after a batch."""

    batches: int = 0
    """Batches that it has given."""
    shard: int = 0
    """Which of its shards it reads, by their order in the epoch."""
    offset: int = 0
    """Cuts of that shard that it has read."""
    held: np.ndarray | None = None
    """(n, 2) int32: place (shard, offset) of each cut that it holds, bucket by bucket; None: it has not begun."""
    left_out: int = 0
    """Cuts that the filters left out."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as what a checkpoint may hold."""
        held = np.zeros((0, 2), np.int32) if self.held is None else self.held
        return {**vars(self), "held": torch.from_numpy(held)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StreamState":
        """Read back :meth:`to_dict`."""
        return cls(**{**values, "held": values["held"].numpy()})


@dataclass(frozen=True)
class Plan:
    """What the streams of all ranks have in common."""

    shar: Shar
    fields: tuple[str, ...]
    """What is read beside the cuts; nothing: batches are drawn and not read."""
    fitness: Fitness
    bins: list[float]
    """Bounds of the buckets in seconds."""
    limits: SamplingConstraint
    num_streams: int
    """Streams a rank."""
    buffer_size: int
    """Cuts that a stream holds."""
    drop_last: bool
    seed: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        needed, there = self.num_streams * self.world_size, self.shar.info.num_shards
        if there < needed:
            raise ConfigError(
                f"--shar-dir {self.shar.path} has {there} shards; {self.world_size} ranks with --shar-streams "
                f"{self.num_streams} need at least {needed}: take fewer streams, or export with more --num-shards"
            )

    def order(self, epoch: int, stream: int) -> list[int]:
        """Return the shards of a stream of this rank in an epoch, in order.

        Shards that are over go to other ranks first, and only then to other streams of one rank.
        """
        shards = list(range(self.shar.info.num_shards))
        random.Random(stable_seed(self.seed, epoch, "shards")).shuffle(shards)
        return shards[stream * self.world_size + self.rank :: self.num_streams * self.world_size]


class Stream:
    """One stream of this rank in one epoch.

    Args:
        plan: see there.
        epoch: from 1.
        stream: which one, from 0.
        start: where it goes on.
    """

    def __init__(self, plan: Plan, epoch: int, stream: int, start: StreamState) -> None:
        self.plan, self.epoch, self.stream = plan, epoch, stream
        self.order = plan.order(epoch, stream)
        self.batches, self.left_out = start.batches, start.left_out
        self._at = (start.shard, start.offset)
        self._bucketer = DynamicBucketer(
            self._cuts([] if start.held is None else list(map(tuple, start.held.tolist()))),
            duration_bins=plan.bins,
            world_size=1,
            constraint=plan.limits,
            drop_last=plan.drop_last,
            buffer_size=plan.buffer_size,
            shuffle=True,
            rng=random.Random(),
            bucket_rng=random.Random(),
        )
        self._drawn: Iterator[CutSet] = iter(self._bucketer)
        self._given: set[tuple[int, int]] = set()

    def next_batch(self) -> CutSet | None:
        """Return the next batch, or None at the end of the epoch."""
        seed, number = self.plan.seed, self.batches
        self._bucketer.rng.seed(stable_seed(seed, self.epoch, self.plan.rank, self.stream, number))
        # Equal on all ranks, which so choose the same bucket as long as it is filled.
        self._bucketer.bucket_rng.seed(stable_seed(seed, self.epoch, "bucket", self.stream, number))
        cuts = next(self._drawn, None)
        if cuts is None:
            return None
        self.batches += 1
        self._given = {tuple(cut.custom[PLACE]) for cut in cuts}
        return cuts

    @property
    def state(self) -> StreamState:
        """Where it stands after the latest batch."""
        held = [tuple(cut.custom[PLACE]) for bucket in self._bucketer.buckets for cut in bucket.queue]
        places = np.array([place for place in held if place not in self._given], np.int32).reshape(-1, 2)
        return StreamState(self.batches, *self._at, places, self.left_out)

    def _cuts(self, held: Sequence[tuple[int, int]]) -> Iterator[Cut]:
        """Yield what was held, in that order, and then what follows."""
        yield from self._again(held)
        first, done = self._at
        for i in range(first, len(self.order)):
            for offset, cut in enumerate(self.plan.shar.read(self.order[i], self.plan.fields)):
                if i == first and offset < done:
                    continue
                self._at = (i, offset + 1)
                fit = self._fit(cut, (i, offset))
                if fit is None:
                    self.left_out += 1
                else:
                    yield fit
            self._at = (i + 1, 0)

    def _again(self, held: Sequence[tuple[int, int]]) -> Iterator[Cut]:
        """Read again the cuts of these places."""
        found: dict[tuple[int, int], Cut] = {}
        for i in sorted({shard for shard, _ in held}):
            wanted = {offset for shard, offset in held if shard == i}
            for offset, cut in enumerate(self.plan.shar.read(self.order[i], self.plan.fields)):
                if offset in wanted:
                    found[i, offset] = self._fit(cut, (i, offset))
                if offset == max(wanted):
                    break
        for place in held:
            yield found.pop(place)

    def _fit(self, cut: Cut, place: tuple[int, int]) -> Cut | None:
        """Return a cut with its place and its number of tokens, or None when it cannot be trained on."""
        reason, num_tokens = self.plan.fitness.judge(cut)
        if reason is not None:
            return None
        fit = counted(cut, num_tokens)
        fit.custom[PLACE] = list(place)
        return fit


@dataclass(frozen=True)
class Position:
    """Where the streams of a rank stand after a batch."""

    turn: int
    """Turns so far; the next one is that of stream ``turn`` modulo the number of streams."""
    streams: tuple[StreamState, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as what a checkpoint may hold."""
        return {"turn": self.turn, "streams": [state.to_dict() for state in self.streams]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Position":
        """Read back :meth:`to_dict`."""
        return cls(values["turn"], tuple(map(StreamState.from_dict, values["streams"])))
