#!/usr/bin/env python3
"""Run run_hubert.sh on small sets of real recordings, one result file a fine-tuning; finished ones are skipped.

    benchmarks/real_hubert.py --data-root DIR --seeds 1                       all systems, one seed of each bed
    benchmarks/real_hubert.py --data-root DIR --seeds 2,3 --beds hubert_digits
    benchmarks/real_hubert.py --compare true                                  comparisons and tables of what is there

DIR is that of real_recordings.py.  One teacher is pre-trained, and one student of each kind distilled, on the audio of
the training parts of the digits, of barista and of the LibriSpeech slice; all beds, amounts of transcripts and seeds
share them.  A system is a word of run_hubert.sh and an amount.  Every number is one of a small bed, reported on dev.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import chains
from real_dualmode import HEARD, corpus_of, data_dir
from real_recordings import REPO, run_command, without_machine_paths

from icefall_kd.cli import parse_config
from icefall_kd.config.checks import at_least
from icefall_kd.errors import run_main
from icefall_kd.results import find_results
from icefall_kd.results_table import markdown_table
from icefall_kd.runtime.env import environment
from icefall_kd.runtime.files import read_json
from icefall_kd.runtime.log import setup_logging

# Words of run_hubert.sh; what each is compared with, which has learnt less.
COMPARED_WITH = {
    "fbank-scratch": None,
    "fbank-two": "fbank-scratch",
    "fbank-both": "fbank-two",
    "teacher": None,
    "scratch": None,
    "deep-reg": "scratch",
    "deep-both": "deep-reg",
    "deep-disc": "scratch",
    "fbank-one": "fbank-scratch",
    "wide-reg": "scratch",
    "wide-both": "wide-reg",
}
UNTAUGHT = ("scratch", "fbank-scratch")
# Other pairs: structures, front ends, and all that distillation gives.
PAIRS = [
    ("wide-reg", "deep-reg"),
    ("deep-reg", "deep-disc"),
    ("deep-both", "fbank-both"),
    ("deep-reg", "fbank-two"),
    ("scratch", "deep-both"),
    ("fbank-scratch", "fbank-both"),
    ("fbank-one", "fbank-two"),
    ("teacher", "deep-both"),
    ("teacher", "fbank-both"),
]
# Systems that differ in one thing; of each table, whichever are there.
GRIDS = {
    "T1, structures (L_reg)": ["deep-reg", "wide-reg"],
    "T2, losses": ["deep-reg", "deep-disc", "deep-both"],
    "T3, front ends": ["deep-reg", "fbank-one", "fbank-two", "fbank-both"],
}
# Students whose layers are compared with the teacher's, before and after fine-tuning with all transcripts (T4).
COMPARED_LAYERS = ["deep-reg", "deep-both", "fbank-both"]
# Letters as they come, and the words of the transcripts of training: without them a word is wrong as soon as one letter
# is, and half of the digits' errors were one doubled letter (THRE).  What is compared is the second.
GREEDY, WORDS = "ctc_greedy_search", "ctc_lexicon_beam"
AVERAGED = ["--avg", 3]
TEACHER_SEED = 42
# The models of the demo, and how long they hear 1.45 h; two pre-trainings, as HuBERT's.
CONF = "egs/librispeech/conf/hubert_demo.yaml"
AUDIO_OPTIONS = ["--num-clusters", "50 100", "--cluster-layer", 3, "--ssl-args", "--num-epochs 5 --num-threads 1"]
AUDIO_OPTIONS += ["--distil-args", "--num-epochs 3", "--train-args", "--valid-utts 100"]
# The digits' dev has 51 minutes, and 60 short epochs are 60 validations.
TUNE_OPTIONS = "--valid-utts 20 --max-duration 6"


@dataclass(frozen=True)
class Bed:
    """A set of recordings and how run_hubert.sh is told to use it."""

    seeds: list[int]
    home: str
    """Folder of its prepared data under exp_root."""
    amounts: dict[str, tuple[int, float]]
    """Transcripts of fine-tuning, few and all; epochs over them, and the rate of a student without a teacher."""

    @property
    def systems(self) -> list[str]:
        """Return words and amounts, joined."""
        return [f"{word}-{amount}" for amount in self.amounts for word in COMPARED_WITH]


# Few transcripts are learnt best, by the loss on dev with seed 1 of the digits, at a rate of 0.004 without a teacher
# (of 0.002 and 0.004), and by distilled students at that of the confs, 0.002 (of 0.0005, 0.002, 0.004 and 0.01).
BEDS = {
    "hubert_digits": Bed([1, 2, 3], "dualmode_digits", {"2min": (60, 0.004), "all": (8, 0.002)}),
    "hubert_barista": Bed([1], "barista", {"3min": (50, 0.004), "all": (10, 0.002)}),
}


@dataclass(frozen=True, kw_only=True)
class RealHubertConfig:
    """Run run_hubert.sh on small sets of real recordings."""

    data_root: Path | None = None
    """Folder of the recordings."""
    exp_root: Path = Path("exp/real")
    """Folder of prepared data and experiments."""
    beds: list[str] = field(default_factory=lambda: list(BEDS))
    """Which beds."""
    systems: list[str] = field(default_factory=lambda: [s for bed in BEDS.values() for s in bed.systems])
    """Which systems of them."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Which seeds of them."""
    results: Path = REPO / "benchmarks/results/real_hubert"
    """Folder of the result files."""
    report: Path | None = REPO / "RESULTS.md"
    """Markdown file whose block of results is renewed; None: the tables are only printed."""
    compare: bool = False
    """Only compare what is there."""
    jobs: int = 2
    """Trainings at the same time; one takes one core."""
    hubert_args: str = ""
    """More options of run_hubert.sh, in one string."""
    commit: bool = False
    """Commit each result file to git as it comes."""

    def __post_init__(self) -> None:
        at_least(self, jobs=1)
        chains.check_choices(self, BEDS)


def source_dir(bed: str, config: RealHubertConfig) -> Path:
    """Return the corpus folder of a bed."""
    return corpus_of(BEDS[bed].home, config)


def audio_dir(config: RealHubertConfig) -> Path:
    """Return the folder of teacher and students."""
    return (config.exp_root / "hubert_audio").resolve()


def run_line(config: RealHubertConfig, home: str, exp: Path, corpus: Path, *options: object) -> list:
    """Return a command line of run_hubert.sh over the data of a corpus."""
    line = ["bash", "egs/librispeech/run_hubert.sh", *HEARD[home][0], "--corpus-dir", corpus]
    line += ["--data-dir", data_dir(home, config), "--exp-dir", exp, "--nj", 1, "--teacher", "own"]
    return [*line, "--config", REPO / CONF, *AUDIO_OPTIONS, *config.hubert_args.split(), *options]


def recipe_line(config: RealHubertConfig, bed: str, corpus: Path, *options: object) -> list:
    """Return the command line of run_hubert.sh for a bed."""
    line = run_line(config, BEDS[bed].home, (config.exp_root / bed).resolve(), corpus)
    return [*line, "--audio-dir", audio_dir(config), "--teacher-seed", TEACHER_SEED, *options]


def prepare_line(config: RealHubertConfig, bed: str, corpus: Path, *options: object) -> list:
    """Return the command line that makes the data of a bed and chooses its transcripts."""
    return recipe_line(config, bed, corpus, "--systems", "scratch", "--hours", "all", *options)


def teach(config: RealHubertConfig) -> None:
    """Pre-train the teacher and distil the students that the wanted systems need; keep a result file of each."""
    wanted = dict.fromkeys(name.rsplit("-", 1)[0] for name in config.systems)
    words = [w for w in wanted if w not in UNTAUGHT]
    students = [w for w in words if w != "teacher"]
    names = [*(["ssl1", "ssl2"] if words else []), *(f"distil-{w}" for w in students)]
    if all(audio_file(config, name).exists() for name in names):
        return
    corpora = {home: corpus_of(home, config) for home in HEARD}
    for home, corpus in corpora.items():
        run_command(run_line(config, home, audio_dir(config), corpus, "--systems", "scratch", "--stop-stage", 0))
    parts = {"train": [], "valid": []}
    for home, (_, train, valid) in HEARD.items():
        parts["train"].append(data_dir(home, config) / f"fbank/cuts_{train}.jsonl.gz")
        parts["valid"] += [data_dir(home, config) / f"fbank/cuts_{valid}.jsonl.gz"] if valid else []
    heard, checked = (",".join(map(str, files)) for files in parts.values())
    options = ["--systems", " ".join(words), "--ssl-parts", heard, "--ssl-valid-parts", checked, "--hours", "all"]
    options += ["--teacher-seed", TEACHER_SEED, "--train-jobs", config.jobs, "--stage", 1, "--stop-stage", 3]
    run_command(run_line(config, "dualmode_digits", audio_dir(config), corpora["dualmode_digits"], *options))
    for name in names:
        result = without_machine_paths(collect_audio(audio_dir(config) / name, name), config)
        chains.keep(audio_file(config, name), result, config.commit)


def audio_file(config: RealHubertConfig, name: str) -> Path:
    """Return where the result of a training without transcripts lies."""
    return config.results / f"hubert_audio_{name}.json"


def collect_audio(exp_dir: Path, name: str) -> dict:
    """Return what the result file of a training without transcripts holds: options, cost, and validations."""
    lines = (exp_dir / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    ends = ("loss", "acc", "perplexity")
    figures = [{k: v for k, v in r.items() if k.endswith(ends) or k in ("step", "epoch")} for r in records]
    kinds = [r["kind"] for r in records]
    summary = read_json(exp_dir / "train_summary.json")
    names = ("finished", "epochs", "steps", "seconds", "audio_hours", "audio_hours_per_hour", "peak_memory_gib")
    return {
        "bed": "hubert_audio",
        "system": name,
        "seed": TEACHER_SEED,
        "training": {key: summary[key] for key in (*names, "parameters", "device")},
        "options": read_json(exp_dir / "config.json")["config"],
        "first": figures[kinds.index("train")],
        "validations": [f for f, kind in zip(figures, kinds, strict=True) if kind == "valid"],
        "environment": environment(),
    }


def run_chain(config: RealHubertConfig, bed: str, seed: int, corpus: Path) -> None:
    """Fine-tune and decode what is missing of a seed."""
    for system in BEDS[bed].systems:
        out = chains.result_file(config, bed, system, seed)
        if out.exists() or system not in config.systems:
            continue
        word, amount = system.rsplit("-", 1)
        options = ["--systems", word, "--hours", amount, "--seeds", seed, "--stage", 5, "--stop-stage", 6]
        epochs, rate = BEDS[bed].amounts[amount]
        words = f"{TUNE_OPTIONS} --num-epochs {epochs}"
        if word in UNTAUGHT:
            words += f" --base-lr {rate}"
        run_command(recipe_line(config, bed, corpus, *options, "--tune-args", words))
        exp_dir = (config.exp_root / bed).resolve() / f"{word}-{amount}-seed{seed}"
        if not find_results(exp_dir, decoding_method=WORDS):
            data = data_dir(BEDS[bed].home, config)
            line = ["python3", "egs/librispeech/decode.py", "--exp-dir", exp_dir, "--manifest-dir", data / "fbank"]
            line += ["--test-parts", "dev", *AVERAGED, "--decoding-method", WORDS, "--lang-dir", lang_dir(bed, config)]
            run_command(line)
        result = without_machine_paths(chains.collect(exp_dir, bed, system, seed), config)
        chains.keep(out, result, config.commit)


def lang_dir(bed: str, config: RealHubertConfig) -> Path:
    """Return the folder of a bed's letters and words."""
    return data_dir(BEDS[bed].home, config) / "lang_char"


def choose_hours(config: RealHubertConfig) -> None:
    """Choose the transcripts of every bed, whose data are prepared first, and list the words of all of them."""
    for name in config.beds:
        bed = BEDS[name]
        some = " ".join(amount for amount in bed.amounts if amount != "all")
        options = ["--systems", "scratch", "--hours", some, "--stop-stage", 4]
        run_command(recipe_line(config, name, source_dir(name, config), *options))
        line = ["python3", "local/make_lexicon.py", "--data-dir", data_dir(bed.home, config)]
        run_command([*line, "--lang-dir", lang_dir(name, config)])


def pairs_of(bed: str) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Return what is compared, as ((system, search), (system, search)): the second learnt more, or hears otherwise."""
    words = [(before, after) for after, before in COMPARED_WITH.items() if before] + PAIRS
    amounts = BEDS[bed].amounts
    return [
        ((f"{a}-{amount}", search), (f"{b}-{amount}", search))
        for amount in amounts
        for a, b in words
        for search in (WORDS, GREEDY)
    ]


def table(config: RealHubertConfig) -> str:
    """Return the table of all result files, in Markdown: error rates pooled over seeds, and the paired differences."""
    header = ["bed", "transcripts", "system", "seeds", "parameters", "letters alone", "words", "words, of each seed"]
    header += ["compared with", "difference", "relative", "RTF", "seconds of training"]
    cells = []
    for bed in BEDS:
        compared = chains.compared(config, bed)
        for system in BEDS[bed].systems:
            results = chains.finished(config, bed, BEDS[bed].seeds, system)
            if not results:
                continue
            word, amount = system.rsplit("-", 1)
            letters, found = ([result["decodings"][s] for result in results.values()] for s in (GREEDY, WORDS))
            before = COMPARED_WITH[word]
            change = compared.get(((f"{before}-{amount}", WORDS), (system, WORDS)), {})
            cells.append([
                bed,
                amount,
                word,
                ", ".join(map(str, results)),
                f"{next(iter(results.values()))['training']['parameters']:,}",
                chains.rate_text(letters),
                chains.rate_text(found),
                ", ".join(f"{r['error_rate']:.2f}" for r in found),
                before or "-",
                change.get("difference", "-"),
                change.get("relative", "-"),
                f"{min(r['rtf'] for r in letters):.4f}",
                f"{min(r['training']['seconds'] for r in results.values()):,.0f}",
            ])  # fmt: skip
    return markdown_table(header, cells)


def grids(config: RealHubertConfig) -> str:
    """Return the tables of systems that differ in one thing: error rates of the seeds that all of a table have."""
    parts = []
    for bed, title in ((bed, title) for bed in BEDS for title in GRIDS):
        results = {
            (word, amount): chains.finished(config, bed, BEDS[bed].seeds, f"{word}-{amount}")
            for word in GRIDS[title]
            for amount in BEDS[bed].amounts
        }
        words = [w for w in GRIDS[title] if all(results[w, amount] for amount in BEDS[bed].amounts)]
        if len(words) < 2:
            continue
        seeds = sorted(set.intersection(*(set(results[w, amount]) for w in words for amount in BEDS[bed].amounts)))
        if not seeds:
            continue
        cells = []
        for word in words:
            found = [[results[word, a][seed]["decodings"][WORDS] for seed in seeds] for a in BEDS[bed].amounts]
            parameters = results[word, "all"][seeds[0]]["training"]["parameters"]
            runs = [results[word, a][seed] for a in BEDS[bed].amounts for seed in seeds]
            fastest = min(run["decodings"][GREEDY]["rtf"] for run in runs)
            cells.append([word, f"{parameters:,}", *map(chains.rate_text, found), f"{fastest:.4f}"])
        told = "seed" + "s" * (len(seeds) > 1)
        parts.append(f"{title}: {bed}, {told} {', '.join(map(str, seeds))}")
        parts.append(markdown_table(["system", "parameters", *BEDS[bed].amounts, "RTF"], cells))
    return "\n\n".join(parts)


def similarity_file(config: RealHubertConfig, name: str) -> Path:
    """Return where the comparison of a student's layers with the teacher's lies."""
    return config.results / f"hubert_similarity_{name}.json"


def compare_layers(config: RealHubertConfig) -> None:
    """Compare layers of the students that are there, before and after fine-tuning, with the teacher's."""
    audio, bed = audio_dir(config), "hubert_digits"
    for word in COMPARED_LAYERS:
        models = {f"distil-{word}": audio / f"distil-{word}"}
        models[f"{word}-all-seed1"] = (config.exp_root / bed).resolve() / f"{word}-all-seed1"
        for name, student in models.items():
            out = similarity_file(config, name)
            if out.exists() or not (student / "train_summary.json").exists():
                continue
            raw = config.exp_root.resolve() / f"similarity_{name}.json"
            line = ["python3", "local/similarity.py", "--student", student, "--teacher", audio / "ssl2", "--out", raw]
            run_command([*line, "--cuts", data_dir(BEDS[bed].home, config) / "fbank/cuts_dev.jsonl.gz"])
            found = {"bed": bed, "system": name, "seed": TEACHER_SEED, **read_json(raw)}
            result = without_machine_paths(found, config)
            chains.keep(out, result, config.commit)


def similarity_table(config: RealHubertConfig) -> str:
    """Return table T4: of each layer of a student the alignment with each of the teacher's, before and after."""
    cells, header = [], []
    for word in COMPARED_LAYERS:
        files = [similarity_file(config, name) for name in (f"distil-{word}", f"{word}-all-seed1")]
        if not all(file.exists() for file in files):
            continue
        before, after = map(read_json, files)
        header = ["student", "its layer", *(f"teacher's {layer}" for layer in before["teacher_layers"])]
        for layer, *rows in zip(before["student_layers"], before["cka"], after["cka"], strict=True):
            cells.append([word, str(layer), *(f"{a:.2f} / {b:.2f}" for a, b in zip(*rows, strict=True))])
    return "T4, linear CKA after distillation / after fine-tuning\n\n" + markdown_table(header, cells) if cells else ""


def audio_table(config: RealHubertConfig) -> str:
    """Return the table of teacher and students: last validation, and seconds."""
    header = ["training", "parameters", "steps", "loss", "L_rec", "L_cos", "L_disc", "accuracy", "seconds"]
    cells = []
    for file in sorted(config.results.glob("hubert_audio_*.json")):
        result = read_json(file)
        end = result["validations"][-1]
        shown = [end.get(name) for name in ("loss", "rec_loss", "cos_loss", "disc_loss")]
        right = end.get("masked_acc", end.get("cluster_acc"))
        cells.append([
            result["system"],
            f"{result['training']['parameters']:,}",
            f"{result['training']['steps']:,}",
            *("-" if value is None else f"{value:.3f}" for value in shown),
            "-" if right is None else f"{right:.1%}",
            f"{result['training']['seconds']:,.0f}",
        ])  # fmt: skip
    return markdown_table(header, cells)


def main() -> None:
    """Run what is missing, then compare."""
    setup_logging()
    config = parse_config(RealHubertConfig, description=__doc__)
    if not config.compare:
        teach(config)
        choose_hours(config)
        chains.run_missing(config, BEDS, source_dir, prepare_line, run_chain)
        compare_layers(config)
    for bed in config.beds:
        chains.compare(config, bed, BEDS[bed], pairs_of(bed))
    parts = [audio_table(config), table(config), grids(config), similarity_table(config)]
    chains.publish("\n\n".join(filter(None, parts)), config.report, "real_hubert")


if __name__ == "__main__":
    run_main(main)
