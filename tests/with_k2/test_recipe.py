"""From a folder of audio to decoded text: prepare.sh --graphs true, and decode.py with every method over graphs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from micro_corpus import WORDS, write_trans

from icefall_kd.cli import config_to_dict
from icefall_kd.config import DecodeConfig, LoopConfig, ModelConfig, TrainConfig
from icefall_kd.errors import ConfigError
from icefall_kd.recipe import decode
from icefall_kd.systems import build_system
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.average import save_weights

pytestmark = pytest.mark.k2
REPO = Path(__file__).resolve().parents[2]
VOCABULARY = sorted({word.upper() for line in WORDS for word in line.split()})
METHODS = [
    "fast_beam_search", "fast_beam_search_nbest", "fast_beam_search_LG", "fast_beam_search_nbest_LG",
    "ctc_decoding", "ctc_decoding_HLG", "ctc_decoding_nbest_HLG",
]  # fmt: skip


def run(command, code=0):
    folder = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder.parent)}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The command that prepared a corpus of noise with its graphs, the data folder, and the log."""
    root = tmp_path_factory.mktemp("graphs")
    unigrams = "".join(f"-1 {word}\n" for word in VOCABULARY)
    arpa = f"\\data\\\nngram 1={len(VOCABULARY) + 2}\n\n\\1-grams:\n-9 <s>\n-0.7 </s>\n{unigrams}\n\\end\\\n"
    (root / "words.arpa").write_text(arpa)
    speech = write_trans(root / "speech", num=3)
    command = [REPO / "egs/librispeech/prepare.sh", "--corpus", "trans", "--corpus-dir", speech]
    command += ["--data-dir", root / "data", "--token-kind", "char", "--nj", 1]
    command += ["--graphs", "true", "--arpa", root / "words.arpa"]
    return command, root / "data", run(command)


@pytest.fixture(scope="module")
def trained(prepared):
    """An exp_dir with an untrained student."""
    data = prepared[1]
    exp_dir, tokenizer = data.parent / "exp", Tokenizer.load(data / "lang_char")
    tokenizer.save(exp_dir / "tokenizer")
    model = ModelConfig(encoder_size="tiny", num_encoder_layers=1, encoder_dim=16, feedforward_dim=16, decoder_dim=16)
    config = TrainConfig(model=model, loop=LoopConfig(exp_dir=exp_dir))
    torch.manual_seed(0)
    state = build_system(config, tokenizer.vocab_size).state_dict()
    content = {"model": state, "config": config_to_dict(config), "tokenizer_hash": tokenizer.hash}
    save_weights(exp_dir / "last-1-up-to-epoch-7.safetensors", content)
    return exp_dir


def test_the_environment_finds_the_project_from_anywhere(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", "import icefall_kd"], cwd=tmp_path, env=env, timeout=60)
    assert done.returncode == 0


def test_a_checkpoint_of_a_later_torch_is_not_called_damaged(trained):
    (trained / "epoch-7.pt").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"torch 1\.13\.1\S* does not read .*epoch-7\.pt.*--weights"):
        decode(DecodeConfig(exp_dir=trained, device="cpu", use_averaged_model=False))


@pytest.mark.parametrize("name", ["beam", "output_beam"])
def test_k2_takes_no_beam_of_zero(name):
    with pytest.raises(ConfigError, match="must be above 0"):
        DecodeConfig(**{name: 0.0})


def test_the_stages_make_the_language_directory(prepared):
    command, data, log = prepared
    lang = data / "lang_char"
    names = {p.name for p in lang.iterdir()}
    assert {"lexicon.txt", "words.txt", "lm_text.txt", *(f"{g}.safetensors" for g in ("L", "G", "LG", "HLG"))} <= names
    assert [line.split()[0] for line in (lang / "lexicon.txt").read_text().splitlines()] == VOCABULARY
    assert set((lang / "lm_text.txt").read_text().split()) <= set(VOCABULARY)
    assert "LG.safetensors" in log
    before = (lang / "LG.safetensors").read_bytes()
    again = run([*command, "--stage", 6])
    assert "stage 8 graphs: done before, skipped" in again and (lang / "LG.safetensors").read_bytes() == before


@pytest.mark.parametrize("method", METHODS)
def test_decode_with_every_method(prepared, trained, method):
    data = prepared[1]
    part = next((data / "fbank").glob("cuts_*.jsonl.gz")).name.removeprefix("cuts_").removesuffix(".jsonl.gz")
    config = DecodeConfig(
        exp_dir=trained, test_parts=[part], manifest_dir=data / "fbank", lang_dir=data / "lang_char",
        decoding_method=method, weights=trained / "last-1-up-to-epoch-7.safetensors", nbest=2, num_paths=20,
        blank_penalty=3.0, bootstrap=0, device="cpu",
    )  # fmt: skip
    result = decode(config)[part]
    assert result["num_ref"] > 0 and result["suffix"].startswith("weights-last-1-up-to-epoch-7_" + method)
    lines = [json.loads(line) for line in next((trained / method).glob("nbest-*.jsonl")).read_text().splitlines()]
    assert lines and any(line["nbest"][0]["tokens"] for line in lines)
    if method.endswith("LG"):
        assert {w for line in lines for hyp in line["nbest"] for w in hyp["text"].split()} <= set(VOCABULARY)
    if "nbest" in method:
        assert any(len(line["nbest"]) == 2 for line in lines)
