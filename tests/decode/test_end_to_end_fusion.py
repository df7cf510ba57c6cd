"""decode.py with language models, hot words and times, and the scripts around it, on a tiny corpus."""

import json
from pathlib import Path

import pytest
import soundfile
import torch
from micro_corpus import write_corpus
from run_script import script
from students import SIZES, STUDENTS, babble, load, tokenizer_of, write_student

from icefall_kd.cli import config_to_dict
from icefall_kd.config import DecodeConfig, LoopConfig, ModelConfig, TrainConfig
from icefall_kd.decode.alignment import forced_alignments, read_ctm
from icefall_kd.errors import ConfigError
from icefall_kd.recipe import decode, part_batches
from icefall_kd.runtime.files import read_json
from icefall_kd.systems import build_system
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.checkpoint import save_checkpoint
from icefall_kd.train.state import write_config

METHOD = "modified_beam_search"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A corpus of noise, an untrained tiny student that emits often, and both kinds of language model."""
    root = write_corpus(tmp_path_factory.mktemp("fusion"))
    tokenizer = Tokenizer.load(root / "lang_char")
    tokenizer.save(root / "exp/tokenizer")
    model = ModelConfig(encoder_size="tiny", num_encoder_layers=1, encoder_dim=16, feedforward_dim=16, decoder_dim=16)
    config = TrainConfig(model=model, loop=LoopConfig(exp_dir=root / "exp"))
    write_config(root / "exp", config, 0)
    torch.manual_seed(3)
    system = build_system(config, tokenizer.vocab_size)
    with torch.no_grad():
        system.model.joiner.output_linear.weight.mul_(5)
    state = system.state_dict()
    averages = {name: value.double() for name, value in state.items()}
    content = {"model": state, "model_avg": averages, "train": {"step": 9, "average_period": 3}}
    save_checkpoint(
        root / "exp/epoch-1.pt", content | {"config": config_to_dict(config), "tokenizer_hash": tokenizer.hash}
    )
    cuts = root / "manifests/cuts_train.jsonl.gz"
    for order in (2, 3):
        out = root / f"lm/tokens_{order}gram.arpa"
        script("make_ngram.py", "--cuts", cuts, "--order", order, "--lang-dir", root / "lang_char", "--out", out)
    sizes = ["--lm-embedding-dim", 8, "--lm-hidden-dim", 8, "--num-epochs", 2, "--device", "cpu"]
    script("train_lm.py", "--cuts", cuts, "--lang-dir", root / "lang_char", "--exp-dir", root / "lm/lstm", *sizes)
    (root / "hot.txt").write_text("wh :4\n")
    return root


def options(root: Path, **changes) -> DecodeConfig:
    base = {"exp_dir": root / "exp", "manifest_dir": root / "fbank", "test_parts": ["dev"], "device": "cpu"}
    base |= {"decoding_method": METHOD, "use_averaged_model": False, "nbest": 2, "bootstrap": 0}
    return DecodeConfig(**base | changes)


def nbest(root: Path, result: dict) -> list[list[tuple]]:
    text = (root / f"exp/{METHOD}/nbest-dev-{result['suffix']}.jsonl").read_text()
    return [[(h["text"], h["score"]) for h in json.loads(line)["nbest"]] for line in text.splitlines()]


def test_each_kind_of_fusion_decodes_to_files_of_its_own(trained):
    lm = trained / "lm"
    kinds = {
        "": {},
        "lm-tokens_3gram-scale-0.5": {"lm": lm / "tokens_3gram.arpa", "lm_scale": 0.5},
        "lm-lstm-scale-0.3": {"lm": lm / "lstm"},
        "lm-lstm-scale-0.3_lodr-tokens_2gram-scale--0.2": {
            "lm": lm / "lstm", "lodr_arpa": lm / "tokens_2gram.arpa", "lodr_scale": -0.2,
        },
        "hotwords-hot-score-1.5": {"hotwords": trained / "hot.txt"},
    }  # fmt: skip
    found = {}
    for name, changes in kinds.items():
        result = decode(options(trained, **changes))["dev"]
        assert result["suffix"] == f"epoch-1_avg-1__{METHOD}__beam-size-4" + (f"_{name}" if name else "")
        found[name] = nbest(trained, result)
    assert len({str(hyps) for hyps in found.values()}) == len(kinds)
    assert decode(options(trained, lm=lm / "lstm", lm_scale=0.0))["dev"]["suffix"].endswith("lm-lstm-scale-0.0")
    zero = next((trained / f"exp/{METHOD}").glob("nbest-dev-*lm-lstm-scale-0.0.jsonl"))
    plain = trained / f"exp/{METHOD}/nbest-dev-epoch-1_avg-1__{METHOD}__beam-size-4.jsonl"
    assert zero.read_bytes() == plain.read_bytes()


def test_a_language_model_of_words_or_with_greedy_search_is_refused(trained):
    words = trained / "lm/words.arpa"
    script("make_ngram.py", "--cuts", trained / "manifests/cuts_train.jsonl.gz", "--out", words)
    with pytest.raises(ConfigError, match="n-gram model of words"):
        decode(options(trained, lm=words))
    with pytest.raises(ConfigError, match="--hotwords with --decoding-method greedy_search"):
        options(trained, hotwords=words, decoding_method="greedy_search")


def test_times_go_into_nbest_and_ctm_and_the_delay_script_reads_them(trained):
    result = decode(options(trained, ctm=True))["dev"]
    folder, name = trained / f"exp/{METHOD}", f"dev-{result['suffix']}"
    lines = [json.loads(line) for line in (folder / f"nbest-{name}.jsonl").read_text().splitlines()]
    words = read_ctm(folder / f"ctm-{name}.ctm")
    assert any(words.values())
    for line in lines:
        best = line["nbest"][0]
        assert best["times"] == pytest.approx([0.04 * t for t in best["timestamps"]])
        timed = words.get(line["id"], [])
        assert [w.unit for w in timed] == best["text"].split()
        for w in timed:
            frames = {round(w.begin / 0.04), round(w.end / 0.04) - 1}
            assert frames <= set(best["timestamps"])
    # Against its own CTM file every word is on time.
    common = ["emission_delay.py", "--exp-dir", trained / "exp", "--nbest", folder / f"nbest-{name}.jsonl"]
    out = trained / "delay.json"
    printed = script(*common, "--ctm", folder / f"ctm-{name}.ctm", "--out", out)
    (summary,) = read_json(out)
    count = sum(map(len, words.values()))
    assert (summary["count"], summary["spoken"], summary["unit"]) == (count, count, "words")
    assert [summary[k] for k in ("mean_ms", "median_ms", "p90_ms")] == pytest.approx([0, 0, 0], abs=1e-6)
    assert f"{count} of {count} words recognised" in printed
    # Forced alignment by a CTC head gives times to all tokens of the references.
    script(
        *common, "--align-exp-dir", trained / "exp", "--part", "dev", "--manifest-dir", trained / "fbank",
        "--device", "cpu", "--out", out,
    )  # fmt: skip
    (summary,) = read_json(out)
    assert (summary["spoken"], summary["unit"]) == (len("one two" + "three" + "four"), "tokens")


def test_a_streaming_model_aligns_with_all_that_it_can_hear(tmp_path):
    kind, options = STUDENTS["streaming-chunk"]
    tokenizer = tokenizer_of(kind)
    write_student(tmp_path / "exp", tokenizer, TrainConfig(model=ModelConfig(**SIZES, **options)))
    (tmp_path / "speech").mkdir()
    soundfile.write(tmp_path / "speech/u.wav", babble(40000, 1), 16000)
    (tmp_path / "speech/speech.trans.txt").write_text("u ONE TWO\n")
    tokens = tokenizer.encode("ONE TWO")
    line = {"id": "u", "nbest": [{"tokens": tokens, "timestamps": list(range(len(tokens)))}]}
    (tmp_path / "n.jsonl").write_text(json.dumps(line) + "\n")
    script(
        "emission_delay.py", "--exp-dir", tmp_path / "exp", "--nbest", tmp_path / "n.jsonl", "--point", "begin",
        "--align-exp-dir", tmp_path / "exp", "--part", tmp_path / "speech", "--device", "cpu",
        "--out", tmp_path / "delay.json",
    )  # fmt: skip
    system = load(tmp_path / "exp", decode_chunk_size=-1).system
    ((name, timed),) = forced_alignments(system, tokenizer, part_batches(tmp_path, tmp_path / "speech", tokenizer, 99))
    expected = [0.04 * (t + 1) - x.begin for t, x in enumerate(timed)]
    (summary,) = read_json(tmp_path / "delay.json")
    assert (name, summary["count"]) == ("u", len(tokens))
    assert summary["mean_ms"] == pytest.approx(1000 * sum(expected) / len(expected))
