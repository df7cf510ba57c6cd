"""How rows of results are shown: on a terminal, in Markdown, in RESULTS.md between markers."""

import shlex
import sys
from collections.abc import Sequence

from icefall_kd.errors import DataError
from icefall_kd.results import Row, Run, compare, part_order
from icefall_kd.results_names import hubert_model, hubert_origin, transcripts
from icefall_kd.scoring import RATE_NAMES


def demo_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the table that ``make demo`` ends with.

    The search has a column only where the rows differ in it.
    """
    parts = part_order(rows)
    header = ["system", "parameters", "labels", "label bytes per hour", "ratio to float32"]
    header += [f"{rate_name(rows, part)} {part}" for part in parts] + ["seconds"]
    cells = []
    for row in rows:
        parameters = "?" if row.parameters is None else f"{row.parameters:,}"
        rates = [_rate(row, part) for part in parts]
        cells.append([row.system, parameters, *row.label_texts(), *rates, _seconds(row)])
    if len({row.search for row in rows}) > 1:
        header.insert(1, "search")
        for row, line in zip(rows, cells, strict=True):
            line.insert(1, row.search)
    return header, cells


def nar_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the table of autoregressive teachers and mask-predicting students.

    The relative change is that of the error rate against students of the same size without any help (scratch), decoded
    by the same search with the same options.  The decoding has a column only where a system has two of one search.
    """
    parts = part_order(rows)
    header = ["system", "search", "parameters", "seeds", "labels", "label bytes per hour"]
    for part in parts:
        header += [f"{rate_name(rows, part)} {part}", f"relative change {part}", f"masked {part}"]
    header += ["RTF", "seconds"]
    cells = []
    for row in rows:
        parameters = "?" if row.parameters is None else f"{row.parameters:,}"
        seeds = ", ".join(str(run.seed) for run in row.runs)
        line = [row.system, row.search, parameters, seeds, *row.label_texts()[:2]]
        for part in parts:
            share = row.masked_share(part)
            line += [_rate(row, part), _relative(rows, row, part), "-" if share is None else f"{100 * share:.1f} %"]
        cells.append([*line, "-" if row.rtf is None else f"{row.rtf:.4f}", _seconds(row)])
    _tell_decodings(rows, header, cells)
    return header, cells


def hkd_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the table of CIF recognisers with and without distillation from a language model.

    The relative change is that of the error rate against CIF alone, decoded by the same search with the same options.
    Coverage is the share of training utterances whose text met the language model's states.
    """
    parts = part_order(rows)
    header = ["system", "search", "seeds"]
    for part in parts:
        header += [f"{rate_name(rows, part)} {part}", f"relative change {part}"]
    header += ["label bytes per hour", "coverage", "seconds"]
    cells = []
    for row in rows:
        base = next((r for r in rows if r.system.split(" (")[0] == "CIF" and r.how == row.how), None)
        line = [row.system, row.search, ", ".join(str(run.seed) for run in row.runs)]
        for part in parts:
            line += [_rate(row, part), _change(base, row, part)]
        cells.append([*line, row.label_texts()[1], row.text_coverage(), _seconds(row)])
    _tell_decodings(rows, header, cells)
    return header, cells


def dual_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the table of recognisers of two modes, a row for each mode that was decoded.

    MB are 10^6 bytes of float32 weights, sparse ones as blocks with an index of two bytes each.  The difference is that
    of the error rate, in points with its paired interval, to the first row of the same mode, chunk, weights and search.
    """
    systems = [row.system for row in rows]
    rows = sorted(rows, key=lambda row: (systems.index(row.system), _search(row), _told(row, "chunk_size", 0)))
    parts = part_order(rows)
    header = ["system", "mode", "weights", "seeds", "parameters", "non-zeros", "MB float32", "latency"]
    for part in parts:
        header += [f"{rate_name(rows, part)} {part}", f"difference {part}"]
    header += ["RTF", "seconds"]
    cells = []
    for row in rows:
        base = next(r for r in rows if _conditions(r) == _conditions(row))
        seconds, stored = _told(row, "algorithmic_latency"), _told(row, "model_bytes")
        line = [row.system, _mode(row), "sparse" if _told(row, "sparse") else "dense"]
        line.append(", ".join(str(run.seed) for run in row.runs))
        line += [_count(row.parameters), _count(_told(row, "nonzeros"))]
        line.append("-" if stored is None else f"{stored / 1e6:.2f}")
        line.append("utterance" if seconds is None else f"{1000 * seconds:.1f} ms")
        for part in parts:
            line += [_rate(row, part), _difference(base, row, part)]
        cells.append([*line, "-" if row.rtf is None else f"{row.rtf:.4f}", _seconds(row)])
    if len({_search(row) for row in rows}) > 1:
        header.insert(1, "search")
        for row, line in zip(rows, cells, strict=True):
            line.insert(1, _search(row))
    return header, cells


def hubert_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the table of fine-tuned HuBERT models, those with the least transcripts first.

    The difference is that of the error rate, in points with its paired interval: of a student that learnt more than the
    teacher's states to the one of the same model that learnt those alone; of that one, and where there is none, to the
    same model from scratch; each with the same transcripts and search.  The seconds are those of fine-tuning alone.
    """
    rows = sorted(rows, key=lambda row: (_amount_order(transcripts(row.runs[0].config)), _search(row)))
    parts = part_order(rows)
    header = ["model", "learnt", "transcripts", "search", "seeds", "parameters"]
    for part in parts:
        header += [f"{rate_name(rows, part)} {part}", f"difference {part}"]
    header += ["RTF", "seconds"]
    cells = []
    for row in rows:
        model, learnt, amount = _hubert_words(row)
        base = _hubert_base(rows, row)
        line = [model, learnt + row.system.removeprefix(", ".join(filter(None, (model, learnt, amount))))]
        line += [amount or "all", row.search, ", ".join(str(run.seed) for run in row.runs), _count(row.parameters)]
        for part in parts:
            line += [_rate(row, part), _difference(base, row, part, _hubert_words(base)[1])]
        cells.append([*line, "-" if row.rtf is None else f"{row.rtf:.4f}", _seconds(row)])
    return header, cells


def _amount_order(amount: str) -> tuple[int, float]:
    """Return what sorts "10min", "1h" and, the largest, "" by how much they are."""
    number = amount.rstrip("hmins")
    return ("s", "min", "h", "").index(amount.removeprefix(number)), float(number or 0)


def _hubert_words(row: Row) -> tuple[str, str, str]:
    run = row.runs[0]
    return hubert_model(run.config), hubert_origin(run.config, run.start), transcripts(run.config)


def _hubert_base(rows: Sequence[Row], row: Row) -> Row:
    """Return the row that one of :func:`hubert_table` is compared with, itself where there is none."""
    model, learnt, amount = _hubert_words(row)
    stages, found, _ = learnt.rpartition(", ")
    wanted = [f"{stages}{found}L_reg", "from scratch"]
    if learnt in wanted:
        del wanted[: wanted.index(learnt) + 1]
    same = {_hubert_words(r): r for r in reversed(rows) if r.how == row.how}
    return next((same[model, name, amount] for name in wanted if (model, name, amount) in same), row)


def _told(row: Row, name: str, default=None):
    """Return what the results of a row say, equal in all of them, or the default where they say nothing."""
    return next((r[name] for results in row.results.values() for r in results if r.get(name) is not None), default)


def _search(row: Row) -> str:
    return _told(row, "decoding_method", "-")


def _mode(row: Row) -> str:
    chunk = _told(row, "chunk_size", -1)
    return _told(row, "encoder_mode", "-") + (f", {40 * chunk} ms" if chunk > 0 else "")


def _conditions(row: Row) -> tuple:
    """Return what two rows of the table of modes must share to be compared."""
    return row.how[0], row.how[1], _mode(row), _told(row, "sparse")


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _difference(base: Row, row: Row, part: str, name: str | None = None) -> str:
    """Return the difference of error rates in points with its interval, behind the baseline's name or first word."""
    if base is row or row.rate(part) is None or base.rate(part) is None:
        return "-"
    both = [base.results[part], row.results[part]]
    names = [f"{r.system}, seed {run.seed}" for r in (base, row) for run in r.runs]
    found = compare(*both, names, num_samples=1000).difference
    return f"{name or base.system.split()[0]} {found.value:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def _tell_decodings(rows: Sequence[Row], header: list[str], cells: list[list[str]]) -> None:
    """Insert a column of decodings where a system has two of one search."""
    if len({(row.system, row.search) for row in rows}) < len(rows):
        header.insert(2, "decoding")
        for row, line in zip(rows, cells, strict=True):
            line.insert(2, row.decoding)


def _relative(rows: Sequence[Row], row: Row, part: str) -> str:
    """Return the relative change of the error rate against the scratch student of the same size and decoding."""
    same = (r for r in rows if r.parameters == row.parameters and r.how == row.how)
    return _change(next((r for r in same if r.system.removeprefix("small ") == "NAR"), None), row, part)


def _change(base: Row | None, row: Row, part: str) -> str:
    if base is None or base is row or row.rate(part) is None or base.rate(part) is None:
        return "-"
    before, after = base.rate(part).value, row.rate(part).value
    return f"{100 * (after - before) / before:+.1f} %" if before else "-"


def full_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells for RESULTS.md: the demo's columns with search, decoding and seeds."""
    header, cells = demo_table(rows)
    header[1:1] = ["decoding", "seeds"]
    for row, line in zip(rows, cells, strict=True):
        line[1:1] = [row.decoding, ", ".join(str(run.seed) for run in row.runs)]
    return header, cells


def rate_name(rows: Sequence[Row], part: str) -> str:
    """Return what the error rate of a part is called: WER, CER, MER, TER."""
    units = {r["unit"] for row in rows for r in row.results.get(part, [])}
    return "/".join(RATE_NAMES[unit] for unit in sorted(units))


def _rate(row: Row, part: str) -> str:
    rate, count = row.rate(part), len(row.results.get(part, []))
    if rate is None:
        return "-"
    some = f", {count} of {len(row.runs)} seeds" if count < len(row.runs) else ""
    return f"{rate.value:.2f} % ({rate.low:.2f} to {rate.high:.2f}){some}"


def _seconds(row: Row) -> str:
    return "?" if row.seconds is None else f"{row.seconds:,.0f}"


def details(rows: Sequence[Row]) -> str:
    """Return, for each row, the commands, git states, checkpoints and speeds behind it, in Markdown."""
    blocks = []
    for row in rows:
        lines = [f"**{row.system}**, {row.decoding}", ""]
        for run in row.runs:
            lines += [f"Seed {run.seed}, commit {run.commit}:", "", "```bash", shlex.join(run.command)]
            mine = [r for r in run.results if r["suffix"] == row.decoding]
            lines += [*sorted({r["command"] for r in mine}), "```", ""]
            lines += [_training(run), *(_counts(result) for result in mine), ""]
        blocks.append("\n".join(lines).rstrip())
    return "\n\n".join(blocks)


def _training(run: Run) -> str:
    s = run.summary
    if s.get("seconds") is None:
        return "- training: not finished"
    text = f"- training: {s['seconds']:,.0f} s"
    if s.get("audio_hours_per_hour") is not None:
        text += f", {s['audio_hours_per_hour']:.1f} hours of audio an hour"
    if s.get("peak_memory_gib") is not None:
        text += f", peak memory {s['peak_memory_gib']:.2f} GiB"
    ranks = f"{s['world_size']} x " if s.get("world_size", 1) > 1 else ""
    return text + f" on {ranks}{s.get('device', 'an unknown device')}"


def _counts(r: dict) -> str:
    rtf = "" if r["rtf"] is None else f", RTF {r['rtf']:.4f} on {r['device']}"
    kinds = f"{r['ins']} ins, {r['del']} del, {r['sub']} sub"
    return f"- {r['part']}: {r['errors']} errors in {r['num_ref']} ({kinds}), {r['files_used']}{rtf}"


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replace_block(text: str, name: str, content: str) -> str:
    """Return ``text`` with ``content`` between the markers of ``name``, which are appended when missing.

    Raises:
        DataError: one of the two markers is missing, or they are in the wrong order.
    """
    begin, end = f"<!-- results:{name} begin -->", f"<!-- results:{name} end -->"
    block = f"{begin}\n\n{content}\n\n{end}"
    if begin not in text and end not in text:
        return f"{text.rstrip()}\n\n{block}\n".lstrip()
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise DataError(f"the markers {begin} and {end} are not both there, in this order; restore them")
    return before + block + after


def print_table(header: Sequence[str], cells: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print a table to stdout: with frames on a terminal, in Markdown into a file or pipe."""
    if not sys.stdout.isatty():
        print(markdown_table(header, cells))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for line in cells:
        table.add_row(*line)
    Console().print(table)
