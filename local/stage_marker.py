"""Decide whether a stage of a shell script must run, and mark it done.  Used by local/stages.sh alone.

A marker is a JSON file with what the stage depended on: options, inputs (files by content, see ``describe_folder``
for folders), source code (by content), and the outputs it declared, with their sizes.  An output that is shorter than
when the stage ended was cut off (a disk, a copy, a crash): the stage makes it again.  Standard library only: it starts
in a few hundredths of a second.

    stage_marker.py check MARKER [--force] [--option NAME=VALUE ...] [--input PATH ...] [--output PATH ...]
                          [--code GLOB ...] [--text NAME=TEXT ...]
    stage_marker.py finish MARKER SECONDS
    stage_marker.py closest WORD CANDIDATE ...

``check`` exits with 0 when the stage is done, with 10 when it must run (the reasons go to stdout, one a line),
with 2 for wrong usage and with 4 when an input is missing.  ``finish`` exits with 4 when an output is missing.
"""

import hashlib
import itertools
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from icefall_kd.runtime.files import TMP_PREFIX, read_json, sha256_file, write_json  # noqa: E402

MUST_RUN, USAGE, DATA = 10, 2, 4
# Folders up to this size are compared by content, so a corpus of the same bytes (made again, copied, touched) runs
# nothing.  Larger ones are compared by name, size and time stamp of each file: the audio of LibriSpeech is 60 GB,
# and reading it all would cost more than the stage that the marker spares.  The price is that a large corpus with
# new time stamps is checked once more; what comes out is the same, so nothing behind that stage runs.
FOLDER_CONTENT_LIMIT = 256 * 2**20
# Below a declared folder these say nothing of its content: what a job logged is no reason to train again.
IGNORED_FOLDERS = {".done", "__pycache__", ".git", "log"}
# Output folders with more files are not looked into: a downloaded corpus is an input of the stage that checks it.
SIZED_FILES = 10_000


class Failure(Exception):
    """An error with the exit code to leave with."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def main(arguments: list[str]) -> int:
    """Run one of the three commands and return the exit code."""
    try:
        match arguments:
            case ["check", marker, *rest]:
                return check(Path(marker), rest)
            case ["finish", marker, seconds]:
                return finish(Path(marker), float(seconds))
            case ["closest", word, *candidates]:
                return closest(word, candidates)
        raise Failure(USAGE, f"unknown arguments {arguments}")
    except Failure as failure:
        print(failure, file=sys.stderr)
        return failure.code


def check(marker: Path, arguments: list[str]) -> int:
    """Compare the declared dependencies with the marker; leave them in a pending file when the stage must run."""
    declared, force = parse(arguments)
    old = load(marker)
    new = {
        "options": dict(pair.split("=", 1) for pair in declared["option"]),
        "inputs": {},
        "code": code_version(declared["code"], declared["text"]),
        "outputs": declared["output"],
    }
    known = old["inputs"] if old else {}
    for path in declared["input"]:
        new["inputs"][path] = describe(Path(path), known.get(path))
    if force:
        reasons = ["forced"]
    elif old is None:
        reasons = ["not finished before" if pending_path(marker).exists() else "not run before"]
    else:
        reasons = differences(old, new)
    if not reasons:
        if old["inputs"] != new["inputs"]:  # same content, new time stamps: spare the next check the checksums
            write_json(marker, {**old, "inputs": new["inputs"]})
        return 0
    started = load(pending_path(marker))
    if force or started is None or differences(started, {**new, "outputs": []}):
        forget_tasks(marker)
    write_json(pending_path(marker), new)
    marker.unlink(missing_ok=True)  # from now on the outputs may be half-written
    print("\n".join(reasons))
    return MUST_RUN


def parse(arguments: list[str]) -> tuple[dict[str, list[str]], bool]:
    """Split ``--kind value ...`` groups into lists."""
    declared: dict[str, list[str]] = {kind: [] for kind in ("option", "input", "output", "code", "text")}
    force, kind = False, None
    for word in arguments:
        if word == "--force":
            force = True
        elif word.startswith("--"):
            kind = word[2:]
            if kind not in declared:
                raise Failure(USAGE, f"begin: unknown {word}; it takes --option, --input, --output, --code, --name")
        elif kind is None:
            raise Failure(USAGE, f"begin: {word!r} comes before any --option, --input, --output or --code")
        elif not word and kind in ("input", "output"):
            raise Failure(USAGE, f"begin: --{kind} has an empty path; is a variable not set?")
        else:
            declared[kind].append(word)
    return declared, force


def pending_path(marker: Path) -> Path:
    """Return the file that holds a started stage's dependencies."""
    return marker.with_name(marker.name + ".pending")


def forget_tasks(marker: Path) -> None:
    """Remove what run_cmd remembers of a stage's tasks: it is true of the same inputs and options alone."""
    shutil.rmtree(marker.with_name(marker.name + ".tasks"), ignore_errors=True)


def load(marker: Path) -> dict | None:
    """Read a marker; a missing or damaged one counts as none."""
    try:
        content = read_json(marker)
    except ValueError:
        return None
    return content if isinstance(content, dict) and {"options", "inputs", "code"} <= content.keys() else None


def code_version(globs: list[str], texts: list[str]) -> dict[str, str]:
    """Return the SHA-256 of each source file that the globs (relative to the repository) match, and of the texts."""
    version = {}
    for pattern in globs:
        files = sorted(path for path in ROOT.glob(pattern) if path.is_file())
        if not files:
            raise Failure(USAGE, f"begin: --code {pattern} matches no file of the repository")
        version |= {path.relative_to(ROOT).as_posix(): sha256_file(path) for path in files}
    for pair in texts:
        name, text = pair.split("=", 1)
        version[name] = hashlib.sha256(text.encode()).hexdigest()
    return version


def describe(path: Path, old: dict | None) -> dict:
    """Describe an input by content; an unchanged size and time stamp saves reading it again."""
    if path.is_dir():
        return describe_folder(path, old)
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise Failure(DATA, f"input {path} does not exist; run the stage that writes it, or check the option") from None
    if old and old.get("kind") == "file" and (old["bytes"], old["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
        return old
    return {"kind": "file", "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_file(path)}


def describe_folder(folder: Path, old: dict | None) -> dict:
    """Describe a folder by its recursive listing, and by content or time stamps (see ``FOLDER_CONTENT_LIMIT``)."""
    entries = []
    try:
        for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
            folders[:] = sorted(name for name in folders if name not in IGNORED_FOLDERS)
            for name in names:
                if not name.startswith(TMP_PREFIX):
                    path = os.path.join(parent, name)
                    stat = os.stat(path)
                    entries.append((os.path.relpath(path, folder), stat.st_size, stat.st_mtime_ns))
    except OSError as error:  # no permission, a link to nowhere or to a folder above itself
        raise Failure(DATA, f"input {folder} cannot be read: {error}; repair or remove that file") from None
    entries.sort()
    total = sum(size for _, size, _ in entries)
    new = {
        "kind": "folder",
        "files": len(entries),
        "bytes": total,
        "listing": digest(f"{name}\0{size}" for name, size, _ in entries),
        "times": digest(f"{name}\0{mtime}" for name, _, mtime in entries),
    }
    if old and all(old.get(key) == value for key, value in new.items()):
        return old
    small = total <= FOLDER_CONTENT_LIMIT
    new["sha256"] = digest(f"{name}\0{sha256_file(folder / name)}" for name, _, _ in entries) if small else None
    return new


def _raise(error: OSError) -> None:
    raise error


def digest(lines) -> str:
    """Return the SHA-256 of lines."""
    sha = hashlib.sha256()
    for line in lines:
        sha.update(line.encode(errors="surrogateescape") + b"\n")
    return sha.hexdigest()


def differences(old: dict, new: dict) -> list[str]:
    """Return why a stage must run again: each changed option, input, source file and missing output."""
    reasons = []
    for key, before, after in changed(old["options"], new["options"]):
        reasons.append(f"option {key} changed: {quote(before)} -> {quote(after)}")
    for path, before, after in changed(old["inputs"], new["inputs"]):
        if before is None or after is None:
            reasons.append(f"input {path} is {'new' if before is None else 'no longer an input'}")
        elif content(before) != content(after):
            reasons.append(f"input {path} changed: {summary(before)} -> {summary(after)}")
    for name, before, after in changed(old["code"], new["code"]):
        reasons.append(f"code {name} changed: {short(before)} -> {short(after)}")
    reasons += [f"output {path} is missing" for path in missing(new["outputs"])]
    for path, size in old.get("sizes", {}).items():
        try:
            found = os.stat(path).st_size
        except OSError:
            continue  # what lies in an output folder may be removed
        if found < size:
            reasons.append(f"output {path} was cut off: {found} of {size} bytes")
    return reasons


def missing(outputs: list[str]) -> list[str]:
    """Return the outputs that are not there; a pattern (``*`` in its last part) stands for what there is."""
    return [path for path in outputs if "*" not in os.path.basename(path) and not os.path.exists(path)]


def sizes(outputs: list[str]) -> dict[str, int]:
    """Return the bytes of each output file, those in output folders and those that match patterns included."""
    found = {}
    for output in map(Path, outputs):
        if "*" in output.name:
            files = sorted(path for path in output.parent.glob(output.name) if path.is_file())
        elif output.is_dir():
            files = list(itertools.islice(_files_below(output), SIZED_FILES + 1))
            if len(files) > SIZED_FILES:
                continue
        else:
            files = [output]
        found |= {str(path): path.stat().st_size for path in files}
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in IGNORED_FOLDERS)
        paths = (Path(parent, name) for name in sorted(names) if not name.startswith(TMP_PREFIX))
        yield from (path for path in paths if path.is_file())


def changed(old: dict, new: dict):
    """Yield (key, old, new) of every differing entry; None stands for absent."""
    for key in [*old, *(key for key in new if key not in old)]:
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def content(entry: dict) -> tuple:
    """Return what decides whether an input is the same: the checksum, or the time stamps where there is none."""
    return tuple(entry.get(key) for key in ("kind", "bytes", "listing", "sha256" if entry["sha256"] else "times"))


def summary(entry: dict) -> str:
    """Describe an input on a log line."""
    files = f"{entry['files']} files, " if entry["kind"] == "folder" else ""
    if entry["sha256"]:
        return f"{files}{entry['bytes']} bytes, sha256 {short(entry['sha256'])}"
    return f"{files}{entry['bytes']} bytes, names and sizes {short(entry['listing'])}, times {short(entry['times'])}"


def quote(value: str | None) -> str:
    """Show an option's value; None is an absent option."""
    return "(absent)" if value is None else f"'{value}'"


def short(sha: str | None) -> str:
    """Shorten a checksum for the log."""
    return "(absent)" if sha is None else sha[:12]


def finish(marker: Path, seconds: float) -> int:
    """Check the outputs of a stage and turn its pending file into the marker."""
    pending = pending_path(marker)
    done = load(pending)
    if done is None:
        raise Failure(DATA, f"{pending} is missing or damaged: was the same stage started twice at the same time?")
    absent = missing(done["outputs"])
    forget_tasks(marker)
    if absent:
        raise Failure(DATA, f"the stage ended without its output {', '.join(absent)}")
    write_json(marker, {**done, "sizes": sizes(done["outputs"]), "seconds": seconds})
    pending.unlink()
    return 0


def closest(word: str, candidates: list[str]) -> int:
    """Print the candidate that is most like a misspelt word, if any is."""
    import difflib

    print(*difflib.get_close_matches(word, candidates, n=1, cutoff=0.5))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
