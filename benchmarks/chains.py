"""What the drivers of beds with chains of systems share (real_nar.py, real_hkd.py, real_dualmode.py).

Result files, comparisons, and the order of what runs.

A bed has ``systems`` and ``seeds``; a driver's options have ``results``, ``beds``, ``systems``, ``seeds`` and ``jobs``.
A chain is one seed of a bed: its systems one after the other, since they share teacher, labels or data.
"""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from real_recordings import run_command, write_result

from icefall_kd.bootstrap import confidence_interval
from icefall_kd.errors import ConfigError
from icefall_kd.labels.store import LabelStore
from icefall_kd.results import compare as paired_bootstrap_of
from icefall_kd.results import find_results, search_name, stack_utterances
from icefall_kd.results_table import replace_block
from icefall_kd.runtime.env import environment
from icefall_kd.runtime.files import read_json, write_json, write_text
from icefall_kd.scoring import RATE_NAMES

SAMPLES = 10000
_GIT = threading.Lock()


def check_choices(config: Any, beds: dict[str, Any]) -> None:
    """Raise a ConfigError that names the first bed, system or seed that there is not."""
    for option, known in (
        ("beds", list(beds)),
        ("systems", list(dict.fromkeys(system for bed in beds.values() for system in bed.systems))),
        ("seeds", sorted({seed for bed in beds.values() for seed in bed.seeds})),
    ):
        for value in getattr(config, option):
            if value not in known:
                raise ConfigError(f"--{option} names {value!r}; there are {', '.join(map(str, known))}")


def result_file(config: Any, bed: str, system: str, seed: int) -> Path:
    """Return where the result of a training lies."""
    return config.results / f"{bed}_{system}_seed{seed}.json"


def collect(
    exp_dir: Path, bed: str, system: str, seed: int, name_of: Callable[[dict], str] = search_name
) -> dict:
    """Return everything that the result file of a training holds; ``name_of`` names a decoding."""
    run = read_json(exp_dir / "config.json")
    summary = read_json(exp_dir / "train_summary.json")
    lines = (exp_dir / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = {record["kind"]: record for record in map(json.loads, lines)}
    kept = ("loss", "acc", "epoch", "step")
    stores = [LabelStore(path) for path in run["config"]["label_dir"]]
    decodings = {name_of(result): result for result in find_results(exp_dir, part="dev")}
    names = ("finished", "epochs", "steps", "seconds", "audio_hours_per_hour", "peak_memory_gib")
    return {
        "bed": bed,
        "system": system,
        "seed": seed,
        "training": {name: summary[name] for name in (*names, "parameters", "device")},
        "options": run["config"],
        "last": {kind: {k: v for k, v in r.items() if k.endswith(kept)} for kind, r in last.items()},
        "labels": [{"kind": s.info.kind, "fingerprint": s.info.fingerprint, **s.storage_report()} for s in stores],
        "decodings": decodings,
        "environment": environment(),
    }


def keep(out: Path, result: dict, commit: bool) -> None:
    """Write a result file, and commit it to git where that is wanted."""
    write_result(out, result)
    if commit:
        with _GIT:
            run_command(["git", "add", out])
            what = f"Result: {result['bed']}, {result['system']}, seed {result['seed']}"
            run_command(["git", "commit", "-q", "-m", what, "--", out])


def finished(config: Any, bed: str, seeds: Sequence[int], system: str) -> dict[int, dict]:
    """Return the results of a system on a bed, by seed."""
    files = {seed: result_file(config, bed, system, seed) for seed in seeds}
    return {seed: read_json(file) for seed, file in files.items() if file.exists()}


def comparisons_file(config: Any, bed: str) -> Path:
    """Return where the comparisons of a bed lie."""
    return config.results / f"{bed}_comparisons.json"


def compare(config: Any, name: str, bed: Any, pairs: Sequence[tuple[tuple[str, str], tuple[str, str]]]) -> list[dict]:
    """Compare by the paired bootstrap, pooled over the seeds that both have, and write what comes out.

    Args:
        config: options of the driver.
        name: of the bed.
        bed: its systems and seeds.
        pairs: ((system, search), (system, search)); the second is hoped to be better.
    """
    results = {system: finished(config, name, bed.seeds, system) for system in bed.systems}
    found = []
    for a, b in pairs:
        seeds = sorted(set(results[a[0]]) & set(results[b[0]]))
        both = [[results[system][s]["decodings"].get(search) for s in seeds] for system, search in (a, b)]
        if not seeds or None in both[0] + both[1]:
            continue
        names = [f"{system}, seed {s}, {search}" for system, search in (a, b) for s in seeds]
        outcome = paired_bootstrap_of(*both, names, num_samples=SAMPLES)
        values = {"before": str(outcome.a), "after": str(outcome.b), "difference": str(outcome.difference)}
        values["relative"] = f"{100 * outcome.difference.value / outcome.a.value:+.1f} %" if outcome.a.value else "-"
        values["probability_of_improvement"] = outcome.probability_of_improvement
        found.append({"from": list(a), "to": list(b), "seeds": seeds, "samples": SAMPLES, **values})
    if found:
        write_json(comparisons_file(config, name), found)
    return found


def compared(config: Any, bed: str) -> dict[tuple[tuple[str, str], tuple[str, str]], dict]:
    """Return the comparisons of a bed by what is compared."""
    file = comparisons_file(config, bed)
    return {(tuple(c["from"]), tuple(c["to"])): c for c in (read_json(file) if file.exists() else [])}


def rate_text(found: Sequence[dict]) -> str:
    """Return the error rate of one decoding a seed, pooled, with its interval."""
    _, errors, ref_lens = stack_utterances(found, [str(i) for i in range(len(found))])
    rate = confidence_interval(errors.sum(axis=0), len(found) * ref_lens, SAMPLES)
    return f"{RATE_NAMES[found[0]['unit']]} {rate} %"


def is_there(out: Path, system: str) -> bool:
    """Return whether there is a result file, whatever the system."""
    return out.exists()


def run_missing(
    config: Any,
    beds: dict[str, Any],
    source_dir: Callable,
    recipe_line: Callable,
    chain: Callable,
    is_finished: Callable[[Path, str], bool] = is_there,
) -> None:
    """Prepare the data of every bed that lacks a result, then run its chains, some at a time.

    Args:
        config: options of the driver.
        beds: all beds by name.
        source_dir: (bed, config) to the folder of its corpus.
        recipe_line: (config, bed, corpus, option ...) to the recipe's command line.
        chain: (config, bed, seed, corpus): trains and decodes what is missing of a seed.
        is_finished: (result file, system) to whether nothing is missing of it.
    """
    chains = []
    for name in config.beds:
        bed = beds[name]
        wanted = [system for system in bed.systems if system in config.systems]
        seeds = [seed for seed in bed.seeds if seed in config.seeds]
        missing = [s for s in seeds if not all(is_finished(result_file(config, name, w, s), w) for w in wanted)]
        if missing:
            corpus = source_dir(name, config)
            run_command(recipe_line(config, name, corpus, "--stop-stage", 0))
            chains += [(name, seed, corpus) for seed in missing]
    with ThreadPoolExecutor(config.jobs) as pool:
        for done in [pool.submit(chain, config, *words) for words in chains]:
            done.result()


def publish(text: str, report: Path | None, name: str) -> None:
    """Print a table, and renew its block in a Markdown file."""
    print(text)
    if report is not None:
        before = report.read_text(encoding="utf-8") if report.exists() else ""
        write_text(report, replace_block(before, name, text))
