#!/usr/bin/env python3
"""A dry run of training at scale, without audio: how fast cuts are drawn, and whether memory stays flat.

    python benchmarks/scale.py --cuts 1000000 --check --out benchmarks/results/scale/one_million.json
    python benchmarks/scale.py --cuts 10000000 --num-shards 10000 --check --folder /a/disk/with/5/GB

It writes the cuts of a Shar (no features, no audio: 1 GB for ten million) and a label set of one frame an utterance,
and then, each in a process of its own,

* draws all batches of an epoch from the streams of one rank, as a training does, tokens counted and filters applied;
* joins the label keys of all cuts with the label set;
* draws batches as lhotse's DynamicBucketingSampler does, of some cuts, with its own buffer and with that of a stream;
* reads cuts alone.

Memory is that of the process, noted at every tenth of the cuts.  With --check the exit code is 3 when it grows by more
than --max-growth MiB from the second tenth to the end, or when an utterance is not drawn exactly once.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from icefall_kd.errors import NumericError, run_main
from icefall_kd.runtime.env import measured_on
from icefall_kd.runtime.files import sha256_file, write_json

WORDS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ' "
LABEL_SHARDS = 128


def utterance(i: int) -> tuple[str, int]:
    """Return recording id and samples (2 to 22 s at 16 kHz) of utterance ``i``."""
    return f"rec{i:08d}", 32_000 + i * 7919 % 320_000


def label_key(i: int) -> str:
    """Return its label key."""
    recording, samples = utterance(i)
    return f"{recording}|0|{samples}|1/1"


def cut_line(i: int) -> str:
    """Return a line of a Shar's cuts, with all that an export with features and codes writes."""
    recording, samples = utterance(i)
    seconds = samples / 16_000
    span = {"recording_id": recording, "start": 0, "num_samples": samples, "speed": "1/1", "native_rate": 16000}
    of = {"recording_id": recording, "start": 0, "num_samples": samples, "sampling_rate": 16000, "speed": "1/1"}
    text = (WORDS[i % 20 :] + WORDS)[: max(1, round(2 * seconds))].strip() or "A"
    placeholder = {"storage_type": "shar", "storage_path": "", "storage_key": ""}
    features = {"type": "fbank", "num_frames": round(100 * seconds), "num_features": 80, "frame_shift": 0.01,
                "sampling_rate": 16000, "start": 0, "duration": seconds, "recording_id": recording, "channels": 0,
                **placeholder}  # fmt: skip
    cut = {
        "id": f"{recording}-0", "start": 0, "duration": seconds, "channel": 0,
        "supervisions": [{"id": f"{recording}-0", "recording_id": recording, "start": 0.0, "duration": seconds,
                          "channel": 0, "text": text, "language": "en", "speaker": f"s{i % 5000}"}],
        "features": features,
        "recording": {"id": recording, "sources": [{"type": "shar", "channels": [0], "source": ""}],
                      "sampling_rate": 16000, "num_samples": samples, "duration": seconds, "channel_ids": [0]},
        "custom": {"codebook_indexes": {"shape": [round(50 * seconds) - 1, 16], **placeholder},
                   "label_samples": {"codebook_indexes": samples}, "source": {**span, "of": of}},
        "type": "MonoCut",
    }  # fmt: skip
    return json.dumps(cut)


def write_shar(folder: Path, count: int, num_shards: int) -> dict:
    """Write the cuts of a Shar, every ``num_shards``-th utterance to one shard."""
    from icefall_kd.data.manifests import write_jsonl
    from icefall_kd.data.shar import INFO_NAME, ROWS_NAME, ShardRow, SharInfo

    began = time.perf_counter()
    made_up = {"codec": "lilcom", "pieces": None, "inputs": f"{count} made up"}
    info = SharInfo(num_shards=num_shards, data=[], labels={}, **made_up)
    (folder / "shards").mkdir(parents=True)
    write_json(folder / INFO_NAME, asdict(info))
    rows, size = [], 0
    for k in range(num_shards):
        file = folder / "shards" / f"cuts.{k:06d}.jsonl.gz"
        numbers = range(k, count, num_shards)
        file.write_bytes(gzip.compress("".join(cut_line(i) + "\n" for i in numbers).encode(), compresslevel=1, mtime=0))
        size += file.stat().st_size
        files = {"cuts": {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256_file(file)}}
        seconds = [utterance(i)[1] / 16_000 for i in numbers]
        rows.append(ShardRow(shard=k, of=info.fingerprint, cuts=len(numbers), seconds=sum(seconds), files=files,
                             longest=max(seconds), most_text=round(2 * max(seconds)), labelled={}))  # fmt: skip
    write_jsonl(folder / ROWS_NAME, (asdict(row) for row in rows))
    hours = sum(row.seconds for row in rows) / 3600
    return {"seconds": time.perf_counter() - began, "bytes": size, "hours": hours}


def write_labels(folder: Path, count: int) -> dict:
    """Write a label set of one frame an utterance, in which a key takes what it takes in any set."""
    import numpy as np

    from icefall_kd.frames import SSL_CONV
    from icefall_kd.labels.info import LabelSetInfo
    from icefall_kd.labels.shard import hash_words
    from icefall_kd.labels.store import LabelStore

    began = time.perf_counter()
    info = LabelSetInfo(
        kind="codebook_indexes", dtype="uint8", width=1, dim=8, teacher="none", teacher_sha256="none", layer=1,
        layer_convention="1-based", normalization="none", frame_formula=SSL_CONV.to_dict(), num_codebooks=1,
        codebook_size=256, quantizer_sha256="none",
    )  # fmt: skip
    store = LabelStore.create(folder / "set", info)
    numbers = [open(folder / f"{k}.numbers", "w+b") for k in range(LABEL_SHARDS)]
    for begin in range(0, count, 1 << 16):
        some = np.arange(begin, min(begin + (1 << 16), count))
        owners = hash_words(map(label_key, some.tolist()))[:, 1] % np.uint64(LABEL_SHARDS)
        for k in np.unique(owners).tolist():
            numbers[k].write(some[owners == k].tobytes())
    row = np.zeros((1, 1), np.uint8)
    for k, stream in enumerate(numbers):
        stream.seek(0)
        writer = store.writer(k, LABEL_SHARDS)
        for i in np.frombuffer(stream.read(), np.int64).tolist():
            writer.add(label_key(i), row, 400)
        writer.finish()
        stream.close()
    return {"seconds": time.perf_counter() - began}


class Memory:
    """Notes the size of this process at every tenth of ``total``."""

    def __init__(self, total: int) -> None:
        self.total, self.mebibytes, self.began, self.processor = total, [], time.perf_counter(), time.process_time()

    def note(self, done: int) -> None:
        """Look whether another tenth is done."""
        while done * 10 >= (len(self.mebibytes) + 1) * self.total:
            lines = Path("/proc/self/status").read_text().splitlines()
            self.mebibytes.append(round(next(int(line.split()[1]) for line in lines if "VmRSS" in line) / 1024, 1))

    def figures(self, done: int) -> dict:
        """Return rates and sizes."""
        wall, processor = time.perf_counter() - self.began, time.process_time() - self.processor
        return {
            "cuts": done,
            "seconds": wall,
            "cuts_per_second": done / wall,
            "cuts_per_processor_second": done / processor,
            "mebibytes_by_tenth": self.mebibytes,
        }


def _plan(folder: Path, streams: int, buffer_size: int):
    from icefall_kd.config import DataConfig
    from icefall_kd.data.datamodule import Buckets, DurationAndTokens
    from icefall_kd.data.filters import Fitness, counted
    from icefall_kd.data.shar import Shar
    from icefall_kd.data.stream import Plan
    from icefall_kd.text.tokenizer import Tokenizer

    shar, config = Shar(folder), DataConfig()
    fitness = Fitness(tokenizer=Tokenizer.train_char([WORDS]), max_duration=30.0)
    some = [counted(cut, fitness.judge(cut)[1]) for cut in islice(shar.read(0, ()), 10_000)]
    buckets = Buckets(some, config.num_buckets)
    limits = DurationAndTokens(max_duration=config.max_duration, buckets=buckets)
    return Plan(
        shar=shar, fields=(), fitness=fitness, bins=list(buckets.bins), limits=limits, num_streams=streams,
        buffer_size=buffer_size, drop_last=False, seed=1, rank=0, world_size=1,
    )  # fmt: skip


def streaming(folder: Path, count: int, streams: int, buffer_size: int) -> dict:
    """Draw all batches of an epoch, from streams in turn; then resume each of them once from where it was at half."""
    from icefall_kd.data.stream import Stream, StreamState

    plan, memory = _plan(folder, streams, buffer_size), Memory(count)
    alive = {k: Stream(plan, 1, k, StreamState()) for k in range(streams)}
    drawn = batches = held = 0
    seen = bytearray(b"\0" * count)  # touched now, not as it is filled
    states: dict[int, StreamState] = {}
    while alive:
        for k in list(alive):
            cuts = alive[k].next_batch()
            if cuts is None:
                del alive[k]
                continue
            batches, drawn = batches + 1, drawn + len(cuts)
            for cut in cuts:
                seen[int(cut.recording.id[3:])] += 1
            memory.note(drawn)
            if 2 * drawn >= count and k not in states:
                states[k] = alive[k].state
                held = max(held, len(states[k].held))
    figures = memory.figures(drawn)
    begin, shards = time.perf_counter(), []
    for k, state in states.items():
        Stream(plan, 1, k, state).next_batch()
        shards.append(len({int(shard) for shard, _ in state.held.tolist()}))
    return {
        **figures,
        "batches": batches,
        "each_once": seen.count(1) == count,
        "resume_seconds_a_stream": (time.perf_counter() - begin) / len(states),
        "resume_shards_a_stream": max(shards),
        "resume_cuts_held": held,
    }


def joining(folder: Path, count: int) -> dict:
    """Join the keys of all utterances with the label set."""
    from icefall_kd.labels.store import LabelStore

    memory = Memory(count)

    def keys() -> Iterator[str]:
        for i in range(count):
            if i % 1000 == 0:
                memory.note(i)
            yield label_key(i)

    report = LabelStore(folder / "set").join(keys())
    memory.note(count)
    if (report.matched, report.missing, report.extra) != (count, 0, 0):
        raise NumericError(f"the join found {report} of {count}")
    return memory.figures(count)


def lhotse_sampler(folder: Path, count: int, buffer_size: int) -> dict:
    """Draw batches of the first cuts as lhotse's sampler does."""
    from lhotse import CutSet
    from lhotse.dataset.sampling import DynamicBucketingSampler

    plan = _plan(folder, 1, buffer_size)
    cuts = CutSet.from_shar(fields={"cuts": sorted((folder / "shards").glob("cuts.*"))})
    sampler = DynamicBucketingSampler(
        cuts, max_duration=plan.limits.max_duration, duration_bins=plan.bins, shuffle=True, buffer_size=buffer_size,
        rank=0, world_size=1,
    )  # fmt: skip
    drawn, memory = 0, Memory(count)
    for batch in sampler:
        drawn += len(batch)
        memory.note(min(drawn, count))
        if drawn >= count:
            break
    return memory.figures(drawn)


def reading(folder: Path, count: int) -> dict:
    """Read the first cuts of the Shar."""
    plan, memory, done = _plan(folder, 1, 1), Memory(count), 0
    while done < count:
        for k in range(len(plan.shar.rows)):
            done += sum(1 for _ in islice(plan.shar.read(k, ()), count - done))
            memory.note(done)
            if done >= count:
                break
    return memory.figures(done)


STEPS = {
    "write_shar": write_shar,
    "write_labels": write_labels,
    "stream": streaming,
    "join": joining,
    "lhotse": lhotse_sampler,
    "read": reading,
}


def measure(name: str, folder: Path, *arguments: int) -> dict:
    """Run a step in a new process."""
    command = [sys.executable, __file__, "--step", json.dumps([name, str(folder), *arguments])]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(name, *arguments, json.dumps(found), file=sys.stderr)
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}


def check(found: dict, max_growth: float) -> None:
    """Raise a NumericError when memory grew, or an utterance was not drawn exactly once."""
    for name in ("stream", "join"):
        sizes = found[name]["mebibytes_by_tenth"]
        if max(sizes[1:]) - sizes[1] > max_growth:
            raise NumericError(
                f"{name}: memory grew from {sizes[1]} MiB at two tenths to {max(sizes[1:])} MiB, by more than "
                f"{max_growth} MiB: {sizes}"
            )
    if not found["stream"]["each_once"]:
        raise NumericError(f"{found['stream']['cuts']} cuts were drawn, not each of {found['cuts']} once")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=1_000_000, help="(default: 1000000)")
    parser.add_argument("--num-shards", type=int, default=1000, help="of the Shar (default: 1000)")
    parser.add_argument("--streams", type=int, default=4, help="(default: 4)")
    parser.add_argument("--buffer", type=int, default=2000, help="cuts that a stream holds (default: 2000)")
    parser.add_argument("--sampled", type=int, default=50_000, help="cuts for lhotse's sampler (default: 50000)")
    parser.add_argument("--check", action="store_true", help="exit 3 when memory grows")
    parser.add_argument("--max-growth", type=float, default=48, help="MiB that --check allows (default: 48)")
    parser.add_argument("--folder", type=Path, help="where it writes and removes (default: the temporary folder)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        name, folder, *arguments = json.loads(args.step)
        print(json.dumps(STEPS[name](Path(folder), *arguments)))
        return
    with tempfile.TemporaryDirectory(prefix="scale_", dir=args.folder) as root:
        shar, labels = Path(root) / "shar", Path(root) / "labels"
        labels.mkdir()
        some = min(args.sampled, args.cuts)
        found = {
            **measured_on(),
            "cuts": args.cuts,
            "shards": args.num_shards,
            "write_shar": measure("write_shar", shar, args.cuts, args.num_shards),
            "stream": measure("stream", shar, args.cuts, args.streams, args.buffer),
            "lhotse_sampler_of_20000": measure("lhotse", shar, some, 20_000),
            "lhotse_sampler_of_buffer": measure("lhotse", shar, some, args.buffer),
            "read": measure("read", shar, some),
            "write_labels": measure("write_labels", labels, args.cuts),
            "join": measure("join", labels, args.cuts),
        }
    print(json.dumps(found, indent=2))
    if args.out:
        write_json(args.out, found)
    if args.check:
        check(found, args.max_growth)


if __name__ == "__main__":
    run_main(main)
