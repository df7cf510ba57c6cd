"""Tables and comparisons from exp_dirs: grouping over seeds, label storage, refusals, no torch."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from icefall_kd.config import TrainConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import WHISPER_CONV
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.labels.shard import LabelEntry, ShardHeader, write_shard
from icefall_kd.results import build_rows, compare, measure_labels, read_run, stack_utterances
from icefall_kd.results_table import (
    demo_table,
    details,
    dual_table,
    full_table,
    hkd_table,
    hubert_table,
    markdown_table,
    nar_table,
    replace_block,
)
from icefall_kd.runtime.files import read_json, write_json
from icefall_kd.scoring import per_utterance, score, summarize

REPO = Path(__file__).resolve().parent.parent
REFS = [f"W{i} A B C" for i in range(40)]
IDS = [f"u{i:02d}" for i in range(40)]


def result(part="test", wrong=8, refs=REFS, ids=IDS, suffix="epoch-2_avg-1", unit="word", method="greedy_search"):
    """Return what decode.py leaves when the first ``wrong`` utterances have one substitution each."""
    hyps = [r.replace(" B ", " X ") if i < wrong else r for i, r in enumerate(refs)]
    scored = score(refs, hyps, ids, unit)
    return {
        "part": part,
        "suffix": suffix,
        **summarize(scored, 200),
        "rtf": 0.0123,
        "parameters": 1234567,
        "decoding_method": method,
        "files_used": "epoch-2.pt",
        "device": "cpu",
        "command": "decode.py --epoch 2",
        "utterances": per_utterance(scored),
    }


def exp_dir(folder, results, seed=1, seconds=100.0, **options):
    from icefall_kd.cli import config_to_dict

    config = config_to_dict(TrainConfig()) | {"exp_dir": str(folder), "seed": seed} | options
    environment = {"git": {"commit": "0123456789abcdef", "dirty": False}}
    command = ["train.py", "--exp-dir", "a folder"]
    write_json(folder / "config.json", {"config": config, "seed": seed, "command": command, "environment": environment})
    write_json(folder / "train_summary.json", {"seconds": seconds, "parameters": 2000000})
    for r in results:
        write_json(folder / r["decoding_method"] / f"results-{r['part']}-{r['suffix']}.json", r)
    return folder


def label_set(folder, dim=384, width=8):
    """Write a label set of two utterances of 1 s and 0.5 s in two shards."""
    info = LabelSetInfo(
        kind="codebook_indexes", dtype="uint8", width=width, dim=dim, teacher="t", teacher_sha256="s", layer=4,
        layer_convention="1-based", normalization="none", frame_formula=WHISPER_CONV.to_dict(),
    )  # fmt: skip
    write_json(folder / "label_set.json", asdict(info))
    for shard, (key, samples) in enumerate((("a|0|16000|1/1", 16000), ("b|0|8000|1/1", 8000))):
        entry = LabelEntry(key, np.zeros((samples // 320, width), dtype=np.uint8), samples)
        header = ShardHeader("f", shard, 2, info.kind)
        write_shard(folder / f"shard-{shard:05d}-of-00002.safetensors", [entry], header, "uint8", width)
    return folder


def test_label_storage_counts_files_frames_and_hours(tmp_path):
    storage = measure_labels(label_set(tmp_path / "labels"))
    assert storage.frames == 75
    assert storage.hours == pytest.approx(1.5 / 3600)
    size = sum(f.stat().st_size for f in (tmp_path / "labels").glob("shard-*"))
    assert storage.bytes_per_hour == pytest.approx(size / 1.5 * 3600)
    assert storage.ratio == pytest.approx(size / (75 * 384 * 4))


def test_a_damaged_shard_is_named(tmp_path):
    folder = label_set(tmp_path / "labels")
    (folder / "shard-00001-of-00002.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0rubbish")
    with pytest.raises(DataError, match="shard-00001-of-00002"):
        measure_labels(folder)


def test_a_set_of_the_first_format_is_not_called_damaged(tmp_path):
    folder = label_set(tmp_path / "labels")
    write_json(folder / "label_set.json", read_json(folder / "label_set.json") | {"format_version": 1})
    with pytest.raises(DataError, match="format version 1, this code reads 2"):
        measure_labels(folder)


def test_the_demo_table_has_every_column_filled(tmp_path):
    label_set(tmp_path / "data" / "labels")
    none = exp_dir(tmp_path / "exp" / "none", [result("dev", 10), result("test", 20)])
    mvq = exp_dir(
        tmp_path / "exp" / "mvq",
        [result("dev", 5), result("test", 9)],
        kd="mvq",
        label_dir=["data/labels"],
        seconds=1234.4,
    )
    header, cells = demo_table(build_rows([read_run(none), read_run(mvq)]))
    assert header == [
        "system", "parameters", "labels", "label bytes per hour", "ratio to float32", "WER dev", "WER test", "seconds",
    ]  # fmt: skip
    assert cells[0][:5] == ["student without KD", "1,234,567", "none", "0", "0"]
    assert cells[0][5].startswith("6.25 % (") and cells[0][6].startswith("12.50 % (")
    storage = measure_labels(tmp_path / "data" / "labels")
    assert cells[1][2:5] == ["8 codebooks", f"{storage.bytes_per_hour:,.0f}", f"{100 * storage.ratio:.3g} %"]
    assert cells[1][-1] == "1,234"
    # The numbers outlive the label set.
    for file in (tmp_path / "data" / "labels").iterdir():
        file.unlink()
    assert demo_table(build_rows([read_run(none), read_run(mvq)]))[1] == cells


def test_runs_that_differ_in_the_seed_alone_are_pooled(tmp_path):
    folders = [exp_dir(tmp_path / f"s{s}", [result(wrong=w)], seed=s) for s, w in ((1, 8), (2, 12), (3, 16))]
    other = exp_dir(tmp_path / "other", [result(wrong=4)], seed=1, dropout=0.3)
    rows = build_rows([read_run(f) for f in (*folders, other)])
    assert [len(row.runs) for row in rows] == [3, 1]
    rate = rows[0].rate("test")
    assert rate.value == pytest.approx(100 * 36 / (3 * 160))
    assert rate.low < rate.value < rate.high
    assert [row.system for row in rows] == ["student without KD (s1)", "student without KD (other)"]
    _, cells = full_table(rows)
    assert cells[0][1:3] == ["epoch-2_avg-1", "1, 2, 3"]


def nar_dir(root, name, seed, wrong, parameters=1000, **options):
    """Write an exp_dir of --system nar with a decoding of the teacher or two of a student."""
    student = options.setdefault("attention_decoder", "mlm") == "mlm"
    both = zip(("mask_predict", "nar_beam_search") if student else ("joint_beam_search",), wrong, strict=True)
    found = [
        result("dev", w, suffix=m, method=m) | {"parameters": parameters, "rtf": 0.01 * seed}
        | ({"masked_share": 0.1 * seed} if student else {})
        for m, w in both
    ]  # fmt: skip
    return exp_dir(root / f"{name}-seed{seed}", found, seed=seed, system="nar", **options)


def test_rows_of_nar_are_named_by_what_helped_and_compared_with_scratch_of_their_size(tmp_path):
    folders = []
    for seed in (1, 2):
        folders.append(nar_dir(tmp_path, "teacher", seed, [4], attention_decoder="ar"))
        folders.append(nar_dir(tmp_path, "scratch", seed, [20, 16]))
        # Each seed has a teacher of its own; what it gives does not make another experiment of it.
        given = {"init_from": f"exp/teacher-seed{seed}", "label_dir": [f"labels/teacher-seed{seed}-nbest"]}
        given |= {"ctc_kd_scale": 0.2, "nbest_ctc_scale": 0.3}
        folders.append(nar_dir(tmp_path, "transfer-both", seed, [15, 16], **given))
        size = {"parameters": 110, "encoder_dim": 48}
        folders.append(nar_dir(tmp_path, "small", seed, [30, 30], **size))
        folders.append(nar_dir(tmp_path, "small-frame", seed, [24, 33], **size, token_kd_scale=0.5))
    rows = build_rows([read_run(f) for f in folders])
    header, cells = nar_table(rows)
    lines = [dict(zip(header, line, strict=True)) for line in cells]
    assert [(x["system"], x["search"]) for x in lines] == [
        ("AR", "joint_beam_search"),
        *[("NAR", m) for m in ("mask_predict", "nar_beam_search")],
        *[("NAR + transfer + frame and sequence KD", m) for m in ("mask_predict", "nar_beam_search")],
        *[("small NAR", m) for m in ("mask_predict", "nar_beam_search")],
        *[("small NAR + frame KD", m) for m in ("mask_predict", "nar_beam_search")],
    ]
    assert {x["seeds"] for x in lines} == {"1, 2"}
    # 20 to 15, 16 to 16; of the small ones 30 to 24, 30 to 33.
    assert [x["relative change dev"] for x in lines] == [
        "-", "-", "-", "-25.0 %", "+0.0 %", "-", "-", "-20.0 %", "+10.0 %",
    ]  # fmt: skip
    assert [x["masked dev"] for x in lines] == ["-", *["15.0 %"] * 8]
    assert lines[1]["WER dev"].startswith("12.50 % (") and {x["RTF"] for x in lines} == {"0.0100"}
    assert [x["labels"] for x in lines if x["search"] == "mask_predict"] == ["none", "not found", "none", "not found"]


def hkd_dir(root, name, seed, wrong, **options):
    """Write an exp_dir of --system hkd with two decodings."""
    both = zip(("cif_greedy_search", "cif_beam_search"), wrong, strict=True)
    found = [result("dev", w, suffix=m, method=m) for m, w in both]
    folder = exp_dir(root / f"{name}-seed{seed}", found, seed=seed, system="hkd", **options)
    covered = {"utterances": 200, "aligned": 190, "missing": 0, "misaligned": 10, "unit": "token"}
    summary = read_json(folder / "train_summary.json") | {"text_coverage": covered if "text_kd" in options else None}
    write_json(folder / "train_summary.json", summary)
    return folder


def test_rows_of_hkd_name_the_language_model_and_are_compared_with_cif(tmp_path):
    plain = asdict(LabelSetInfo.load(label_set(tmp_path / "labels" / "real")))
    label_set(tmp_path / "labels" / "random")
    models = (("real", "/models/some-lm", "folder"), ("random", "tiny", "random weights, not trained"))
    for name, teacher, source in models:
        more = {"kind": "text_states", "key_kind": "text", "frame_formula": {}, "teacher": teacher}
        write_json(tmp_path / "labels" / name / "label_set.json", plain | more | {"origin": {"source": source}})
    real, random = ({"label_dir": [f"labels/{name}"]} for name in ("real", "random"))
    folders = []
    for seed in (1, 2):
        folders.append(hkd_dir(tmp_path, "cif", seed, [20, 16]))
        folders.append(hkd_dir(tmp_path, "acd", seed, [15, 16], text_kd=["acd"], **real))
        folders.append(hkd_dir(tmp_path, "lrd", seed, [22, 12], text_kd=["lrd"], **random))
        folders.append(hkd_dir(tmp_path, "both", seed, [10, 8], text_kd=["acd", "lrd"], **real))
    header, cells = hkd_table(build_rows([read_run(f) for f in folders]))
    lines = [dict(zip(header, line, strict=True)) for line in cells]
    assert [line["system"] for line in lines[::2]] == [
        "CIF", "CIF + ACD (some-lm)", "CIF + LRD (tiny, RANDOM weights)", "CIF + ACD + LRD (some-lm)",
    ]  # fmt: skip
    changes = {
        s: [x["relative change dev"] for x in lines if x["search"] == f"cif_{s}_search"] for s in ("greedy", "beam")
    }
    assert changes["greedy"] == ["-", "-25.0 %", "+10.0 %", "-50.0 %"]  # from 20 to 15, 22 and 10
    assert changes["beam"] == ["-", "+0.0 %", "-25.0 %", "-50.0 %"]  # from 16 to 16, 12 and 8
    assert {line["seeds"] for line in lines} == {"1, 2"}
    storage = measure_labels(tmp_path / "labels" / "real")
    assert [line["label bytes per hour"] for line in lines[:3:2]] == ["0", f"{storage.bytes_per_hour:,.0f}"]
    assert [line["coverage"] for line in lines[:3:2]] == ["-", "95.0 %"]


def test_a_scale_of_nothing_is_no_distillation(tmp_path):
    folder = hkd_dir(tmp_path, "acd", 1, [3, 3], text_kd=["acd"], acd_scale=0.0)
    assert {row.system for row in build_rows([read_run(folder)])} == {"CIF"}


def test_modes_of_one_checkpoint_are_rows_that_are_compared_with_their_own_kind(tmp_path):
    def mode(wrong, name, chunk=-1, sparse=False):
        told = {"encoder_mode": name, "sparse": sparse, "chunk_size": chunk, "parameters": 1000}
        told |= {"nonzeros": 400 if sparse else 1000, "model_bytes": 1_700_000 if sparse else 4_000_000}
        told["algorithmic_latency"] = None if chunk < 0 else 0.04 * chunk + 0.0575
        return result("dev", wrong, suffix=f"epoch-2_avg-1_chunk-{chunk}_sparse-{sparse}") | told

    def folder(name, wrong, **options):
        chunks = [mode(n, "streaming", chunk, True) for chunk, n in ((16, wrong[1]), (8, wrong[2])) if n is not None]
        whole = [mode(wrong[0], "full")] if wrong[0] is not None else []
        options = {"streaming": True, "convolution": "chunk", "system": "dualmode"} | options
        return exp_dir(tmp_path / name, [*chunks, *whole], **options)

    ssl = {"init_from": "exp/ssl-dual", "sparsity": 0.7}
    folders = [
        folder("a1", [8, None, None], modes="full"),
        folder("a3", [None, 20, 24], modes="streaming", sparsity=0.7),
        folder("c2", [12, 16, 16], **ssl),
    ]
    header, cells = dual_table(build_rows([read_run(f) for f in folders]))
    lines = [dict(zip(header, line, strict=True)) for line in cells]
    assert [(x["system"].split()[0], x["mode"], x["weights"], x["latency"]) for x in lines] == [
        ("A1", "full", "dense", "utterance"),
        ("A3", "streaming, 320 ms", "sparse", "377.5 ms"),
        ("A3", "streaming, 640 ms", "sparse", "697.5 ms"),
        ("C2", "full", "dense", "utterance"),
        ("C2", "streaming, 320 ms", "sparse", "377.5 ms"),
        ("C2", "streaming, 640 ms", "sparse", "697.5 ms"),
    ]
    # Of 160 words: from 8 to 12 errors, from 24 to 16, from 20 to 16; the first of a kind is compared with nothing.
    assert [x["difference dev"].split(" (")[0] for x in lines] == ["-", "-", "-", "A1 +2.50", "A3 -5.00", "A3 -2.50"]
    assert (lines[5]["non-zeros"], lines[5]["MB float32"], lines[3]["MB float32"]) == ("400", "1.70", "4.00")
    other = folder("free", [8, None, None], modes="dual", init_from="elsewhere/some-run")
    (row,) = build_rows([read_run(other)])
    assert row.system == "both modes, some-run pre-training"  # no experiment of the list


def test_students_of_hubert_are_named_by_what_they_learnt_and_compared_with_those_that_learnt_less(tmp_path):
    losses = {"objective": "distil", "rec_scale": 1.0, "cos_scale": 1.0, "disc_type": "type2", "frontend_steps": 0}
    losses |= {"system": "hubert", "structure": "deep_thin", "front_end": "waveform"}
    for name, more in {
        "reg": {"disc_scale": 0},
        "both": {"disc_scale": 1.0},
        "disc": {"disc_scale": 1.0, "rec_scale": 0, "cos_scale": 0, "disc_type": "type1"},
        "one": {"disc_scale": 0, "front_end": "fbank"},
        "two": {"disc_scale": 0, "front_end": "fbank", "frontend_steps": 0.2},
        "ssl": {"objective": "ssl"},
    }.items():
        exp_dir(tmp_path / f"exp/{name}", [], **losses | more)

    def tuned(start, amount, wrong, seeds=(1,), **options):
        more = {"train_parts": [f"data/hours/cuts_train_{amount}.jsonl.gz"], "init_from": start and f"exp/{start}"}
        more |= {"system": "hubert", "structure": "deep_thin", "front_end": "waveform", **options}
        found = []
        for seed in seeds:
            folder = tmp_path / f"exp/{start}-{amount}-{options.get('front_end')}-seed{seed}"
            found.append(exp_dir(folder, [result("dev", wrong)], seed=seed, **more))
        return found

    log_mel = {"front_end": "fbank"}
    folders = [
        *tuned("both", "10h", 4), *tuned("reg", "10h", 6), *tuned(None, "10h", 10),
        *tuned(None, "1h", 24, (1, 2)), *tuned("reg", "1h", 16, (1, 2)), *tuned("both", "1h", 8, (1, 2)),
        *tuned("disc", "1h", 20, (1, 2)), *tuned("one", "1h", 16, **log_mel), *tuned("two", "1h", 12, **log_mel),
        *tuned("ssl", "1h", 2, structure="base"), *tuned("gone", "1h", 2, structure="base"),
    ]  # fmt: skip
    header, cells = hubert_table(build_rows([read_run(f) for f in folders]))
    lines = [dict(zip(header, line, strict=True)) for line in cells]
    # Of 160 words: 24 errors to 16 are 5 points less.
    shown = ("model", "learnt", "transcripts", "seeds", "difference dev")
    for line in lines:
        line["difference dev"] = line["difference dev"].split(" (")[0]
    assert [tuple(line[name] for name in shown) for line in lines] == [
        ("deep thin", "from scratch", "1h", "1, 2", "-"),
        ("deep thin", "L_reg", "1h", "1, 2", "from scratch -5.00"),
        ("deep thin", "L_reg + L_disc (type2)", "1h", "1, 2", "L_reg -5.00"),
        ("deep thin", "L_disc (type1)", "1h", "1, 2", "L_reg +2.50"),
        ("deep thin log-mel", "one stage, L_reg", "1h", "1", "-"),
        ("deep thin log-mel", "two stages, L_reg", "1h", "1", "-"),
        ("HuBERT", "pre-trained", "1h", "1", "-"),
        ("HuBERT", "from gone", "1h", "1", "-"),
        ("deep thin", "L_reg + L_disc (type2)", "10h", "1", "L_reg -1.25"),
        ("deep thin", "L_reg", "10h", "1", "from scratch -2.50"),
        ("deep thin", "from scratch", "10h", "1", "-"),
    ]
    assert lines[0]["parameters"] == "1,234,567" and lines[0]["WER dev"].startswith("15.00 % (")


def test_seeds_that_share_one_teacher_are_one_experiment(tmp_path):
    given = {"init_from": "exp/other/teacher-seed1", "label_dir": ["labels/other-teacher-seed1-nbest"]}
    given |= {"nbest_ctc_scale": 0.3}
    folders = [nar_dir(tmp_path, "transfer-sequence", seed, [4, 2], **given) for seed in (1, 2)]
    rows = build_rows([read_run(f) for f in folders])
    assert [[run.seed for run in row.runs] for row in rows] == [[1, 2], [1, 2]]
    assert {row.system for row in rows} == {"NAR + transfer + sequence KD"}


def test_other_options_of_a_search_are_shown_and_only_equal_ones_compared(tmp_path):
    def decodings(name, first_epoch, wrong):
        five, ten = (f"epoch-{first_epoch}_avg-3_nar_beam_search_beam-size-{beam}_passes-10" for beam in (5, 10))
        found = [result("dev", w, suffix=s, method="nar_beam_search") for w, s in zip(wrong, (five, ten), strict=True)]
        options = {"system": "nar", "attention_decoder": "mlm", "dropout": 0.1 * first_epoch}
        return exp_dir(tmp_path / name, found, **options, **({"init_from": "t"} if name == "transfer" else {}))

    header, cells = nar_table(
        build_rows([read_run(decodings("scratch", 6, [20, 10])), read_run(decodings("transfer", 4, [10, 9]))])
    )
    lines = [dict(zip(header, line, strict=True)) for line in cells]
    changes = [(x["decoding"].split("beam-size-")[1], x["relative change dev"]) for x in lines]
    ten, five = "10_passes-10", "5_passes-10"
    assert changes == [(ten, "-"), (five, "-"), (ten, "-10.0 %"), (five, "-50.0 %")]


def test_a_list_has_no_plain_form_to_be_compared_with(tmp_path):
    info = asdict(LabelSetInfo.load(label_set(tmp_path / "labels"))) | {"kind": "nbest", "extra": {"vocab_size": 9}}
    write_json(tmp_path / "labels" / "label_set.json", info)
    folder = nar_dir(tmp_path, "small", 1, [3, 3], nbest_ctc_scale=0.5, label_dir=["labels"])
    kinds, _, ratio = build_rows([read_run(folder)])[0].label_texts()
    assert (kinds, ratio) == ("n-best", "?")


def test_seeds_that_were_not_decoded_are_not_claimed(tmp_path):
    beam = result(suffix="beam", method="modified_beam_search")
    found = {1: [result(), result("dev"), beam], 2: [result()], 3: []}
    rows = build_rows([read_run(exp_dir(tmp_path / f"s{s}", results, seed=s)) for s, results in found.items()])
    header, cells = full_table(rows)
    seeds = {line[header.index("decoding")]: line[header.index("seeds")] for line in cells}
    assert seeds == {"epoch-2_avg-1": "1, 2", "beam": "1", "not decoded": "3"}
    dev, test = (cells[0][header.index(f"WER {part}")] for part in ("dev", "test"))
    assert dev.endswith("), 1 of 2 seeds") and test.endswith(")")


def test_the_same_seed_twice_is_refused(tmp_path):
    folders = [exp_dir(tmp_path / name, [result()]) for name in "ab"]
    with pytest.raises(ConfigError, match=r"seeds \[1, 1\]"):
        build_rows([read_run(f) for f in folders])


def test_each_decoding_has_a_row_and_can_be_chosen(tmp_path):
    beam = result(wrong=6, suffix="epoch-2_avg-1__modified_beam_search", method="modified_beam_search")
    folder = exp_dir(tmp_path / "x", [result(), beam])
    rows = build_rows([read_run(folder)])
    header, cells = demo_table(rows)
    assert header[1] == "search"
    assert [line[1] for line in cells] == ["greedy_search", "modified_beam_search"]
    (row,) = build_rows([read_run(folder, decoding_method="modified_beam_search")])
    assert row.rate("test").value == pytest.approx(100 * 6 / 160)
    (row,) = build_rows([read_run(folder, suffix="nothing")])
    assert row.decoding == "not decoded" and row.rate("test") is None


def test_a_difference_in_utterances_or_references_is_refused_by_name():
    a = result()
    with pytest.raises(DataError, match=r"mine and theirs differ in 1 utterances, the first are \['u39'\]"):
        stack_utterances([a, result(refs=REFS[:-1], ids=IDS[:-1])], ["mine", "theirs"])
    changed = [*REFS[:-1], "W39 A B D"]
    with pytest.raises(DataError, match=r"other references for 1 utterances, the first are \['u39'\]"):
        stack_utterances([a, result(refs=changed)], ["mine", "theirs"])
    with pytest.raises(DataError, match="counts in words, theirs in chars"):
        stack_utterances([a, result(unit="char")], ["mine", "theirs"])


def test_comparison_pools_seeds():
    a, b = [result(wrong=20), result(wrong=16)], [result(wrong=4), result(wrong=2)]
    outcome = compare(a, b, list("abcd"), 500)
    assert outcome.a.value == pytest.approx(100 * 36 / 320)
    assert outcome.difference.value == pytest.approx(100 * (6 - 36) / 320)
    assert outcome.difference.high < 0 and outcome.probability_of_improvement == 1.0


def test_blocks_are_replaced_between_their_markers_alone():
    text = replace_block("# Title\n", "a", "one")
    text = replace_block(text, "b", "two") + "\ntail\n"
    again = replace_block(text, "a", "three")
    assert again == text.replace("one", "three")
    assert replace_block(again, "a", "three") == again
    with pytest.raises(DataError, match="restore them"):
        replace_block("<!-- results:a end -->", "a", "x")


def test_details_hold_commands_seeds_and_git_state(tmp_path):
    rows = build_rows([read_run(exp_dir(tmp_path / "x", [result()], seed=7))])
    text = details(rows)
    for part in (
        "Seed 7, commit 0123456789",
        "train.py --exp-dir 'a folder'",
        "decode.py --epoch 2",
        "8 errors in 160",
    ):
        assert part in text
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def run_script(name, *args):
    """Run a script of local/ in a Python where torch cannot be imported."""
    code = f"import sys, runpy; sys.modules['torch'] = None; sys.argv[0] = {name!r}; "
    code += f"runpy.run_path({str(REPO / 'local' / name)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)


def test_the_script_prints_and_writes_the_same_table_twice_without_torch(tmp_path):
    folders = [exp_dir(tmp_path / "none", [result("dev"), result()]), exp_dir(tmp_path / "l2", [result()], kd="l2")]
    out, data = tmp_path / "results" / "demo.md", tmp_path / "rows.json"
    args = ["--exp-dirs", ",".join(map(str, folders)), "--table", "demo", "--out", out, "--json", data]
    first = run_script("results.py", *args)
    assert first.returncode == 0, first.stderr
    assert first.stdout in out.read_text()
    before = out.stat().st_mtime_ns
    second = run_script("results.py", *args)
    assert (second.stdout, out.stat().st_mtime_ns) == (first.stdout, before)
    assert read_json(data)[0]["error_rates"]["test"]["value"] == pytest.approx(5.0)
    assert "utterances" not in read_json(data)[0]["decodings"]["test"][0]


def test_the_comparison_script_prints_each_part_and_refuses_ambiguity(tmp_path):
    a = exp_dir(tmp_path / "a", [result("dev", 20), result("test", 20)])
    b = exp_dir(tmp_path / "b", [result("test", 19)])
    done = run_script("compare.py", "--a", a, "--b", b, "--bootstrap", 200, "--out", tmp_path / "c.json")
    assert done.returncode == 0, done.stderr
    assert "test: %WER on 40 utterances, 1 and 1 decodings" in done.stdout
    assert "dev:" not in done.stdout
    assert read_json(tmp_path / "c.json")["comparisons"][0]["difference"]["value"] == pytest.approx(-100 / 160)
    exp_dir(tmp_path / "a", [result(suffix="epoch-1_avg-1")])
    refused = run_script("compare.py", "--a", a, "--b", b)
    assert refused.returncode == 2
    assert "--suffix: epoch-1_avg-1, epoch-2_avg-1" in refused.stderr


def test_a_missing_exp_dir_ends_in_its_name(tmp_path):
    done = run_script("results.py", "--exp-dirs", tmp_path / "nowhere")
    assert done.returncode == 4
    assert "nowhere" in done.stderr
