"""The page of --system nar: how much was masked, in how many passes it was filled in, and what that was good for."""

from collections import Counter
from collections.abc import Sequence

from icefall_kd.decode.mask_ctc import plan_passes
from icefall_kd.report.page import Section, figure, figures, paragraph, table, text
from icefall_kd.report.plots import draw_counts
from icefall_kd.report.training import read_nbest
from icefall_kd.results import Run


def nar_sections(run: Run) -> list[Section]:
    """Return the section about masks; for an autoregressive teacher, a sentence."""
    if run.config["attention_decoder"] == "ar":
        told = "This is an autoregressive teacher: it masks nothing, and writes one token after the other."
        return [Section("Masks and passes", paragraph(told))]
    results = [r for r in run.results if r.get("masked_share") is not None]
    if not results:
        told = "No decoding masked anything yet: decode.py --decoding-method mask_predict or nar_beam_search."
        return [Section("Masks and passes", paragraph(told))]
    lines, drawn, counted = [], [], set()
    for result in results:
        records = read_nbest(run, result)
        masked = {r["id"]: (r["nbest"][0]["masked"], len(r["nbest"][0]["tokens"])) for r in records}
        passes = [len(plan_passes(m, result["config"]["passes"])) for m, _ in masked.values()]
        lines.append(_line(result, masked, passes))
        same = (result["part"], tuple(sorted(masked.items())), tuple(passes))
        if same not in counted:  # two searches that start from the same CTC string mask the same
            counted.add(same)
            name = f"{result['decoding_method']}, {result['part']}"
            drawn += [_shares_drawn(name, list(masked.values())), _passes_drawn(name, passes)]
    header = ["search", "part", "options", "tokens masked", "passes an utterance", "most passes",
              "error rate without masks", "with masks"]  # fmt: skip
    told = (
        "CTC tokens below the threshold are masked, and the decoder fills them in, easiest first. The last two columns "
        "are the error rates of the utterances of which CTC was sure and of those with masks, and their number."
    )
    body = table("Masks of the best hypotheses", header, lines, numbers=(3, 4, 5, 6, 7))
    return [Section("Masks and passes", paragraph(told, note=True) + body + figures(drawn))]


def _line(result: dict, masked: dict[str, tuple[int, int]], passes: Sequence[int]) -> list[str]:
    options = f"threshold {result['config']['mask_threshold']}, at most {result['config']['passes'] or 'all'} passes"
    mean = f"{sum(passes) / len(passes):.2f}"
    rates = [_rate(result, {i for i, (m, _) in masked.items() if bool(m) == some}) for some in (False, True)]
    share = f"{100 * result['masked_share']:.1f} %"
    return [text(result["decoding_method"]), text(result["part"]), text(options), share, mean, str(max(passes)), *rates]


def _rate(result: dict, ids: set[str]) -> str:
    """Return the error rate in per cent of some utterances, and their number."""
    u = result["utterances"]
    places = [k for k, i in enumerate(u["ids"]) if i in ids]
    errors, total = (sum(u[n][k] for n in names for k in places) for names in (("ins", "del", "sub"), ("ref_len",)))
    return f"{100 * errors / total:.2f} ({len(places)})" if total else f"- ({len(places)})"


def _shares_drawn(name: str, masked: Sequence[tuple[int, int]]) -> str:
    """Draw how many utterances have which share of their tokens masked, in ten steps."""
    counts = Counter("0" if not m else str(10 * -(-10 * m // n)) for m, n in masked)
    labels = [str(10 * k) for k in range(11)]
    svg = draw_counts(f"Masked share, {name}", labels, [counts[x] for x in labels], "% masked, at most", "utterances")
    return figure("Masked share", name, svg)


def _passes_drawn(name: str, passes: Sequence[int]) -> str:
    counts = Counter(passes)
    labels = range(max(passes) + 1)
    svg = draw_counts(f"Passes, {name}", [str(k) for k in labels], [counts[k] for k in labels], "passes", "utterances")
    return figure("Passes", name, svg)
