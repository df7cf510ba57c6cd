"""Small training sets out of a large one: nested, balanced over speakers, and for a seed the same everywhere.

Libri-light's limited sets (Kahn et al. 2020, arXiv 1912.07875) are the model: 10 minutes are in 1 hour, 1 hour is in 10
hours.  How utterances are chosen is ours.
"""

import heapq
import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lhotse.cut import Cut

from icefall_kd.data.manifests import cuts_file, iterate_cuts, write_cuts
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.keys import label_key, unperturbed_key
from icefall_kd.runtime.files import atomic_write, fingerprint

logger = logging.getLogger(__name__)

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def seconds_of(amount: str) -> float:
    """Return the seconds that "90s", "10min" or "1h" name.

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", amount)
    if not found or not float(found[1]) > 0:
        raise ConfigError(f"--hours names {amount!r}; an amount is written as 90s, 10min or 1h")
    return float(found[1]) * _UNITS[found[2]]


def balanced_order(utterances: Sequence[tuple[str, str, float]], seed: int) -> list[str]:
    """Return all utterances in an order of which each beginning is balanced over speakers.

    The next utterance is always one of the speaker who has said least so far; which of his, and who begins, is drawn
    from the seed and the names alone.

    Args:
        utterances: name, speaker and seconds of each.
        seed: of the draw.
    Returns:
        The names.
    """
    by_speaker: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for name, speaker, seconds in utterances:
        by_speaker[speaker].append((name, seconds))
    for rows in by_speaker.values():
        rows.sort(key=lambda row: fingerprint([seed, row[0]]), reverse=True)  # taken from the end
    waiting = [(0.0, fingerprint([seed, "speaker", speaker]), speaker) for speaker in by_speaker]
    heapq.heapify(waiting)
    order = []
    while waiting:
        said, rank, speaker = heapq.heappop(waiting)
        name, seconds = by_speaker[speaker].pop()
        order.append(name)
        if by_speaker[speaker]:
            heapq.heappush(waiting, (said + seconds, rank, speaker))
    return order


def select_hours(
    manifest_dir: Path, part: str, amounts: Sequence[str], seed: int, out_dir: Path | None = None
) -> dict[str, Path]:
    """Write ``cuts_<part>_<amount>.jsonl.gz`` and ``<part>_<amount>.list`` for a part ``cuts_<part>.jsonl.gz``.

    A set is the shortest beginning of one order of the part that lasts as long as the amount.  Speed copies follow
    their utterances and do not count.  The list has a line an utterance: its name, speaker and seconds.

    Args:
        manifest_dir: folder of the cuts.
        part: which is divided.
        amounts: as :func:`seconds_of` reads them.
        seed: of the draw.
        out_dir: where to; None: beside the part.
    Returns:
        The files of cuts by amount.
    Raises:
        ConfigError: an amount is none.
        DataError: the part is missing, or does not last so long.
    """
    wanted = {amount: seconds_of(amount) for amount in amounts}
    copies: dict[str, list[Cut]] = defaultdict(list)
    for cut in iterate_cuts(cuts_file(manifest_dir, part)):
        copies[unperturbed_key(label_key(cut))].append(cut)
    facts = {key: _facts(key, cuts) for key, cuts in copies.items()}
    if not any(speaker for _, speaker, _ in facts.values()):
        logger.warning("%s names no speakers; the sets are drawn at random", cuts_file(manifest_dir, part))
    order = balanced_order([(key, speaker, seconds) for key, (_, speaker, seconds) in facts.items()], seed)
    total = sum(seconds for *_, seconds in facts.values())
    files, out_dir = {}, out_dir or manifest_dir
    for amount, seconds in wanted.items():
        if total < seconds:
            raise DataError(f"--hours {amount}: part {part} of {manifest_dir} lasts {total / 3600:.3f} h in all")
        chosen, lasts = [], 0.0
        for key in order:
            if lasts >= seconds:
                break
            chosen.append(key)
            lasts += facts[key][2]
        file = files[amount] = cuts_file(out_dir, f"{part}_{amount}")
        inside = set(chosen)
        count = write_cuts(file, (cut for key, cuts in copies.items() if key in inside for cut in cuts))
        with atomic_write(out_dir / f"{part}_{amount}.list", "w") as stream:
            stream.writelines("{}\t{}\t{:.3f}\n".format(*facts[key]) for key in chosen)
        speakers = len({facts[key][1] for key in chosen})
        logger.info("%s: %d utterances, %d cuts, %.0f s, %d speakers", file, len(chosen), count, lasts, speakers)
    return files


def _facts(key: str, cuts: Sequence[Cut]) -> tuple[str, str, float]:
    """Return name, speaker and seconds of an utterance, given its cut and the speed copies of that."""
    first = next((cut for cut in cuts if label_key(cut) == key), cuts[0])
    supervision = first.supervisions[0] if first.supervisions else None
    return first.id, (supervision.speaker or "") if supervision else "", first.duration
