"""The neural language model: its loss, its steps, exact resume, its file."""

import dataclasses
import math
import random

import pytest
import torch
from lhotse import MonoCut
from micro_corpus import write_part

from icefall_kd.config import OptimConfig
from icefall_kd.data.manifests import write_cuts
from icefall_kd.errors import ConfigError, DataError, NumericError
from icefall_kd.models.lm import LmConfig, TokenLm, load_lm, save_lm
from icefall_kd.runtime.tensors import read_tensors
from icefall_kd.text.corpus import TextConfig
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.lm import TrainLmConfig, epoch_batches, mean_loss, train_lm

TINY = LmConfig(lm_embedding_dim=8, lm_hidden_dim=12, lm_layers=2, lm_dropout=0.2)


@pytest.fixture
def config(tmp_path):
    rng = random.Random(0)
    lines = ["".join(rng.choice(["ab", "cd", "ab cd "]) for _ in range(rng.randint(1, 6))).strip() for _ in range(40)]
    (tmp_path / "text").write_text("\n".join(lines) + "\n")
    Tokenizer.train_char(lines).save(tmp_path / "lang")
    return TrainLmConfig(
        source=TextConfig(text=[tmp_path / "text"]), lang_dir=tmp_path / "lang", exp_dir=tmp_path / "exp",
        num_epochs=4, batch_tokens=60, model=TINY, device="cpu",
        optim=OptimConfig(optimizer="adamw", base_lr=0.03, lr_warmup_steps=5),
    )  # fmt: skip


def test_the_loss_is_the_sum_over_tokens_and_the_end_whatever_the_padding():
    torch.manual_seed(0)
    lm = TokenLm(TINY, 9).eval()
    texts = [[3, 4, 5, 4], [6], []]
    y = torch.full((3, 5), 8)
    for row, text in zip(y, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    losses = lm.loss(y, torch.tensor([4, 1, 0]))
    for text, loss in zip(texts, losses.tolist(), strict=True):
        expected, history = 0.0, [1]
        for token in [*text, 1]:
            logits, _ = lm(torch.tensor([history]))
            expected -= logits[0, -1].log_softmax(-1)[token].item()
            history.append(token)
        assert loss == pytest.approx(expected, rel=1e-5)


def test_the_state_carries_everything_before():
    lm = TokenLm(TINY, 9).eval()
    y = torch.tensor([[1, 3, 4, 5, 6]])
    whole, _ = lm(y)
    first, state = lm(y[:, :2])
    second, _ = lm(y[:, 2:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


def test_batches_hold_every_sentence_once_within_the_limit():
    lengths = [random.Random(i).randint(0, 30) for i in range(50)]
    batches = epoch_batches(lengths, 40, seed=1)
    assert sorted(i for b in batches for i in b) == list(range(50))
    assert all(len(b) * (max(lengths[i] for i in b) + 1) <= 40 or len(b) == 1 for b in batches)
    assert batches != epoch_batches(lengths, 40, seed=2)


def test_a_resumed_training_equals_one_without_a_break_and_learns(config, tmp_path):
    loss = train_lm(config)
    broken = dataclasses.replace(config, exp_dir=tmp_path / "broken")
    train_lm(dataclasses.replace(broken, num_epochs=2))
    assert train_lm(broken) == loss
    tokenizer = Tokenizer.load(config.lang_dir)
    a, b = (load_lm(c.exp_dir / "lm.safetensors", tokenizer.hash) for c in (config, broken))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert loss < math.log(tokenizer.vocab_size) - 0.5
    assert sorted(p.name for p in config.exp_dir.glob("*.pt")) == ["epoch-3.pt", "epoch-4.pt"]
    assert train_lm(config) == loss  # nothing left to do


def test_the_epoch_with_the_lowest_validation_loss_is_kept(config, tmp_path):
    write_part(tmp_path, "dev", [0.5, 0.6], features=False)
    # Transcripts of other words: their characters are unknown, and what the text teaches makes them less likely.
    cuts = tmp_path / "manifests/cuts_dev.jsonl.gz"
    best = train_lm(dataclasses.replace(config, valid_cuts=[cuts], num_epochs=6))
    tokenizer = Tokenizer.load(config.lang_dir)
    lm = load_lm(config.exp_dir / "lm.safetensors", tokenizer.hash)
    valid = [tokenizer.encode(text) for text in ("one two", "three")]
    assert mean_loss(lm, valid, 100) == pytest.approx(best, rel=1e-5)
    last = train_lm(dataclasses.replace(config, exp_dir=tmp_path / "all", num_epochs=6))
    assert last != best


def test_other_options_another_tokenizer_and_damage_are_refused(config, tmp_path):
    train_lm(dataclasses.replace(config, num_epochs=1))
    with pytest.raises(ConfigError, match="other values of batch_tokens"):
        train_lm(dataclasses.replace(config, batch_tokens=61))
    file = config.exp_dir / "lm.safetensors"
    with pytest.raises(ConfigError, match="is a language model of tokenizer"):
        load_lm(file, "another")
    save_lm(file, TokenLm(TINY, 9), "x", {})
    assert read_tensors(file)[0].keys() == {"lm"}
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DataError, match="damaged"):
        load_lm(file, "x")


def test_a_training_that_is_lost_ends_with_its_reason_and_leaves_no_model(config):
    lost = dataclasses.replace(config, optim=dataclasses.replace(config.optim, base_lr=1e9))
    with pytest.raises(NumericError, match=r"the loss of epoch 1 is .* use a smaller --base-lr"):
        train_lm(lost)
    assert not (config.exp_dir / "lm.safetensors").exists()


def test_validation_without_transcripts_is_refused(config, tmp_path):
    write_cuts(tmp_path / "cuts.jsonl.gz", [MonoCut("a", 0, 1, 0)])
    with pytest.raises(DataError, match=r"no cut of --valid-cuts .* has a transcript"):
        train_lm(dataclasses.replace(config, valid_cuts=[tmp_path / "cuts.jsonl.gz"]))
