"""What every training's report shows: what was trained and from what, the losses, and the decodings."""

import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from icefall_kd.cli import options_of
from icefall_kd.config import TrainConfig
from icefall_kd.errors import DataError
from icefall_kd.labels.info import INFO_NAME, LabelSetInfo
from icefall_kd.report.page import Section, code, details, figure, figures, paragraph, table, text
from icefall_kd.report.plots import Curve, draw_curve
from icefall_kd.results import Row, Run, build_rows, find_folder, part_order
from icefall_kd.results_names import distils, system_name
from icefall_kd.results_table import rate_name
from icefall_kd.runtime.log import format_seconds
from icefall_kd.train.metrics import read_metrics

# Fields of a record of metrics.jsonl that are no losses: of the record, and of the optimiser and the machine.
_RECORD = ("kind", "step", "tot", "epoch", "batch", "skipped", "units", "figures")
_STEPPING = {"lr": "learning rate", "grad_norm": "gradient norm", "audio_hours_per_hour": "audio hours an hour"}
_MACHINE = ("memory_gib",)
# Groups of options that say from what and how a training ran, and options that say where.
_OF_THE_RUN = (("data",), ("augment",), ("loop",))
_NOT_SHOWN = ("exp_dir", "num_threads", "num_workers", "device", "log_interval", "start_epoch")


def read_log(exp_dir: Path) -> list[dict]:
    """Return the records of a training's metrics.jsonl.

    Raises:
        DataError: there is none, or it is empty.
    """
    file = exp_dir / "log" / "metrics.jsonl"
    records = read_metrics(file)
    if not records:
        what = "holds no record yet" if file.exists() else "does not exist"
        raise DataError(f"{file} {what}; a report needs the log of a training: run train.py --exp-dir {exp_dir} first")
    return records


def trained_section(run: Run) -> Section:
    """Return the facts of a training: system, size, length, labels, provenance."""
    summary, config = run.summary, run.config
    facts = [("system", f"{text(system_name(config, run.labels, run.start))} ({code('--system ' + config['system'])})")]
    if run.summary.get("parameters") is not None:
        facts.append(("parameters", f"{summary['parameters']:,}"))
    facts.append(("seed", text(run.seed)))
    if summary.get("steps") is not None:
        state = "" if summary.get("finished") else " (not finished)"
        facts.append(("length", f"{summary['epochs']} epochs, {summary['steps']:,} steps{state}"))
    if summary.get("seconds") is not None:
        speed = summary.get("audio_hours_per_hour")
        told = f", {speed:.0f} hours of audio an hour" if speed is not None else ""
        facts.append(("time", f"{format_seconds(summary['seconds'])} on {text(summary.get('device', '?'))}{told}"))
    if summary.get("peak_memory_gib") is not None:
        facts.append(("peak memory", f"{summary['peak_memory_gib']:.2f} GiB"))
    if (covered := summary.get("text_coverage")) is not None:
        told = f"{covered['aligned']:,} of {covered['utterances']:,} utterances"
        facts.append(("language model's states", f"aligned with the text of {told}, the others learn without them"))
    facts.append(("commit", code(run.commit)))
    body = table("The training", ["what", "value"], [[text(name), value] for name, value in facts])
    body += details("The command", paragraph(code(shlex.join(run.command))))
    return Section("What was trained", body + _labels(run) + _left_out(run.exp_dir))


def _labels(run: Run) -> str:
    """Return where the labels of the distillation came from, and what they cost."""
    if not distils(run.config):
        return paragraph("It learned from transcripts alone, from no teacher's labels.")
    if run.config.get("teacher_labels") == "online":
        return paragraph(f"A teacher made the labels in training: {code(run.config['teacher'])}.")
    rows, folders = [], run.config["label_dir"]
    storage = run.labels if len(run.labels) == len(folders) else [None] * len(folders)
    for folder, cost in zip(folders, storage, strict=True):
        found = find_folder(run.exp_dir, folder, INFO_NAME)
        about = ["not found any more", "?", "?", "?"]
        if found is not None:
            info = LabelSetInfo.load(found)
            layer = "-" if info.layer is None else f"{info.layer} ({info.layer_convention})"
            quantizer = code(info.quantizer_sha256[:12]) if info.quantizer_sha256 else "-"
            teacher = f"{text(info.teacher)} {code(info.teacher_sha256[:12])}"
            about = [text(info.kind.replace("_", " ")), teacher, text(layer), quantizer]
        costs = ["?", "?"] if cost is None else [f"{cost.hours:.2f}", f"{cost.bytes_per_hour:,.0f}"]
        rows.append([code(folder), *about, *costs])
    header = ["label set", "kind", "teacher, SHA-256 of its weights", "layer", "quantizer", "hours", "bytes an hour"]
    return table("Labels of the teacher", header, rows, numbers=(5, 6))


def options_section(config: dict) -> Section:
    """Return the options that differ from their defaults: those of model, losses and distillation before the rest."""
    known = options_of(TrainConfig)
    changed: dict[bool, list] = {True: [], False: []}
    everything = []
    for name, value in config.items():
        option = known.get(name)
        flag, shown = f'<code class="whole">--{text(name.replace("_", "-"))}</code>', code(_plain(value))
        everything.append([flag, shown])
        if name in _NOT_SHOWN or (option is not None and _plain(option.default) == _plain(value)):
            continue
        usual, doc = ("?", "") if option is None else (code(_plain(option.default)), text(option.doc))
        changed[option is None or option.group[:1] not in _OF_THE_RUN].append([flag, shown, usual, doc])
    header = ["option", "value", "default", "meaning"]
    body = table("What differs from the defaults in model, losses, distillation and optimiser", header, changed[True])
    others = table("What differs from the defaults in data, augmentation and loop", header, changed[False])
    body += details(f"Data, augmentation and loop ({len(changed[False])} options)", others)
    body += details(f"All {len(everything)} options", table("All options", ["option", "value"], everything))
    return Section("Options", body)


def _plain(value: object) -> str:
    """Return an option's value as it is written on the command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "empty"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _left_out(exp_dir: Path) -> str:
    file = exp_dir / "left_out.jsonl"
    count = len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0
    return paragraph(f"The filters left {count:,} utterances out: {code(file.name)}.") if count else ""


def curves(records: Sequence[dict]) -> dict[str, Curve]:
    """Return the values of a log by name, in the order in which they appear."""
    found: dict[str, Curve] = {}
    for record in records:
        step, train = record["step"], record["kind"] == "train"
        for name, value in record.items():
            if name not in _RECORD:
                curve = found.setdefault(name, Curve())
                (curve.train if train else curve.valid).append((step, _number(value)))
        for name, value in record.get("figures", {}).items():
            found.setdefault(name, Curve()).train.append((step, _number(value)))
        for name, value in record.get("tot", {}).items():
            found.setdefault(name, Curve()).running.append((step, _number(value)))
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def losses_section(records: Sequence[dict]) -> Section:
    """Return the curves of every loss and metric; numbered ones (a codebook's) are left to the system's page."""
    units = next((r["units"] for r in records if "units" in r), None)
    shown = {name: c for name, c in curves(records).items() if name not in _MACHINE and not re.search(r"\d{2}$", name)}
    drawn = []
    for name in sorted(shown, key=lambda n: (n in _STEPPING, n != "loss")):
        unit = "" if name in _STEPPING else _unit(name, units)
        drawn.append(figure(_STEPPING.get(name, name), unit, draw_curve(name, shown[name], unit)))
    steps = [r["step"] for r in records]
    told = (
        f"{len(records)} records of steps {min(steps)} to {max(steps)}. Losses are natural logarithms, before their "
        "scales; <b>loss</b> is the weighted sum that was minimised. Distillation has no validation values: its labels "
        "are of the training set."
    )
    last = []
    for name, curve in shown.items():
        if name not in _STEPPING:
            train, valid = curve.last()
            last.append([code(name), text(_unit(name, units)), _value(train), _value(valid)])
    header = ["value", "unit", "last running mean", "last validation"]
    values = details("The last values", table("The last values of the log", header, last, numbers=(2, 3)))
    return Section("Losses", paragraph(told, note=True) + figures(drawn) + values)


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _unit(name: str, units: dict[str, str] | None) -> str:
    """Return what a value is divided by."""
    if name.endswith("_acc"):
        return "share that is right"
    if name != "loss" and not name.endswith("_loss"):
        return ""
    if units is None:  # a log of an earlier version
        return "per frame" if name == "loss" else "per frame or token"
    return f"per {units.get(name, 'frame')}"


def results_section(run: Run, others: Sequence[Run]) -> Section:
    """Return the table of all decodings, of this training and of those that it is compared with."""
    rows = build_rows([run, *others])
    parts = part_order(rows)
    if not parts:
        return Section("Results", paragraph("Nothing was decoded yet: decode.py --exp-dir writes results here."))
    header = ["system", "search", "parameters", *(f"{rate_name(rows, part)} {part}" for part in parts)]
    header += ["RTF", "decoding"]
    cells = []
    for row in rows:
        if row.results:
            rates = [_rate(row, part) for part in parts]
            rtf = "-" if row.rtf is None else f"{row.rtf:.4f}"
            size = "?" if row.parameters is None else f"{row.parameters:,}"
            cells.append([text(row.system), text(row.search), size, *rates, rtf, code(row.decoding)])
    told = "Error rates in per cent with their 95 % bootstrap intervals; RTF: seconds of computing a second of audio."
    return Section("Results", table(told, header, cells, numbers=range(2, len(header) - 1)))


def _rate(row: Row, part: str) -> str:
    rate = row.rate(part)
    return "-" if rate is None else f"<b>{rate.value:.2f}</b> ({rate.low:.2f} to {rate.high:.2f})"


def read_nbest(run: Run, result: dict) -> list[dict]:
    """Return the n-best records of a decoding.

    Raises:
        DataError: the file that decode.py wrote beside the result is gone or damaged.
    """
    folder = run.exp_dir / result["decoding_method"]
    file = folder / f"nbest-{result['part']}-{result['suffix']}.jsonl"
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise DataError(f"{file} is gone, which belongs to the result beside it; decode again") from None
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}); decode again") from error

