"""Decoding whole parts: files, records, timing, with a system that recognises what it is told."""

import json
import math
from pathlib import Path

import pytest
import torch

from icefall_kd.config import DecodeConfig
from icefall_kd.data.batch import Batch
from icefall_kd.decode.base import Hypothesis
from icefall_kd.decode.ctc import CtcGreedySearch
from icefall_kd.decode.runner import Decoded, decode_parts, score_decoded
from icefall_kd.decode.suffix import decode_suffix
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.scoring import read_recogs
from icefall_kd.systems.base import System
from icefall_kd.text.tokenizer import Tokenizer

TEXTS = {"u3": "THE CAT SAT", "u1": "A DOG", "u2": "THE DOG RAN"}
# u1 loses nothing, u2 has one substitution, u3 one insertion and one deletion.
HEARD = {"u3": "SO THE CAT", "u1": "A DOG", "u2": "THE CAT RAN"}


class Parrot(System):
    """A system whose encoder output is the logits of HEARD, a blank after each token."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.ctc_output = torch.nn.Identity()
        self.encoded = []

    def encode(self, batch):
        self.encoded.append(batch.ids)
        paths = [[i for t in self.tokenizer.encode(HEARD[u]) for i in (t, 0)] for u in batch.ids]
        lens = torch.tensor([len(p) for p in paths])
        x = torch.zeros(len(paths), int(lens.max()), self.tokenizer.vocab_size)
        for row, path in zip(x, paths, strict=True):
            row[range(len(path)), path] = 30.0
        return x, lens

    def decoders(self):
        return {"ctc_greedy_search": lambda config: CtcGreedySearch.from_config(self, config)}


@pytest.fixture
def tokenizer():
    return Tokenizer.train_char([*TEXTS.values(), *HEARD.values()])


def batches(texts=TEXTS):
    groups = [["u3", "u1"], ["u2"]]
    for ids in groups:
        yield Batch(ids=ids, texts=[texts[i] for i in ids], durations=[2.0] * len(ids))


def decode(tmp_path, tokenizer, unit="auto", **kwargs):
    system = Parrot(tokenizer)
    config = DecodeConfig(
        exp_dir=tmp_path, decoding_method="ctc_greedy_search", epoch=3, avg=2, unit=unit, bootstrap=50
    )
    results = decode_parts(system, tokenizer, {"test": batches(**kwargs)}, config, files_used="epoch-3.pt")
    return system, results["test"], tmp_path / "ctc_greedy_search"


def test_a_part_leaves_all_files_with_consistent_content(tmp_path, tokenizer, capsys):
    _, result, folder = decode(tmp_path, tokenizer)
    name = "test-epoch-3_avg-2_ctc_greedy_search_use-averaged-model"
    written = {p.name for p in folder.iterdir()}
    assert written == {
        f"{kind}-{name}.{ext}"
        for kind, ext in (
            ("recogs", "txt"),
            ("errs", "txt"),
            ("wer-summary", "txt"),
            ("nbest", "jsonl"),
            ("results", "json"),
        )
    }
    ids, refs, hyps = read_recogs(folder / f"recogs-{name}.txt")
    assert ids == ["u1", "u2", "u3"]
    assert [" ".join(r) for r in refs] == [TEXTS[i] for i in ids]
    assert [" ".join(h) for h in hyps] == [HEARD[i] for i in ids]
    assert json.loads((folder / f"results-{name}.json").read_text()) == result
    assert (result["errors"], result["ins"], result["del"], result["sub"], result["num_ref"]) == (3, 1, 1, 1, 8)
    assert result["error_rate"] == pytest.approx(37.5)
    assert result["interval"][0] <= 37.5 <= result["interval"][1]
    assert result["utterances"]["sub"] == [0, 1, 0]
    assert result["files_used"] == "epoch-3.pt"
    assert result["tokenizer_hash"] == tokenizer.hash
    assert "[test] %WER 37.50% [3 / 8, 1 ins, 1 del, 1 sub ]" in capsys.readouterr().out
    assert (folder / f"wer-summary-{name}.txt").read_text() == "settings\tWER\nctc_greedy_search\t37.50\n"


def test_the_first_batch_is_run_twice_and_timed_once(tmp_path, tokenizer):
    system, result, _ = decode(tmp_path, tokenizer)
    assert system.encoded == [["u3", "u1"], ["u3", "u1"], ["u2"]]
    assert result["audio_seconds"] == 6.0
    assert 0 < result["rtf"] < result["rtf_with_warm_up"]
    assert result["rtf"] == pytest.approx(result["rtf_encoder"] + result["rtf_search"])


def test_nbest_lines_hold_text_tokens_score_and_frames(tmp_path, tokenizer):
    *_, folder = decode(tmp_path, tokenizer)
    lines = [json.loads(line) for line in next(folder.glob("nbest-*")).read_text().splitlines()]
    assert [line["id"] for line in lines] == ["u1", "u2", "u3"]
    best = lines[0]["nbest"][0]
    assert best["text"] == HEARD["u1"]
    assert best["tokens"] == tokenizer.encode(HEARD["u1"])
    assert best["timestamps"] == list(range(0, 2 * len(best["tokens"]), 2))
    assert best["times"] == pytest.approx([0.04 * t for t in best["timestamps"]])
    assert best["score"] == pytest.approx(0.0, abs=1e-6)


def test_units_other_than_the_tokenizers_can_be_scored(tmp_path, tokenizer):
    *_, char, _ = decode(tmp_path, tokenizer, unit="char")
    assert char["num_ref"] == sum(len(t.replace(" ", "")) for t in TEXTS.values())


def test_tokens_are_scored_as_the_tokenizers_strings(tmp_path):
    texts = [*TEXTS.values(), *HEARD.values()] * 3
    bpe = Tokenizer.train_bpe(texts, 40)
    *_, token, folder = decode(tmp_path, bpe, unit="token")
    assert token["num_ref"] == sum(len(bpe.pieces(t)) for t in TEXTS.values())
    ids, refs, hyps = read_recogs(next(folder.glob("recogs-*")))
    assert refs == [bpe.pieces(TEXTS[i]) for i in ids]
    assert hyps == [bpe.pieces(HEARD[i]) for i in ids]


def test_a_reference_token_that_the_table_lacks_is_an_error(tmp_path):
    pinyin = Tokenizer.train_pinyin(["你好"])
    system = Parrot(pinyin)
    system.encode = lambda batch: (
        torch.nn.functional.one_hot(torch.tensor([[3, 0]]), pinyin.vocab_size) * 9.0,
        torch.tensor([2]),
    )
    config = DecodeConfig(exp_dir=tmp_path, decoding_method="ctc_greedy_search")
    batch = Batch(ids=["u"], texts=["你们"], durations=[1.0])
    result = decode_parts(system, pinyin, {"test": [batch]}, config)["test"]
    assert (result["unit"], result["num_ref"]) == ("token", 4)
    assert result["errors"] >= 3


def test_words_of_a_search_are_scored_instead_of_its_tokens():
    pinyin = Tokenizer.train_pinyin(["中国"])
    tokens = pinyin.encode("中国")
    found = Decoded(ids=["u"], refs=["中国"], nbest=[[Hypothesis(tokens, -1.0, text="中果")]])
    scored = score_decoded(found, pinyin, "char")
    assert (scored.refs, scored.hyps) == ([["中", "国"]], [["中", "果"]])
    assert score_decoded(found, pinyin, "auto").num_errors == 0  # the tokens are right
    found.nbest = [[Hypothesis(tokens, -1.0)]]
    with pytest.raises(ConfigError, match="this model writes pinyin"):
        score_decoded(found, pinyin, "char")


def test_parts_without_transcripts_are_recognised_without_a_rate(tmp_path, tokenizer):
    _, result, folder = decode(tmp_path, tokenizer, texts=dict.fromkeys(TEXTS, ""))
    assert result["error_rate"] is None and result["interval"] is None
    assert [" ".join(h) for h in read_recogs(next(folder.glob("recogs-*")))[2]] == [HEARD[i] for i in sorted(HEARD)]


def test_an_empty_part_and_an_unknown_search_are_refused(tmp_path, tokenizer):
    system = Parrot(tokenizer)
    config = DecodeConfig(exp_dir=tmp_path, decoding_method="ctc_greedy_search")
    with pytest.raises(DataError, match="part dev has no utterance"):
        decode_parts(system, tokenizer, {"dev": iter(())}, config)
    with pytest.raises(ConfigError, match="this model offers ctc_greedy_search"):
        decode_parts(system, tokenizer, {"dev": iter(())}, DecodeConfig(exp_dir=tmp_path))


@pytest.mark.parametrize(
    ("options", "used", "expected"),
    [
        ({"epoch": 30, "avg": 9}, "", "epoch-30_avg-9_context-2_max-sym-per-frame-1_use-averaged-model"),
        (
            {"epoch": 30, "avg": 9, "decoding_method": "modified_beam_search"},
            "",
            "epoch-30_avg-9__modified_beam_search__beam-size-4_use-averaged-model",
        ),
        (
            {"iter": 4000, "use_averaged_model": False, "decoding_method": "ctc_greedy_search"},
            "",
            "iter-4000_avg-1_ctc_greedy_search",
        ),
        (
            {"use_averaged_model": False, "blank_penalty": 0.5},
            "average of all steps after epoch-4.pt up to epoch-7.pt",
            "epoch-7_avg-1_context-2_max-sym-per-frame-1_blank-penalty-0.5",
        ),
        (
            {"weights": Path("x/best-3.safetensors")},
            "best-3.safetensors",
            "weights-best-3_context-2_max-sym-per-frame-1",
        ),
        (
            {"decoding_method": "modified_beam_search", "lm": Path("lm/lstm/lm.safetensors"), "epoch": 2},
            "",
            "epoch-2_avg-1__modified_beam_search__beam-size-4_lm-lstm-scale-0.3_use-averaged-model",
        ),
    ],
)
def test_suffixes_follow_icefall(options, used, expected):
    assert decode_suffix(DecodeConfig(**options), used, context_size=2) == expected


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fast_beam_search", {"temperature": 2.0}),
        ("fast_beam_search", {"max_contexts": 4}),
        ("fast_beam_search_LG", {"lang_dir": Path("data/with_more_text")}),
        ("ctc_decoding_HLG", {"lang_dir": Path("data/with_more_text")}),
        ("ctc_decoding_nbest_HLG", {"nbest_scale": 0.3}),
        ("greedy_search", {"weights": Path("exp/last-3-up-to-epoch-7.safetensors")}),
    ],
)
def test_another_option_leaves_other_files(method, options):
    first = {"decoding_method": method, "lang_dir": Path("data/lang_char"), "weights": Path("exp/epoch-7.safetensors")}
    one, other = (decode_suffix(DecodeConfig(**{**first, **more}), "epoch-7") for more in ({}, options))
    assert one != other and "avg" not in one + other  # what weights are an average of, their name says


def test_no_nan_gets_into_json(tmp_path, tokenizer):
    _, result, _ = decode(tmp_path, tokenizer, texts=dict.fromkeys(TEXTS, ""))
    numbers = [v for v in result.values() if isinstance(v, float)]
    assert all(math.isfinite(v) for v in numbers)
