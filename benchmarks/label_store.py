#!/usr/bin/env python3
"""Measure the label store: opening, random reads, joining, and what the container costs beside the codes.

    python benchmarks/label_store.py --out benchmarks/results/label_store.json

Every step runs in a process of its own, whose peak memory is told with it (what was there before the step, mostly
torch and lhotse, is told too).  The files were written just before, so reads find them in the page cache.  Reads a
second are those of the fastest of fifty short passes; the time of the processor alone says what a busy machine hides.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from icefall_kd.runtime.env import measured_on
from icefall_kd.runtime.files import write_json

CODEBOOKS, PASSES = 8, 50


def utterances(count: int, seconds: float, seed: int = 0) -> Iterator[tuple[str, int]]:
    """Yield label keys as those of LibriSpeech, and samples: 0.5 to 1.5 times ``seconds`` at 16 kHz."""
    import numpy as np

    rng = np.random.default_rng(seed)
    lengths = rng.integers(round(8000 * seconds), round(24000 * seconds), count)
    for i, samples in enumerate(lengths.tolist()):
        chapter, line = divmod(i, 48)
        yield f"{19 + chapter // 2 * 7 % 8536}-{121 + chapter * 37}-{line:04d}|0|{samples}|1/1", samples


def make(folder: Path, count: int, seconds: float, num_shards: int) -> dict:
    """Write a set of random codes; ``seconds`` 0 stands for one frame an utterance, keys as of 12 s."""
    import numpy as np

    from icefall_kd.frames import SSL_CONV
    from icefall_kd.labels.info import LabelSetInfo
    from icefall_kd.labels.shard import key_hash
    from icefall_kd.labels.store import LabelStore, shard_of

    info = LabelSetInfo(
        kind="codebook_indexes", dtype="uint8", width=CODEBOOKS, dim=1280, teacher="random", teacher_sha256="none",
        layer=36, layer_convention="1-based", normalization="none", frame_formula=SSL_CONV.to_dict(),
        num_codebooks=CODEBOOKS, codebook_size=256, quantizer_sha256="none",
    )  # fmt: skip
    store = LabelStore.create(folder, info)
    writers = [store.writer(k, num_shards) for k in range(num_shards)]
    pool = np.random.default_rng(1).integers(0, 256, (1 << 20, CODEBOOKS), dtype=np.uint8)
    start = 0
    for key, samples in utterances(count, seconds or 12):
        samples = samples if seconds else 400
        frames = SSL_CONV.num_frames(samples)
        start = start + frames if start + 2 * frames <= len(pool) else 0
        writers[shard_of(key_hash(key), num_shards)].add(key, pool[start : start + frames], samples)
    began = time.perf_counter()
    for writer in writers:
        writer.finish()
    report = LabelStore(folder).storage_report()
    return {
        "write_seconds": time.perf_counter() - began,
        "code_bytes": report["value_bytes"],
        "container_bytes": report["container_bytes"],
        "container_bytes_per_utterance": report["container_bytes"] / count,
        "overhead_percent": 100 * report["overhead"],
    }


def opening(folder: Path) -> dict:
    """Time the opening of a set, and of it with the index of every shard."""
    from icefall_kd.labels.store import LabelStore

    began = time.perf_counter()
    store = LabelStore(folder)
    opened = time.perf_counter() - began
    for k in range(store.num_shards):
        store.shard(k).find(bytes(16))
    return {"open_seconds": opened, "open_and_index_seconds": time.perf_counter() - began, "utterances": len(store)}


def reading(folder: Path, reads: int) -> dict:
    """Time random reads of whole utterances in one process, all indexes being there."""
    import numpy as np

    from icefall_kd.labels.store import LabelStore

    store = LabelStore(folder)
    keys = list(store.keys())
    drawn = [keys[i] for i in np.random.default_rng(2).integers(0, len(keys), reads).tolist()]
    walls, processor, total = [], [], 0
    for _ in range(PASSES):
        wall, cpu = time.perf_counter(), time.process_time()
        for key in drawn:
            total += store.get(key).nbytes
        walls.append(time.perf_counter() - wall)
        processor.append(time.process_time() - cpu)
    return {
        "reads_a_pass": reads,
        "reads_per_second": reads / min(walls),
        "median_reads_per_second": reads / sorted(walls)[PASSES // 2],
        "reads_per_processor_second": reads * PASSES / sum(processor),
        "mebibytes_per_second": total / PASSES / min(walls) / 2**20,
    }


def joining(folder: Path, count: int) -> dict:
    """Time the join of as many keys as the set has."""
    from icefall_kd.labels.store import LabelStore

    wall, cpu = time.perf_counter(), time.process_time()
    report = LabelStore(folder).join(key for key, _ in utterances(count, 12))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert (report.matched, report.missing, report.extra) == (count, 0, 0), report
    return {"keys": count, "seconds": wall, "processor_seconds": cpu}


def naming(folder: Path, count: int) -> dict:
    """Time the label keys of cuts, which a join asks for first: speed copies, stamped, as prepare makes them."""
    from lhotse import MonoCut, Recording

    from icefall_kd.labels.keys import label_key, speed_copy

    cuts = []
    for i, (key, samples) in enumerate(utterances(count, 12)):
        recording = Recording(key.split("|")[0], [], 16000, samples, samples / 16000, channel_ids=[0])
        cut = MonoCut(str(i), 0.0, recording.duration, 0, recording=recording)
        cuts.append(speed_copy(cut, ("1", "0.9", "1.1")[i % 3]))
    wall, cpu = time.perf_counter(), time.process_time()
    for cut in cuts:
        label_key(cut)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"cuts": count, "seconds_a_million": 1e6 * wall / count, "processor_seconds_a_million": 1e6 * cpu / count}


STEPS = {"name": naming, "make": make, "open": opening, "read": reading, "join": joining}


def step(name: str, arguments: list) -> None:
    """Run one step in this process and print its figures as JSON."""
    import icefall_kd.labels.store  # noqa: F401  so that its import is in "before" and in no time

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = STEPS[name](Path(arguments[0]), *arguments[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found |= {"peak_gib": peak / 2**20, "peak_gib_before": before / 2**20}  # Linux tells KiB
    print(json.dumps(found))


def measure(name: str, *arguments: object) -> dict:
    """Run one step in a new process; this one stays small, since a child's peak begins with its parent's."""
    command = [sys.executable, __file__, "--step", json.dumps([name, *arguments], default=str)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(name, *arguments[1:], json.dumps(found), file=sys.stderr)
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=100_000, help="of the typical set (default: 100000)")
    parser.add_argument("--seconds", type=float, default=12.0, help="mean duration (default: 12)")
    parser.add_argument("--reads", type=int, default=4000, help="random reads a pass (default: 4000)")
    parser.add_argument("--keys", type=int, default=1_000_000, help="keys to join (default: 1000000)")
    parser.add_argument("--num-shards", type=int, default=8, help="shards of the sets (default: 8)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        name, *arguments = json.loads(args.step)
        step(name, arguments)
        return
    with tempfile.TemporaryDirectory(prefix="label_store_") as root:
        typical, large = Path(root) / "typical", Path(root) / "large"
        found = {
            **measured_on(),
            "typical_set": {"utterances": args.utterances, "mean_seconds": args.seconds, "codebooks": CODEBOOKS}
            | measure("make", typical, args.utterances, args.seconds, args.num_shards),
            "open": measure("open", typical),
            "read": measure("read", typical, args.reads),
        }
        found["overhead_percent"] = {
            f"{count} utterances of {seconds:g} s in {shards} shards": measure(
                "make", Path(root) / f"short{i}", count, seconds, shards
            )["overhead_percent"]
            for i, (count, seconds, shards) in enumerate([(200, 12.5, 1), (20_000, 5.0, 2), (20_000, 2.0, 2)])
        }
        measure("make", large, args.keys, 0, args.num_shards)
        found["keys_of_cuts"] = measure("name", root, 20_000)
        found["join"] = measure("join", large, args.keys)
    print(json.dumps(found, indent=2))
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    main()
