"""Which utterances the quantizer is trained on: random, seeded, stratified by duration, no perturbed copies."""

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass

from lhotse.augmentation import AudioTransform
from lhotse.cut import Cut

from icefall_kd.errors import ConfigError, DataError

# Transforms of a recording that leave its sound as it was recorded.
_NEUTRAL = ("Resample",)


@dataclass(frozen=True)
class Candidate:
    """An utterance that may be drawn."""

    id: str
    """Id of the cut."""
    duration: float
    """Seconds."""
    perturbed: bool = False
    """Whether it is a perturbed copy."""


def candidate(item: Cut | Candidate | tuple) -> Candidate:
    """Return what sampling needs to know of a cut or of a tuple (id, duration, speed)."""
    if isinstance(item, Candidate):
        return item
    if isinstance(item, tuple):
        name, duration, speed = item
        return Candidate(str(name), float(duration), str(speed) not in ("1", "1.0", "1/1"))
    stamp = (item.custom or {}).get("source") or {}
    perturbed = stamp.get("speed", "1/1") != "1/1"
    transforms = (item.recording.transforms or []) if getattr(item, "recording", None) is not None else []
    names = [t.to_dict()["name"] if isinstance(t, AudioTransform) else t["name"] for t in transforms]
    perturbed = perturbed or any(name not in _NEUTRAL for name in names)
    return Candidate(item.id, float(item.duration), perturbed)


def sample_utterances(items: Iterable[Cut | Candidate | tuple], n: int, seed: int) -> list[str]:
    """Return the ids of ``n`` utterances, one of each of ``n`` classes of equal size and similar duration.

    The sample does not depend on the order of ``items``; all unperturbed ones are taken when there are fewer.

    Args:
        items: cuts, candidates, or tuples (id, duration in seconds, speed).
        n: size of the sample.
        seed: of the draw.
    Returns:
        Ids in a random order (a function of the seed).
    Raises:
        DataError: there is no unperturbed utterance, or an id occurs twice.
    """
    if n < 1:
        raise ConfigError(f"--quantizer-utts is {n}; it must be at least 1")
    pool = sorted((c for c in map(candidate, items) if not c.perturbed), key=lambda c: (c.duration, c.id))
    if not pool:
        raise DataError("no unperturbed utterance to train the quantizer on; give the cuts without speed copies")
    for name in _repeated(c.id for c in pool):
        raise DataError(f"cut id {name} occurs twice among the unperturbed utterances; make ids unique")
    generator = random.Random(seed)
    n = min(n, len(pool))
    edges = [i * len(pool) // n for i in range(n + 1)]
    chosen = [pool[generator.randrange(edges[i], edges[i + 1])].id for i in range(n)]
    generator.shuffle(chosen)
    return chosen


def sample_hash(ids: Iterable[str]) -> str:
    """Return the SHA-256 of a list of utterance ids, in its order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def _repeated(ids: Iterable[str]) -> Iterable[str]:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            yield name
        seen.add(name)
