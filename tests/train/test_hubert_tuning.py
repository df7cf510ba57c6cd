"""Fine-tuning through train.py: few transcripts of a corpus, a distilled student, and decode.py with a lexicon."""

import pytest
from hubert_asr_toys import hubert_config, pretrained, write_cmvn
from hubert_toys import arguments
from micro_corpus import WORDS, write_corpus

from icefall_kd.config import DecodeConfig
from icefall_kd.data.hours import select_hours
from icefall_kd.data.manifests import read_cuts
from icefall_kd.recipe import decode, train_main
from icefall_kd.runtime.files import read_json
from icefall_kd.text.lexicon import Lexicon
from icefall_kd.text.ngram import estimate
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.metrics import read_metrics


def test_a_student_is_tuned_on_few_transcripts_and_decoded(tmp_path):
    folder = write_corpus(tmp_path / "corpus", num_train=8)
    few = select_hours(folder / "fbank", "train", ["4s"], seed=1)["4s"]
    student, exp_dir = tmp_path / "student", tmp_path / "exp"
    cmvn = write_cmvn(tmp_path / "cmvn.safetensors")
    pretrained(student, "deep_thin_fbank", cmvn)
    config = hubert_config(
        "deep_thin_fbank",
        tune={"freeze_steps": 0.5, "time_mask_prob": 0.3, "time_mask_span": 4},
        optim={"lr_schedule": "tri_stage"},
        data={"manifest_dir": folder / "fbank", "lang_dir": folder / "lang_char", "train_parts": ["train_4s"]},
        exp_dir=exp_dir,
        init_from=student,
        num_epochs=4,
    )
    assert train_main(arguments(config)) == 0
    steps = [record for record in read_metrics(exp_dir / "log/metrics.jsonl", "train")]
    peak = max(record["lr"] for record in steps)
    assert peak == 0.002 and steps[0]["lr"] == pytest.approx(0.01 * peak) and steps[-1]["lr"] < peak
    assert read_json(exp_dir / "transfer.json")["loaded"] > 20
    lang = folder / "lang_char"
    Lexicon.from_texts(WORDS, Tokenizer.load(lang)).write(lang)
    estimate([text.split() for text in WORDS], 2).write(lang / "lm.arpa")
    common = {"exp_dir": exp_dir, "manifest_dir": folder / "fbank", "test_parts": ["dev"], "device": "cpu"}
    lexicon = {"decoding_method": "ctc_lexicon_beam", "lang_dir": lang, "word_lm": lang / "lm.arpa"}
    for options in ({"decoding_method": "ctc_greedy_search"}, lexicon):
        result = decode(DecodeConfig(**common, **options))["dev"]
        assert len(result["utterances"]["ids"]) == len(read_cuts(folder / "fbank/cuts_dev.jsonl.gz")) == 3
    assert len(read_cuts(few)) < 8
