#!/usr/bin/env python3
"""Compare two systems on the same utterances by the paired bootstrap, pooled over seeds.

local/compare.py --a exp/none-1,exp/none-2,exp/none-3 --b exp/mvq-1,exp/mvq-2,exp/mvq-3 --part test
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from icefall_kd.cli import parse_config
from icefall_kd.errors import ConfigError, DataError, run_main
from icefall_kd.results import compare, find_results
from icefall_kd.runtime.files import write_json
from icefall_kd.scoring import RATE_NAMES


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare two systems on the same utterances by the paired bootstrap, pooled over seeds."""

    a: list[Path]
    """exp_dirs (or results-*.json files) of the first system, one a seed."""
    b: list[Path]
    """exp_dirs (or results-*.json files) of the second system."""
    part: str | None = None
    """Part to compare on; None: all parts that every exp_dir has."""
    decoding_method: str | None = None
    """Which search, where an exp_dir has several."""
    suffix: str | None = None
    """Which decoding (suffix of the result files), where an exp_dir has several."""
    bootstrap: int = 10000
    """Bootstrap samples."""
    seed: int = 0
    """Seed of the bootstrap."""
    out: Path | None = None
    """JSON file of the outcome."""


def results_by_part(path: Path, config: CompareConfig) -> dict[str, dict]:
    """Return the one decoding of each part in an exp_dir; a ConfigError lists the choices when there are more."""
    found: dict[str, dict] = {}
    for result in find_results(path, config.part, config.decoding_method, config.suffix):
        if result["part"] in found:
            both = ", ".join(sorted({found[result["part"]]["suffix"], result["suffix"]}))
            raise ConfigError(f"{path} holds several decodings of {result['part']}; choose one with --suffix: {both}")
        found[result["part"]] = result
    if not found:
        raise DataError(f"{path} holds no results-*.json that meets the conditions; run decode.py first")
    return found


def compare_part(part: str, a: Sequence[dict], b: Sequence[dict], config: CompareConfig) -> dict:
    """Compare on one part, print the outcome and return it as plain data."""
    outcome = compare(a, b, [str(p) for p in (*config.a, *config.b)], config.bootstrap, config.seed)
    count, rate = len(a[0]["utterances"]["ids"]), RATE_NAMES[a[0]["unit"]]
    print(f"{part}: %{rate} on {count} utterances, {len(a)} and {len(b)} decodings, 95% intervals")
    print(f"  a      {outcome.a}  {', '.join(map(str, config.a))}")
    print(f"  b      {outcome.b}  {', '.join(map(str, config.b))}")
    relative = f" ({100 * outcome.difference.value / outcome.a.value:+.1f} % of a)" if outcome.a.value else ""
    print(f"  b - a  {outcome.difference}{relative}")
    print(f"  probability that b is better: {outcome.probability_of_improvement:.3f}")
    if outcome.difference.low <= 0 <= outcome.difference.high:
        print("  the interval of the difference holds zero: these utterances do not tell the systems apart")
    return {"part": part, "unit": a[0]["unit"], "num_utterances": count, **asdict(outcome)}


def main() -> None:
    """Compare on every part asked for."""
    config = parse_config(CompareConfig)
    if not config.a or not config.b:
        raise ConfigError("--a and --b need an exp_dir each")
    a, b = ([results_by_part(path, config) for path in paths] for paths in (config.a, config.b))
    parts = set.intersection(*(set(found) for found in (*a, *b)))
    if not parts:
        raise DataError("no part was decoded in all of these exp_dirs; decode the same part in each")
    outcomes = [compare_part(p, [f[p] for f in a], [f[p] for f in b], config) for p in sorted(parts)]
    if config.out is not None:
        options = {"a": config.a, "b": config.b, "bootstrap": config.bootstrap, "seed": config.seed}
        write_json(config.out, {**options, "comparisons": outcomes})


if __name__ == "__main__":
    run_main(main)
