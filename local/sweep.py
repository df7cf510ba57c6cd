#!/usr/bin/env python3
"""Decode a grid of epochs and averages, and write one table sorted by error rate.

    local/sweep.py --exp-dir exp/mvq --epochs 20-30 --avgs 1,5,9 --test-parts dev-clean --decoding-method greedy_search

Takes all options of decode.py but --epoch, --avg and --iter.  What is decoded already is not decoded
again, so the same command goes on where it stopped.  Choose on a development set, report on a test set.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from icefall_kd.cli import config_to_dict, parse_config
from icefall_kd.config import DecodeConfig
from icefall_kd.errors import ConfigError, run_main
from icefall_kd.results import find_results, parts_by_name
from icefall_kd.results_table import markdown_table, print_table
from icefall_kd.runtime.files import write_text
from icefall_kd.scoring import RATE_NAMES

logger = logging.getLogger("sweep")

# Options of decode.py that do not alter what is recognised and how it is scored.
_IRRELEVANT = ("exp_dir", "test_parts", "manifest_dir", "shard", "num_shards", "max_duration", "bootstrap", "device",
               "num_threads", "ctm")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Decode a grid of epochs and averages, and write one table sorted by error rate."""

    epochs: str
    """Last epochs of the averages: 20-30, or 20,25,30, or both kinds."""
    avgs: list[int]
    """Numbers of epochs averaged."""
    sort_part: str | None = None
    """Part whose error rate sorts the table; None: the first of --test-parts."""
    out: Path | None = None
    """Markdown file of the table; None: sweep-<first part>.md in the folder of the search."""
    decode: DecodeConfig = DecodeConfig()


def parse_epochs(text: str) -> list[int]:
    """Return the epochs that ``text`` lists, ascending: "3-5,8" is [3, 4, 5, 8]."""
    epochs: set[int] = set()
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        try:
            found = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise ConfigError(f"--epochs is {text!r}; write epochs as 20-30 or 20,25,30") from None
        if not found or found[0] < 1:
            raise ConfigError(f"--epochs is {text!r}: {item!r} holds no epoch")
        epochs.update(found)
    return sorted(epochs)


def missing_files(config: DecodeConfig) -> list[str]:
    """Return the epoch files that this point of the grid needs and the exp_dir lacks."""
    start = config.epoch - config.avg
    if start < 0:
        return ["epochs before the first"]
    needed = {start, config.epoch} - {0} if config.use_averaged_model else range(start + 1, config.epoch + 1)
    return [f"epoch-{n}.pt" for n in sorted(needed) if not (config.exp_dir / f"epoch-{n}.pt").exists()]


def finished(config: DecodeConfig, parts: list[str]) -> dict[str, dict]:
    """Return the results of this point that are there already, by part.

    Results older than their last epoch file stem from an earlier training, and do not count.
    """
    wanted = {k: v for k, v in config_to_dict(config).items() if k not in _IRRELEVANT}
    trained = (config.exp_dir / f"epoch-{config.epoch}.pt").stat().st_mtime
    found = {}
    for file in (config.exp_dir / config.decoding_method).glob(f"results-*epoch-{config.epoch}_avg-*.json"):
        (result,) = find_results(file)
        same = all(result["config"].get(k) == v for k, v in wanted.items())
        if same and result["part"] in parts and file.stat().st_mtime >= trained:
            found[result["part"]] = result
    return found


def run_point(config: DecodeConfig, parts: dict[str, str]) -> dict[str, dict]:
    """Return the results of one point of the grid, decoding the parts that lack them.

    Args:
        config: options of decode.py with epoch and avg.
        parts: option value of each part by the part's name.
    """
    results = finished(config, list(parts))
    rest = [value for name, value in parts.items() if name not in results]
    if not rest:
        logger.info("epoch %d avg %d: decoded already", config.epoch, config.avg)
        return results
    # Here, since a finished sweep is shown again without torch.
    from icefall_kd.recipe import decode

    return results | decode(dataclasses.replace(config, test_parts=rest))


def sweep_table(
    points: list[tuple[DecodeConfig, dict[str, dict]]], sort_part: str
) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the grid, best first by the error rate of ``sort_part``."""
    parts = list(points[0][1])
    unit = RATE_NAMES[points[0][1][parts[0]]["unit"]]

    def key(point):
        rate = point[1][sort_part]["error_rate"]
        return (rate is None, rate, point[0].avg, point[0].epoch)

    cells = []
    for config, results in sorted(points, key=key):
        rates = [_percent(results[part]) for part in parts]
        cells.append([str(config.epoch), str(config.avg), *rates])
    return ["epoch", "avg", *(f"{unit} {part}" for part in parts)], cells


def _percent(result: dict) -> str:
    if result["error_rate"] is None:
        return "-"
    text = f"{result['error_rate']:.2f} %"
    return text + " ({:.2f} to {:.2f})".format(*result["interval"]) if result["interval"] else text


def main() -> None:
    """Decode what is missing, print and write the table."""
    config = parse_config(SweepConfig)
    base = config.decode
    if base.epoch is not None or base.iter is not None:
        raise ConfigError("--epoch and --iter are chosen by --epochs; leave them out")
    parts = parts_by_name(base.test_parts)
    sort_part = config.sort_part or next(iter(parts))
    if sort_part not in parts:
        raise ConfigError(f"--sort-part {sort_part} is none of --test-parts {', '.join(parts)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    points = []
    for epoch in parse_epochs(config.epochs):
        for avg in config.avgs:
            point = dataclasses.replace(base, epoch=epoch, avg=avg)
            lacking = missing_files(point)
            if lacking:
                logger.warning("epoch %d avg %d is left out: %s lacks %s", epoch, avg, base.exp_dir, ", ".join(lacking))
                continue
            results = run_point(point, parts)
            points.append((point, {name: results[name] for name in parts}))
    if not points:
        raise ConfigError(f"{base.exp_dir} has the epoch files of no point of the grid")
    header, cells = sweep_table(points, sort_part)
    out = config.out or base.exp_dir / base.decoding_method / f"sweep-{sort_part}.md"
    write_text(out, markdown_table(header, cells) + "\n")
    print_table(header, cells, title=f"{base.exp_dir}, {base.decoding_method}")


if __name__ == "__main__":
    run_main(main)
