"""The figures that the pages give are those of the result files."""

import json
import math
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


def result(name: str) -> dict:
    return json.loads((REPO / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def row(text: str) -> str:
    """Return the one line of the page's table that begins with ``text``."""
    lines = (REPO / "docs" / "mvq.md").read_text(encoding="utf-8").splitlines()
    (found,) = [line for line in lines if line.startswith(f"| {text}")]
    return found


def slashed(values, form: str) -> str:
    return " / ".join(format(value, form) for value in values)


def test_the_quantizer():
    rows = result("quantizer_speed")["rows"]
    for what, text in (("encode", "codes of embeddings"), ("train", "a first-phase training step")):
        some = [r for r in rows if r["what"].startswith(what)]
        pytorch, kernel = ([r[f"{name}_ratio"] for r in some] for name in ("pytorch", "kernel"))
        assert f"{slashed(pytorch, '.0f')} times its speed in PyTorch, {slashed(kernel, '.0f')} in C++" in row(text)
    ratios = [1 + r["relative_difference"] for r in result("quantizer_error")["rows"]]
    assert f"{slashed(ratios, '.3f')} of its error" in row("relative error after equal training")


def test_the_transducer_loss():
    ratios = {r["what"]: r["torch_ratio"] for r in result("rnnt_cpu")["rows"] if r["backend"] == "fast_rnnt"}
    expected = f"{ratios['loss']:.2f} of its time alone, {ratios['with joiner']:.2f} with the joiner"
    assert expected in row("pruned transducer loss")


def test_the_training_steps():
    ratios = [result(f"training_cpu_{size}")["ratio_to_none"] for size in ("tiny", "small", "medium")]
    assert slashed((r["stored"] for r in ratios), ".2f") in row("a training step of size tiny / small / medium")
    assert slashed((r["online"] for r in ratios), ".1f") in row("the same with Whisper tiny online")


def test_the_label_store():
    page = " ".join((REPO / "docs" / "mvq.md").read_text(encoding="utf-8").split())
    figures = result("label_store")
    short = next(v for k, v in figures["overhead_percent"].items() if " of 2 s " in k)
    assert f"that is {figures['typical_set']['overhead_percent']:.1f} % of the codes" in page
    assert f"for utterances of 2 s it is {short:.0f} %" in page


def test_integrate_and_fire():
    page = " ".join((REPO / "docs" / "hkd.md").read_text(encoding="utf-8").split())
    rows = {r["what"]: r for r in result("cif_cpu")["rows"]}
    index, slices = (rows[f"loop over {name}"] for name in ("indexes", "slices"))
    assert f"needs {index['ratio']:.0f} times the time of the overlap matrix" in page
    assert f"and {index['memory_ratio']:.1f} times its memory" in page
    assert f"{slices['ratio']:.0f} times the time and {slices['memory_ratio']:.1f} times the memory" in page


def test_block_sparsity():
    page = (REPO / "docs" / "dualmode.md").read_text(encoding="utf-8")
    figures = result("sparse_cpu")
    dense, *pruned = figures["sizes"]
    assert [row["sparsity"] for row in pruned] == [0.7, 0.9] and figures["num_threads"] == 1
    layers, dim, hidden = (figures[name] for name in ("layers", "dim", "feedforward"))
    assert f"an encoder of {layers} layers, {dim} channels and {hidden} hidden units" in page
    for what, name, unit in (
        ("parameters that are not 0", "nonzeros", " M"),
        ("MB with 32 bits a weight", "fp32_bytes", ""),
        ("MB with 16 bits a weight", "fp16_bytes", ""),
    ):
        cells = " | ".join(f"{row[name] / 1e6:.1f}{unit}" for row in (dense, *pruned))
        assert f"| {what} | {cells} |" in page
    rows = {(r["what"], r["sparsity"]): r for r in figures["rows"]}
    for what, form, first in (
        ("chunks, W · M as any other matrix", "materialised", "1 "),
        ("chunks, `torch.sparse`, CSR", "CSR", ""),
        ("chunks, kept columns gathered for each row of blocks", "gathered", ""),
        ("chunks, `benchmarks/block_sparse.cpp`", "kernel", ""),
    ):
        cells = " | ".join(f"{rows[form, s]['ratio']:.2f}" for s in (0.7, 0.9))
        assert f"| {what} | {first}| {cells} |" in page
        assert all(rows[form, s]["difference"] < 1e-3 for s in (0.7, 0.9))
    assert f"| the utterance as a whole | {rows['dense, full', 0.7]['ratio']:.2f} | | |" in page
    assert "non-square blocks" in rows["BSR", 0.7]["impossible"] and "non-square blocks" in page


def test_the_front_ends_of_hubert():
    page = " ".join((REPO / "docs" / "hubert.md").read_text(encoding="utf-8").split())
    figures = result("hubert_frontend_cpu")
    sizes = {size["model"]: size for size in figures["models"]}
    # Of the specification, for 50 frames a second; 10 s are 499.  Log-mel students have no projection of 512 channels.
    assert figures["seconds"] == 10 and figures["baseline"] == "deep_thin"
    expected = {
        "teacher": (2.45, 4.96),
        "shallow_wide": (2.45, 1.04),
        "deep_thin": (2.45, 1.22),
        "deep_thin, log-mel": (0.03, 1.21),
        "shallow_wide, log-mel": (0.06, 1.02),
    }
    gmacs = {name: (size["front_end_gmacs"], size["transformer_gmacs"]) for name, size in sizes.items()}
    for name, both in gmacs.items():
        assert all(abs(ours - theirs) < 0.011 for ours, theirs in zip(both, expected[name], strict=True)), name
    assert sizes.keys() == expected.keys()
    rows = {row["model"]: row for row in figures["rows"] if row["threads"] == 1}
    base = rows["deep_thin"]["cpu_seconds"]["total"]
    for name, size in sizes.items():
        text = name.replace("teacher", "teacher, `base`").replace("deep_thin", "`deep_thin`")
        cells = [text.replace("shallow_wide", "`shallow_wide`"), f"{size['parameters'] / 1e6:.2f} M"]
        cells += [f"{x:.2f}" for x in gmacs[name]]
        cells += [f"{rows[name]['cpu_seconds'][part] / base:.2f}" for part in ("front_end", "transformer", "total")]
        assert f"| {' | '.join(cells)} |" in page, name
    small = sizes["deep_thin, log-mel"]["parameters"] / sizes["deep_thin"]["parameters"]
    faster = rows["deep_thin, log-mel"]["faster"]["total"]
    assert f"{100 * (1 - small):.1f} % of the parameters and make it {faster:.1f} times as fast" in page
    (twice,) = [r for r in figures["rows"] if r["model"] == "deep_thin, log-mel" and r["threads"] == 2]
    assert f"with two threads {twice['faster']['total']:.1f} times by the clock" in page


def test_exported_models():
    page = (REPO / "docs" / "export.md").read_text(encoding="utf-8")
    files = sorted((REPO / "benchmarks/results/exported").glob("*.json"))
    rows = {file.stem: json.loads(file.read_text(encoding="utf-8"))["rows"] for file in files}
    assert len(rows) >= 5
    for name, (eager, *exported) in rows.items():
        assert [r["decoder"] for r in exported] == ["sherpa-onnx fp32", "sherpa-onnx int8"]
        cells = [f"{r['error_rate']:.2f}, {len(r['different'])}" for r in exported]
        what = name.replace("barista_", "").replace("demo_", "streaming, demo, ").replace("_seed", ", seed ")
        what = what.replace("_chunk16", ", chunks of 640 ms")
        what = what.replace("_chunk8", ", chunks of 320 ms")
        assert f"| {what} | {eager['error_rate']:.2f} | {' | '.join(cells)} |" in page, name


def test_the_searches_of_nar():
    page = (REPO / "docs" / "nar.md").read_text(encoding="utf-8")
    rows = {(r["size"], r["search"].removesuffix(", K 10")): r for r in result("nar_rtf/cpu")["rows"]}
    for search in dict.fromkeys(search for _, search in rows):
        big, small = (rows[size, search] for size in ("big", "small"))
        figures = f"{big['cpu_seconds']:.3f} | {small['cpu_seconds']:.3f} | {small['cpu_ratio_to_first']:.1f}"
        assert f"| {search} | {figures} |" in page
    ours, greedy, espnet = (rows["big", s]["cpu_seconds"] for s in ("AR beam 10", "NAR greedy", "ESPnet AR beam 10"))
    encoder = ours - rows["big", "AR beam 10"]["search_cpu_seconds"]
    text = " ".join(page.split())
    assert f"at most {ours / encoder:.1f} times faster" in text and f"it is {ours / greedy:.1f} times faster" in text
    assert f"takes {espnet / ours:.1f} times the seconds of ours, and {espnet / greedy:.1f} times those" in text


def test_what_is_said_of_the_real_recordings_of_nar():
    text = " ".join((REPO / "RESULTS.md").read_text(encoding="utf-8").split())
    found = {
        (bed, tuple(c["from"]), tuple(c["to"])): c
        for bed in ("digits", "barista", "mandarin_words")
        for c in result(f"real_nar/nar_{bed}_comparisons")
    }

    def change(bed, before, after):
        return f"{round(float(found[bed, before, after]['relative'].split()[0]))} %"

    def rate(bed, before, after, which):
        return f"{float(found[bed, before, after][which].split()[0]):.1f} %"

    ctc, mask, beam, tuned = "ctc_greedy_search", "mask_predict", "nar_beam_search", ", threshold 0.7"
    helped = [change(bed, ("scratch", ctc), ("transfer", ctc)) for bed in ("digits", "barista", "mandarin_words")]
    assert "{} on the digits, {} on barista, {} on the Mandarin words".format(*helped) in text
    small = [change(bed, ("small", ctc), ("small-both", ctc)) for bed in ("digits", "barista", "mandarin_words")]
    assert f"on the digits ({small[0]}:" in text
    assert f"{small[1][1:]} on barista and {small[2][1:]} on the Mandarin words" in text
    repaired = [change("digits", (s, ctc), (s, mask + tuned))[1:] for s in ("scratch", "transfer")]
    assert f"repairs {repaired[0]} of the errors of the digits' students from scratch and {repaired[1]} of" in text
    assert all(
        not float(found["digits", (s, ctc), (s, mask + tuned)]["difference"].split(", ")[1].rstrip("]")) >= 0
        for s in ("scratch", "transfer")
    )
    same_size = [
        c for (_, a, b), c in found.items()
        if a[0] == b[0] and b[1].startswith(beam) and not a[0].startswith("small")
    ]  # fmt: skip
    assert len(same_size) == 18 and min(float(c["relative"].split()[0]) for c in same_size) > -2.5
    both = [rate(bed, ("scratch", ctc), (s, ctc), "after") for bed in ("digits", "mandarin_words")
            for s in ("transfer-both", "transfer")]  # fmt: skip
    assert f"digits: {both[0]} with it, {both[1]} without; Mandarin words: {both[2]} and {both[3]}" in text
    teacher = ("teacher", "joint_beam_search"), ("transfer", beam + tuned)
    assert f"{rate('digits', *teacher, 'before')} against {rate('digits', *teacher, 'after')}" in text


def test_what_is_said_of_the_real_recordings_of_hkd():
    text = " ".join((REPO / "RESULTS.md").read_text(encoding="utf-8").split())
    found = {
        (bed, *c["from"], *c["to"]): c
        for bed in ("barista", "mandarin_demo")
        for c in result(f"real_hkd/hkd_{bed}_comparisons")
    }

    def change(bed, before, after):
        """Return what greedy and beam search gain, and whether the interval leaves zero out."""
        ones = [found[bed, before, s, after, s] for s in ("cif_greedy_search", "cif_beam_search")]
        ends = [[float(x) for x in one["difference"].split("[")[1].rstrip("]").split(",")] for one in ones]
        return [one["relative"] for one in ones], [high < 0 for _, high in ends]

    for bed, before, after, sentence, certain in (
        ("barista", "cif", "both", "together bring {} greedy and {} in beam search on barista", [True, True]),
        ("barista", "cif", "acd", "ACD alone brings {} and {} (the second just", [True, False]),
        ("barista", "acd", "both", "on top of ACD {} and {}, within chance", [False, False]),
        ("mandarin_demo", "cif", "lrd", "LRD that helps: {} greedy, {} in beam search", [False, True]),
        ("mandarin_demo", "cif", "both", "both together ({} and {}) are within chance", [False, False]),
    ):
        gains, outside = change(bed, before, after)
        assert sentence.format(*gains) in text and outside == certain, (bed, after, gains, outside)
    assert not any(change("barista", "cif", "lrd")[1] + change("mandarin_demo", "cif", "acd")[1])
    both = found["barista", "cif", "cif_greedy_search", "both", "cif_greedy_search"]
    rates, points = [both[k].split()[0] for k in ("before", "after")], both["difference"].replace(" [", ", [")
    low, high = points.split("[")[1].rstrip("]").split(", ")
    said = " ".join((REPO / "README.md").read_text(encoding="utf-8").split())
    assert f"from {rates[0]} % to {rates[1]} %: {points.split(',')[0]} points, 95 % interval {low} to {high}." in said


def test_what_is_said_of_the_demo_of_dualmode():
    page = (REPO / "RESULTS.md").read_text(encoding="utf-8")
    said = "two of one mode within their intervals, but for streams of 320 ms of the test part"
    assert said in " ".join(page.split())
    block = page.split("<!-- results:demo_dualmode begin -->")[1].split("<!-- results:demo_dualmode end -->")[0]
    header, _, *lines = [line for line in block.splitlines() if line]
    names = [cell.strip() for cell in header.split("|")]
    rows = [dict(zip(names, (cell.strip() for cell in line.split("|")), strict=True)) for line in lines]
    compared = [row for row in rows if row["system"][:2] in ("A5", "C2")]
    assert len(compared) == 8
    for row in compared:
        for part in ("dev-demo", "test-demo"):
            other, _, low, _, _ = row[f"difference {part}"].replace("(", "").replace(")", "").split()
            assert other == ("A1" if row["mode"] == "full" else "A3")
            assert (float(low) > 0) == (part == "test-demo" and row["mode"] == "streaming, 320 ms")


def test_what_is_said_of_the_real_recordings_of_dualmode():
    text = " ".join((REPO / "RESULTS.md").read_text(encoding="utf-8").split())
    compared = result("real_dualmode/dualmode_digits_comparisons")
    found = {(c["from"][0], c["to"][0], c["to"][1]): c for c in compared}
    full, *streams = "full", "streaming, 320 ms", "streaming, 640 ms"

    def each(system, mode):
        runs = [result(f"real_dualmode/dualmode_digits_{system}_seed{seed}") for seed in (1, 2, 3)]
        return [run["decodings"][mode]["error_rate"] for run in runs]

    def change(before, after, mode):
        return f"{round(float(found[before, after, mode]['relative'].split()[0])):+} %"

    def below_zero(before, after, mode):
        return float(found[before, after, mode]["difference"].split(",")[1].rstrip("]")) < 0

    assert all(found[a, "c2", mode]["seeds"] == [1, 2, 3] for a in ("a3", "a5", "b3") for mode in streams)
    rates = {system: each(system, streams[0]) for system in ("a3", "a5", "b3", "c2")}
    spans = [f"{min(r):.1f} to {max(r):.1f} %" for r in rates.values()]
    assert "{} errors by seed with A3, {} with A5; after pre-training {} (B3) and {} (C2)".format(*spans) in text
    averages = result("real_dualmode/dualmode_digits_averages")["rows"]
    of_a3, *others = [[row["error_rate"] for row in averages[i : i + 2]] for i in (0, 2, 4)]
    assert "{:.1f} % with the last three epochs averaged and {:.1f} % with its last checkpoint".format(*of_a3) in text
    assert all(averaged < last for averaged, last in others)

    gains = [change("a5", "c2", mode) for mode in (full, *streams)] + [change("a3", "c2", mode) for mode in streams]
    said = "{} on whole utterances, {} in streams of 320 ms and {} in those of 640 ms, all outside of chance over"
    assert f"{said} utterances; against A3 {{}} and {{}}".format(*gains) in text
    assert below_zero("a5", "c2", full) and all(below_zero(a, "c2", m) for a in ("a3", "a5") for m in streams)
    assert f"A5's best seed ({min(rates['a5']):.1f} %) is as good as C2's mean ({sum(rates['c2']) / 3:.1f} %)" in text
    both = [found["b3", "c2", mode]["difference"] for mode in (*streams, full)]
    assert "C2 against B3 {} and {} points in streams, {} on whole utterances".format(*both) in text
    by_seed = [f"{c2 - b3:+.1f}" for b3, c2 in zip(rates["b3"], rates["c2"], strict=True)]
    assert "By seed it is {}, {} and {} points in streams of 320 ms".format(*by_seed) in text
    of_a5 = [c2 - a5 for a5, c2 in zip(each("a5", streams[1]), each("c2", streams[1]), strict=True)]
    assert [f"{d:.1f}" for d in of_a5[1:]] == ["-0.2", "-0.2"] and "by 0.2 points alone with two seeds of A5" in text
    assert f"C2 is {change('b1', 'c2', full)[1:]} worse than B1" in text
    assert "[-" in found["b1", "c2", full]["difference"]  # within chance
    of_b4 = [found["b4", "c2", mode] for mode in streams]
    (short, _), (long, _) = (c["difference"].split(maxsplit=1) for c in of_b4)
    assert f"for streams alone, by {long[1:]} points, but **those of 320 ms are worse**, by {short} points" in text
    assert below_zero("b4", "c2", streams[1]) and "[0." in of_b4[0]["difference"]
    assert all(c2 > b4 for b4, c2 in zip(each("b4", streams[0]), rates["c2"], strict=True))  # with every seed
    barista = {(c["from"][0], c["to"][0], c["to"][1]): c for c in result("real_dualmode/dualmode_barista_comparisons")}
    assert all(c["seeds"] == [1] for c in barista.values())
    spans = {names: [float(x) for x in c["difference"].replace(",", "").replace("[", "").replace("]", "").split()]
             for names, c in barista.items()}  # fmt: skip
    assert all(high < 0 for (before, *_), (_, _, high) in spans.items() if before == "a3")
    assert all(spans["a5", "c2", mode][0] < 0 <= spans["a5", "c2", mode][2] for mode in (full, *streams))
    points = [spans["b3", "c2", mode] for mode in streams]
    assert all(low < 0 < value for value, low, _ in points)
    assert f"(by {points[0][0]} points in streams of 320 ms and {points[1][0]} in those of 640 ms" in text

    dual, arm = result("real_dualmode/dualmode_ssl_dual"), result("real_dualmode/dualmode_ssl_full")
    firsts = [dual["first"][f"{mode}_contrastive_loss"] for mode in ("full", "streaming")]
    assert all(abs(loss - math.log(101)) < 0.02 for loss in firsts) and "4.615 within 0.02" in text
    end = dual["validations"][-1]
    gap = end["streaming_contrastive_loss"] - end["full_contrastive_loss"]
    assert f"streams have {gap:.2f} nats more than whole utterances" in text
    assert f"still changed by {100 * dual['last']['churn']:.1f} % at their last refresh" in text
    assert dual["training"]["steps"] == arm["training"]["steps"]
    collapsed = [row for row in result("real_dualmode/dualmode_ssl_trials")["rows"] if row["diversity_scale"] == 0.1]
    worst = [f"{row['last']['code_perplexity']:.0f}" for row in collapsed]
    assert "to a perplexity of {} at a rate of 0.001 and of {} at 0.003".format(*worst) in text

    folder = REPO / "benchmarks/results/real_dualmode"
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("dualmode_*.json")]
    seconds = sum(run["training"]["seconds"] for run in runs if isinstance(run, dict) and "training" in run)
    assert f"Trainings took {seconds / 60:.0f} minutes of one core in sum" in text


def test_what_is_said_of_the_real_recordings_of_hubert():
    text = " ".join((REPO / "RESULTS.md").read_text(encoding="utf-8").split())
    words = "ctc_lexicon_beam"
    found = {
        (bed, *c["from"][0].rsplit("-", 1), c["to"][0].rsplit("-", 1)[0]): c
        for bed in ("digits", "barista")
        for c in result(f"real_hubert/hubert_{bed}_comparisons")
        if c["to"][1] == words
    }

    def change(bed, amount, before, after, seeds=None):
        compared = found[bed, before, amount, after]
        assert seeds is None or compared["seeds"] == seeds
        value, low, high = (float(x) for x in compared["difference"].translate({ord(c): None for c in ",[]"}).split())
        return compared["relative"], value, low, high

    def rate(system, bed="digits", seed=1):
        return result(f"real_hubert/hubert_{bed}_{system}_seed{seed}")["decodings"][words]["error_rate"]

    clusters = []
    for bed, few, pair, seeds in (
        ("digits", "2min", ("fbank-two", "fbank-both"), [1, 2, 3]),
        ("digits", "2min", ("deep-reg", "deep-both"), [1]),
        ("barista", "3min", ("fbank-two", "fbank-both"), [1]),
    ):
        clusters.append([change(bed, amount, *pair, seeds) for amount in (few, "all")])
        assert all(high < 0 for *_, high in clusters[-1])
    said = "{} with 2 minutes and {} with all, three seeds; from samples {} and {}; barista {} and {}, one seed"
    assert said.format(*(one[0] for pair in clusters for one in pair)) in text
    assert "{} against {}, {} against {} and {} against {};".format(
        *(f"{one[1]:.2f}" for pair in clusters for one in pair)
    ) in text  # fmt: skip
    shares = [[float(one[0].split()[0]) for one in pair] for pair in clusters]
    assert all(few[1] < every[1] for few, every in clusters) and all(few > every for few, every in shares)

    alone = [change("digits", amount, "fbank-scratch", "fbank-two", [1, 2, 3]) for amount in ("2min", "all")]
    assert all(low > 0 for _, _, low, _ in alone)
    assert "worse than no teacher, {} with 2 minutes and {} with all".format(*(one[0] for one in alone)) in text
    for amount in ("3min", "all"):
        _, _, low, high = change("barista", amount, "fbank-scratch", "fbank-two")
        assert low < 0 < high
    few, every = (change("digits", amount, "fbank-scratch", "fbank-both") for amount in ("2min", "all"))
    assert every[2] < 0 < every[3] and few[2] > 0 and f"still worse with 2 minutes ({few[0]})" in text
    better = [change("barista", amount, "fbank-scratch", "fbank-both") for amount in ("3min", "all")]
    assert all(high < 0 for *_, high in better)
    assert "clearly better on barista, {} and {}".format(*(one[0] for one in better)) in text

    right = [result(f"real_hubert/hubert_audio_ssl{i}")["validations"][-1] for i in (1, 2)]
    assert [end["epoch"] for end in right] == [5, 5]
    assert "tells {:.1%} and {:.1%}".format(*(end["masked_acc"] for end in right)).replace("%", " %") in text
    assert f"({rate('teacher-2min'):.1f} % errors) and makes {rate('teacher-all'):.1f} % with all" in text
    deep = [rate(f"{name}-2min") for name in ("scratch", "deep-reg", "deep-both")]
    assert "{:.1f} % errors; distilled, {:.1f} % and {:.1f} %".format(*deep) in text
    for amount, form in (
        ("2min", "{:.2f} % against {:.2f} % with 2 minutes"),
        ("all", "{:.2f} % against {:.2f} % with all"),
    ):
        assert form.format(rate(f"fbank-both-{amount}"), rate(f"deep-both-{amount}")) in text
        assert change("digits", amount, "deep-reg", "fbank-two")[3] < 0
    names = ("deep-disc", "deep-reg", "deep-both", "wide-reg", "fbank-two", "fbank-one")
    rates = [[f"{rate(f'{name}-{amount}'):.2f} %" for amount in ("2min", "all")] for name in names]
    disc, reg, both, wide, two, one = (" and ".join(pair) for pair in rates)
    gains = [change("digits", amount, "deep-reg", "deep-disc") for amount in ("2min", "all")]
    assert all(high < 0 for *_, high in gains)
    assert "{} with 2 minutes and {} with all: ".format(*(gain[0] for gain in gains)) in text
    assert f"with all: {disc} against {reg}; both together make {both}. **One wide layer** makes {wide}, with" in text
    assert f"distilling the front end make {two}, one stage {one}." in text
    layers = [result(f"real_hubert/hubert_similarity_{n}")["cka"] for n in (
        "distil-deep-reg", "distil-deep-both", "distil-fbank-both",
        "deep-reg-all-seed1", "deep-both-all-seed1", "fbank-both-all-seed1",
    )]  # fmt: skip
    before, after = ([x for cka in some for row in cka for x in row] for some in (layers[:3], layers[3:]))
    assert min(before) > 0.68 and f"from above 0.68 to between {min(after):.2f} and {max(after):.2f}" in text
    files = (REPO / "benchmarks/results/real_hubert").glob("*.json")
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    seconds = sum(run["training"]["seconds"] for run in runs if isinstance(run, dict) and "training" in run)
    assert f"Trainings took {seconds / 60:.0f} minutes of one core in sum" in text


def test_what_is_said_of_the_demo_of_hubert():
    page = (REPO / "RESULTS.md").read_text(encoding="utf-8")
    assert "the rows are equal within their intervals" in " ".join(page.split())
    block = page.split("<!-- results:demo_hubert begin -->")[1].split("<!-- results:demo_hubert end -->")[0]
    header, _, *lines = [line for line in block.splitlines() if line]
    names = [cell.strip() for cell in header.split("|")]
    rows = [dict(zip(names, (cell.strip() for cell in line.split("|")), strict=True)) for line in lines]
    assert len(rows) == 3
    for row in rows[1:]:
        for part in ("dev-demo", "test-demo"):
            low, high = re.search(r"\((\S+) to (\S+)\)$", row[f"difference {part}"]).groups()
            assert float(low) < 0 < float(high)


@pytest.mark.parametrize(("name", "cuts"), [("one_million", 1_000_000), ("ten_million", 10_000_000)])
def test_millions_of_cuts(name, cuts):
    page = " ".join((REPO / "docs" / "scale.md").read_text(encoding="utf-8").split())
    figures = result(f"scale/{name}")
    stream, sampler = figures["stream"], figures["lhotse_sampler_of_20000"]
    memory, joined = stream["mebibytes_by_tenth"], figures["join"]["mebibytes_by_tenth"]
    assert figures["cuts"] == stream["cuts"] == figures["join"]["cuts"] == cuts and stream["each_once"]
    assert f"in {memory[0]} to {memory[-1]} MiB, {stream['cuts_per_processor_second']:,.0f} a second of" in page
    assert f"its buffer of 20,000 drew {sampler['cuts_per_processor_second']:,.0f}" in page
    assert f"joined in {min(joined)} to {max(joined)} MiB" in page and f"`benchmarks/results/scale/{name}.json`" in page
