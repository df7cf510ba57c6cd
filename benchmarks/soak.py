#!/usr/bin/env python3
"""A night on a cluster in minutes: run_mvq.sh on the demo corpus while processes are killed and files cut off.

    python benchmarks/soak.py --minutes 5 --seed 1 --out benchmarks/results/soak.json

The recipe runs twice, each time in a copy of the repository: undisturbed, then in trouble.  Trouble is

* SIGKILL for a random process of the run, again and again; where it was the shell of the recipe, one half of the times
  the rest is killed too, as a scheduler does, and one half of the times it lives on beside the next attempt;
* a random finished artifact loses its end, while the run goes on or between two attempts;
* the disk is full, once while there is something to write: a small file system is filled or, where none can be mounted,
  files are limited in size.

After every end the same line is started again; behind one that was complete the experiments begin anew, or trouble
would meet finished stages alone.  Where an attempt that was left alone ends with a message that names a file which was
cut off, that file is deleted, as the message says.  When the minutes are over the line runs to its end, and everything
that it made must equal the undisturbed run: corpus, features, quantizer, labels, weights and losses, hypotheses.

What is to happen (which process, which artifact, when) is drawn from the seed; what it meets depends on how fast the
machine is.  Where a slow one had less than three kills, a file cut off and the full disk in these minutes, they last
until it had.  The teacher has random weights and the student 16 channels, so that nearly all time is the recipe's.
Not cut off are logs, and checkpoints behind which there are newer ones: nothing but the training from its beginning
makes them again (decode.py names them).
"""

import argparse
import contextlib
import gzip
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from icefall_kd.runtime.env import measured_on
from icefall_kd.runtime.files import TMP_PREFIX, write_json

REPO = Path(__file__).resolve().parents[1]
# Speakers and utterances of the corpus.
CORPUS = "--train-speakers 4 --train-utts 6 --dev-speakers 2 --dev-utts 3 --test-speakers 2 --test-utts 3"
STUDENT = """
encoder-size: tiny
num-encoder-layers: 2
encoder-dim: 16
num-heads: 2
feedforward-dim: 16
cnn-kernel: 3
decoder-dim: 8
joiner-dim: 8
max-duration: 6
num-workers: 1
log-interval: 1
save-every-n: 4
average-period: 1
device: cpu
num-threads: 1
"""
# Times between two events, as shares of the seconds that the undisturbed run takes, or of the minutes if they are less.
GAP = (0.03, 0.22)
MIN_KILLS = 3
KILLS = 0.75  # share of the events; the others cut a file off
DISK_BYTES = 200_000_000


def make_teacher(folder: Path) -> None:
    """Write a Whisper with random weights: its neighbouring frames are alike, as the teacher check wants them."""
    import torch
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(0)
    config = WhisperConfig(
        encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=1, encoder_ffn_dim=48,
        decoder_ffn_dim=16, d_model=32, num_mel_bins=80, vocab_size=8, max_target_positions=8, pad_token_id=0,
        bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperModel(config).eval().save_pretrained(folder)


def copy_repository(target: Path) -> None:
    """Copy what the recipe needs, with a smaller demo corpus."""
    for name in ("local", "icefall_kd", "egs/librispeech"):
        ignored = shutil.ignore_patterns("__pycache__", "data", "exp", "download") if name.startswith("egs") else None
        shutil.copytree(REPO / name, target / name, ignore=ignored or shutil.ignore_patterns("__pycache__"))
    script = target / "local/prepare.sh"
    text, count = re.subn(r'^demo_options="" ', f'demo_options="{CORPUS}" ', script.read_text(), flags=re.MULTILINE)
    if count != 1:
        raise SystemExit('local/prepare.sh has no line demo_options="" any more; correct benchmarks/soak.py')
    script.write_text(text)


class Line:
    """The recipe in one copy of the repository."""

    def __init__(self, root: Path, work: Path) -> None:
        self.root, self.folder, self.log = root, root / "egs/librispeech", work / f"{root.name}.log"
        options = {
            "corpus": "demo", "short": "true", "teacher": work / "models/teacher", "config": work / "student.yaml",
            "systems": "mvq", "num-codebooks": 2, "num-shards": 3, "nj": 2, "decoding-methods": "greedy_search",
            "decode-args": "--avg 2 --device cpu --num-threads 1 --bootstrap 20",
        }  # fmt: skip
        self.command = ["bash", str(self.folder / "run_mvq.sh")]
        for name, value in options.items():
            self.command += [f"--{name}", str(value)]
        bin_dir = Path(sys.executable).parent
        self.env = {
            **os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "VIRTUAL_ENV": str(bin_dir.parent),
            "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TMPDIR": str(work),
        }  # fmt: skip
        self.env.pop("PYTHONPATH", None)

    def start(self) -> subprocess.Popen:
        """Start the line in a session of its own; its output is added to the log."""
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                self.command, cwd=self.root, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def artifacts(self, with_checkpoints: bool) -> list[Path]:
        """Return the finished files that trouble may cut off, in order."""
        found, checkpoints = [], []
        for path in sorted(p for top in ("download", "data", "exp") for p in (self.folder / top).rglob("*")):
            inside = path.relative_to(self.folder).parts
            hidden = any(part.startswith((".", TMP_PREFIX)) for part in inside)
            if hidden or {"log", "tensorboard"} & set(inside) or path.name in ("config.json", "results.md"):
                continue
            with contextlib.suppress(OSError):  # it may go at any moment
                if not path.is_file() or path.stat().st_size == 0:
                    continue
                if path.suffix != ".pt":
                    found.append(path)
                elif not path.name.startswith("best-"):
                    checkpoints.append((path.stat().st_mtime_ns, path))
        if with_checkpoints and len(checkpoints) > 1:
            found.append(max(checkpoints)[1])
        return found


def sessions_processes(sessions: set[int]) -> list[tuple[int, str]]:
    """Return number and program of every live process of these sessions, the oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, *rest = (entry / "stat").read_text().rpartition(")")[2].split()
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(rest[2]) in sessions and state not in "ZX":
            scripts = [w for w in words if w.endswith((b".py", b".sh"))]
            name = Path(os.fsdecode((scripts or words)[0])).name or "a shell's child"
            found.append((int(entry.name), name))
    return sorted(found)


class Disk:
    """The file system of the run in trouble: a mounted one, or the one that there is, with limits on files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
        try:
            self.mounted = subprocess.run(mount, capture_output=True).returncode == 0
        except OSError:
            self.mounted = False

    @property
    def kind(self) -> str:
        return "full file system" if self.mounted else "limit on the size of files"

    def fill(self, processes: list[tuple[int, str]]) -> None:
        """Take all room that there is, or let no file of these processes become longer than 2000 bytes."""
        if self.mounted:
            room = os.statvfs(self.folder)
            with open(self.folder / "ballast", "wb") as stream, contextlib.suppress(OSError):
                os.posix_fallocate(stream.fileno(), 0, room.f_bavail * room.f_frsize)
        else:
            for pid, _ in processes:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (2000, 2000))

    def empty(self) -> None:
        """Give the room back; the limits end with their processes."""
        (self.folder / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@dataclass
class Damage:
    """One file that was cut off."""

    path: Path
    size: int
    """What was left, in bytes."""
    where: int
    """Length of the log when it happened."""
    named: bool = False
    """Whether the log names the file behind that place."""


@dataclass
class Night:
    """What happened to the run in trouble."""

    line: Line
    disk: Disk
    rng: random.Random
    seconds: float
    """Of the undisturbed run."""
    attempts: int = 0
    completed: int = 0
    """Attempts that ended well while trouble went on."""
    kills: Counter = field(default_factory=Counter)
    """By program."""
    damages: list[Damage] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    """Files that were deleted since a message said so."""
    disk_end: dict = field(default_factory=dict)
    unexplained: list[str] = field(default_factory=list)
    """Ends of attempts that nothing had happened to."""
    sessions: set[int] = field(default_factory=set)

    def run(self, minutes: float) -> bool:
        """Make trouble for so many minutes, then let the line end; return whether it did."""
        self.pace, self.deadline = min(self.seconds, 60 * minutes), time.monotonic() + 60 * minutes
        self.disk_at = time.monotonic() + 60 * minutes * self.rng.uniform(0.3, 0.6)
        quiet = 0  # attempts without any trouble
        while quiet < 8:
            calm = self.is_over()
            if calm:
                self.wait_for_orphans(self.seconds)
            if not calm and self.rng.random() < 0.3:
                self.cut_off(with_checkpoints=True)
            code = self.attempt()
            if code == 0 and calm:
                return True
            quiet += calm
            self.completed += code == 0
            if code == 0:
                self.wait_for_orphans(self.seconds)
                shutil.rmtree(self.line.folder / "exp", ignore_errors=True)
                self.damages = [damage for damage in self.damages if damage.named or damage.path.exists()]
        return False

    def is_over(self) -> bool:
        """Return whether the minutes are over and there was trouble of each kind."""
        had = sum(self.kills.values()) >= MIN_KILLS and self.damages and self.disk_end
        return time.monotonic() > self.deadline and bool(had)

    def attempt(self) -> int:
        """Start the line, make trouble until it ends or the minutes do, and return its exit code."""
        before = self.log_length()
        events, self.attempts = 0, self.attempts + 1
        orphans = bool(sessions_processes(self.sessions))
        process = self.line.start()
        self.sessions.add(process.pid)
        due = time.monotonic() + self.gap()
        while process.poll() is None:
            time.sleep(0.05)
            now = time.monotonic()
            if self.is_over():
                continue
            if not self.disk_end and now > self.disk_at:
                self.fill_disk(process)
                events += 1
            elif now > due:
                events += self.kill(process) if self.rng.random() < KILLS else self.cut_off(with_checkpoints=False)
                due = now + self.gap()
        self.look_up_names()
        said = self.said(before)
        if process.returncode != 0 and not events and not orphans and not self.do_as_told(said):
            self.unexplained.append(f"exit code {process.returncode}: {said[-1500:]}")
        return process.returncode

    def wait_for_orphans(self, seconds: float) -> list[tuple[int, str]]:
        """Wait until no process of any attempt lives; return those that do after so many seconds."""
        patience = time.monotonic() + max(30.0, seconds)
        while (alive := sessions_processes(self.sessions)) and time.monotonic() < patience:
            time.sleep(0.2)
        return alive

    def gap(self) -> float:
        return self.pace * self.rng.uniform(*GAP)

    def log_length(self) -> int:
        return self.line.log.stat().st_size if self.line.log.exists() else 0

    def said(self, since: int) -> str:
        with open(self.line.log, "rb") as log:
            log.seek(since)
            return log.read().decode(errors="replace")

    def kill(self, shell: subprocess.Popen) -> int:
        """Kill one process of the run, or of what outlived an earlier attempt; return how many events that were."""
        found = sessions_processes(self.sessions)
        if not found:
            return 0
        pid, name = self.rng.choice(found)
        as_scheduler = self.rng.random() < 0.5
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.kills[name] += 1
        if pid == shell.pid and as_scheduler:
            for other, _ in sessions_processes({shell.pid}):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
        return 1

    def cut_off(self, with_checkpoints: bool) -> int:
        """Truncate a finished artifact; return how many events that were."""
        if with_checkpoints and sessions_processes(self.sessions):
            with_checkpoints = False
        found = self.line.artifacts(with_checkpoints)
        if not found:
            return 0
        # Kinds of files first, or most of them would be recordings.
        kinds: dict[str, list[Path]] = {}
        for path in found:
            kinds.setdefault(path.suffix if path.suffix == ".flac" else f"{path.parent}{path.suffix}", []).append(path)
        path = self.rng.choice(kinds[self.rng.choice(sorted(kinds))])
        share = self.rng.choice([0.0, 0.5, 0.9])
        with contextlib.suppress(OSError):
            size = int(share * path.stat().st_size)
            os.truncate(path, size)
            self.damages.append(Damage(path, size, self.log_length()))
        return 1

    def fill_disk(self, process: subprocess.Popen) -> None:
        """Fill the disk until the attempt has ended."""
        since = self.log_length()
        self.disk.fill(sessions_processes(self.sessions))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(4 * self.seconds)
        self.disk.empty()
        said = self.said(since)
        if process.returncode == 0:  # it had nothing to write
            self.disk_at = time.monotonic() + self.gap()
            return
        words = re.findall(r"No space left on device|File too large|make room|Make room", said)
        self.disk_end = {"kind": self.disk.kind, "exit_code": process.returncode, "named": bool(words)}

    def look_up_names(self) -> None:
        for damage in self.damages:
            if not damage.named:
                damage.named = damage.path.name in self.said(damage.where)

    def do_as_told(self, said: str) -> bool:
        """Delete what the last lines name as damaged and was cut off; return whether there was something."""
        last, named = "\n".join(said.splitlines()[-30:]), set()
        for damage in self.damages:
            with contextlib.suppress(OSError):
                if damage.path.name in last and damage.path.stat().st_size == damage.size:  # not made again meanwhile
                    named.add(damage.path)
        for path in sorted(named):
            path.unlink()
            self.deleted.append(str(path.relative_to(self.line.folder)))
        return bool(named)


def outcome(line: Line) -> dict[str, dict[str, object]]:
    """Return what the line made, by kind and name, as values that compare."""
    import torch

    from icefall_kd.train.checkpoint import load_checkpoint, state_sha256
    from icefall_kd.train.metrics import read_metrics

    def content(path: Path) -> bytes:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        return data.replace(str(line.root).encode(), b"ROOT")  # stored features are named with their folder

    def files(*patterns: str) -> dict[str, object]:
        paths = sorted(p for pattern in patterns for p in line.folder.glob(pattern) if p.is_file())
        return {p.relative_to(line.folder).as_posix(): content(p) for p in paths}

    exp = next((line.folder / "exp").glob("*/mvq-seed42"), None)
    weights: dict[str, object] = {}
    losses: dict[str, object] = {}
    if exp is not None:
        torch.set_num_threads(1)
        for path in sorted(exp.glob("epoch-*.pt")):
            saved = load_checkpoint(path)
            weights[path.name] = [state_sha256(saved[part]) for part in ("model", "model_avg")]
        losses = {f"{r['kind']} {r['step']}": r["loss"] for r in read_metrics(exp / "log/metrics.jsonl")}
    return {
        "corpus": files("download/*/LibriSpeech/**/*"),
        "features": files("data/*/fbank/*"),
        "quantizer": files("exp/*/quantizer-*/*.safetensors"),
        "labels": files("exp/*/labels/*/shard-*"),
        "weights": weights,
        "losses": losses,
        "hypotheses": files("exp/*/mvq-seed42/greedy_search/recogs-*"),
    }


def leftovers(folder: Path) -> list[str]:
    """Return what has a temporary name."""
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.name.startswith((TMP_PREFIX, ".split-"))]


@contextlib.contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=False)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="soak-") as made:
        yield Path(made).resolve()


def soak(work: Path, minutes: float, seed: int) -> dict:
    """Run both; return the figures."""
    make_teacher(work / "models/teacher")
    (work / "student.yaml").write_text(STUDENT)
    calm = Line(work / "calm", work)
    copy_repository(calm.root)
    begin = time.monotonic()
    code = calm.start().wait()
    seconds = time.monotonic() - begin
    if code != 0:
        raise SystemExit(f"the undisturbed run ended with exit code {code}:\n{calm.log.read_text()[-3000:]}")
    expected = outcome(calm)
    disk = Disk(work / "disk")
    try:
        troubled = Line(disk.folder / "troubled", work)
        copy_repository(troubled.root)
        night, begin = Night(troubled, disk, random.Random(seed), seconds), time.monotonic()
        ended = night.run(minutes)
        found = outcome(troubled) if ended else {kind: {} for kind in expected}
        alive = night.wait_for_orphans(seconds)
        for pid, _ in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        result = {
            "minutes": minutes,
            "seed": seed,
            "undisturbed_seconds": round(seconds, 1),
            "troubled_seconds": round(time.monotonic() - begin, 1),
            "ended": ended,
            "attempts": night.attempts,
            "completed_in_trouble": night.completed,
            "kills": sum(night.kills.values()),
            "killed": dict(sorted(night.kills.items())),
            "artifacts_damaged": len(night.damages),
            "artifacts_named": sum(d.named for d in night.damages),
            "damaged": sorted(d.path.relative_to(troubled.folder).as_posix() for d in night.damages),
            "deleted_as_told": sorted(night.deleted),
            "disk": night.disk_end,
            "unexplained": night.unexplained,
            "equal": {
                kind: {"compared": len(values), "equal": bool(values) and found[kind] == values}
                for kind, values in expected.items()
            },
            "leftovers": leftovers(troubled.folder),
            "processes_left": [name for _, name in alive],
        }
        if not ended:
            result["log"] = troubled.log.read_text(errors="replace")[-4000:]
        return result
    finally:
        disk.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="of trouble (default: 5)")
    parser.add_argument("--seed", type=int, default=1, help="of what is to happen (default: 1)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--work-dir", type=Path, help="new folder, which is kept (default: a temporary one)")
    args = parser.parse_args()
    with work_folder(args.work_dir) as work:
        result = {**measured_on(), **soak(work, args.minutes, args.seed)}
    for name in ("kills", "artifacts_damaged", "artifacts_named", "disk", "equal", "unexplained", "leftovers"):
        print(f"{name}: {result[name]}")
    if args.out is not None:
        write_json(args.out, result)
    sound = all(kind["equal"] for kind in result["equal"].values())
    sys.exit(0 if sound and not result["unexplained"] and not result["processes_left"] else 1)


if __name__ == "__main__":
    main()
