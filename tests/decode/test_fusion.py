"""Language models in the beam search, against sums over all token sequences of tiny models."""

import functools
import math
import random

import pytest
import torch
from toy_search import VOCAB, Model, ragged, total_log_prob

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.fusion import Fusion, NeuralScorer, NgramScorer, build_fusion
from icefall_kd.decode.transducer import ModifiedBeamSearch
from icefall_kd.errors import ConfigError
from icefall_kd.models.lm import LmConfig, TokenLm, save_lm
from icefall_kd.runtime.files import write_json
from icefall_kd.text.ngram import estimate
from icefall_kd.text.tokenizer import Tokenizer

TOKENS = [*"_^?abcde", "m"]


def ngram(order: int, seed: int = 0):
    rng = random.Random(seed)
    return estimate([rng.choices("abcde", k=rng.randint(1, 6)) for _ in range(30)], order)


def neural(seed: int = 0) -> TokenLm:
    torch.manual_seed(seed)
    lm = TokenLm(LmConfig(lm_embedding_dim=6, lm_hidden_dim=8, lm_layers=2), VOCAB).double().eval()
    with torch.no_grad():
        lm.output.weight.mul_(6)
    return lm


@functools.cache
def scorers():
    return {
        "trigram": NgramScorer(ngram(3), TOKENS, 0.7),
        "lodr": NgramScorer(ngram(2, 1), TOKENS, -0.3),
        "neural": NeuralScorer(neural(), 0.5),
    }


def lm_score(name: str, tokens: list[int]) -> float:
    """Return the scaled log-probability of all tokens, by the language model itself."""
    scorer = scorers()[name]
    if name == "neural":
        logits, _ = scorer.lm(torch.tensor([[1, *tokens]]))
        log_probs = logits[0].log_softmax(-1)
        return scorer.scale * sum(log_probs[i, t].item() for i, t in enumerate(tokens))
    state, total = scorer.lm.start, 0.0
    for t in tokens:
        log_prob, state = scorer.lm.score(state, TOKENS[t])
        total += log_prob
    return scorer.scale * total


@pytest.mark.parametrize("names", [["trigram"], ["neural"], ["neural", "lodr"]], ids="+".join)
def test_a_beam_that_drops_nothing_scores_every_sequence_with_its_language_models(names):
    model = Model(seed=3)
    x, lens = ragged(3, n=2, longest=4)
    lens[:] = 4
    fusion = Fusion([scorers()[name] for name in names])
    search = ModifiedBeamSearch(model, beam_size=9**4, nbest=9**4, fusion=fusion)
    hyps = search.decode(x[:1, :4], lens[:1])[0]
    # All sequences of at most four of the seven tokens that are neither blank nor unknown.
    assert len(hyps) == sum(7**n for n in range(5))
    ranked = [h.score / (len(h.tokens) + 2) for h in hyps]
    assert ranked == sorted(ranked, reverse=True)
    for hyp in [*hyps[:20], *hyps[20::200]]:
        expected = total_log_prob(model, x[0, :4], hyp.tokens) + sum(lm_score(name, hyp.tokens) for name in names)
        assert hyp.score == pytest.approx(expected, rel=1e-4, abs=1e-4)
    plain = ModifiedBeamSearch(model, beam_size=9**4, nbest=9**4).decode(x[:1, :4], lens[:1])[0]
    assert [h.tokens for h in plain] != [h.tokens for h in hyps]  # the language model has a say


@pytest.mark.parametrize("scorer", [NgramScorer(ngram(3), TOKENS, 0.0), NeuralScorer(neural(), 0.0)])
def test_a_language_model_of_scale_zero_changes_no_bit(scorer):
    for seed in range(3):
        x, lens = ragged(seed)
        plain = ModifiedBeamSearch(Model(seed=seed), nbest=4).decode(x, lens)
        assert ModifiedBeamSearch(Model(seed=seed), nbest=4, fusion=Fusion([scorer])).decode(x, lens) == plain


@pytest.mark.parametrize("name", ["trigram", "neural"])
def test_fusion_does_not_depend_on_the_batch_nor_on_the_chunks(name):
    x, lens = ragged(7, longest=20)
    search = ModifiedBeamSearch(Model(seed=7), nbest=4, fusion=Fusion([scorers()[name]]))
    whole = search.decode(x, lens)
    assert whole != ModifiedBeamSearch(Model(seed=7), nbest=4).decode(x, lens)
    state = search.start(len(x))
    for a in range(0, 20, 3):
        search.advance(state, x[:, a : a + 3], (lens - a).clamp(0, x[:, a : a + 3].size(1)))
    assert search.result(state) == whole
    for i in range(len(x)):
        assert search.decode(x[i : i + 1], lens[i : i + 1])[0] == whole[i]
    held = [h.prefix for beam in state.beams for h in beam]
    # States live with the hypotheses alone, however long a stream grows.
    assert all(p.states is not None for p in held)
    assert all(p.parent.states is None or p.parent in held for p in held if p.parent is not None)


def test_the_neural_model_runs_once_for_each_sequence_that_is_extended():
    lm, calls, seen = neural(), [], []
    lm.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    scorer = NeuralScorer(lm, 0.5)
    extend = scorer.extend
    scorer.extend = lambda states, tokens: seen.extend(states) or extend(states, tokens)
    x, lens = ragged(1)
    ModifiedBeamSearch(Model(seed=1), fusion=Fusion([scorer])).decode(x, lens)
    assert len(calls) <= int(lens.max())  # once a frame at most, for the whole batch
    assert sum(calls) == len(set(seen)) < len(seen)


@pytest.fixture
def tokenizer():
    return Tokenizer.train_char(["ab cd e"])


def config(**options) -> DecodeConfig:
    return DecodeConfig(decoding_method="modified_beam_search", **options)


def test_language_models_are_built_from_the_options(tokenizer, tmp_path):
    file, folder = tmp_path / "x.arpa", tmp_path / "lm"
    tokens = tokenizer.tokens[3:-1]
    estimate([tokens, tokens[::-1]], 2, tokens).write(file)
    save_lm(folder / "lm.safetensors", TokenLm(LmConfig(lm_hidden_dim=4), tokenizer.vocab_size), tokenizer.hash, {})
    cpu = torch.device("cpu")
    assert build_fusion(config(), tokenizer, cpu) is None
    (scorer,) = build_fusion(config(lm=file, lm_scale=0.4), tokenizer, cpu).scorers
    gains, states = scorer.extend([scorer.start()], [5])
    assert gains[0] == pytest.approx(0.4 * scorer.lm.score(scorer.lm.start, tokenizer.tokens[5])[0])
    assert math.isfinite(scorer.extend(states, [tokenizer.mask_id])[0][0])  # a token that the file lacks
    options = {"lm": folder, "lodr_arpa": file, "lodr_scale": -0.2}
    scorers = build_fusion(config(**options), tokenizer, cpu).scorers
    assert [(type(s), s.scale) for s in scorers] == [(NeuralScorer, 0.3), (NgramScorer, -0.2)]


def test_language_models_of_other_tokens_are_refused(tokenizer, tmp_path):
    cpu, file = torch.device("cpu"), tmp_path / "x.arpa"
    estimate([["WORDS", "HERE"]], 2).write(file)
    with pytest.raises(ConfigError, match=r"2 words that are no tokens of this model, the first are \['HERE'"):
        build_fusion(config(lm=file), tokenizer, cpu)
    estimate([["a"]], 2).write(file)
    write_json(f"{file}.json", {"tokenizer_hash": "another"})
    with pytest.raises(ConfigError, match="n-gram model of tokens of tokenizer another"):
        build_fusion(config(lm=file), tokenizer, cpu)
    write_json(f"{file}.json", {"units": "words"})
    with pytest.raises(ConfigError, match="n-gram model of words"):
        build_fusion(config(lm=file), tokenizer, cpu)
    save_lm(tmp_path / "lm.safetensors", TokenLm(LmConfig(lm_hidden_dim=4), 9), "another", {})
    with pytest.raises(ConfigError, match="is a language model of tokenizer another"):
        build_fusion(config(lm=tmp_path), tokenizer, cpu)


def test_options_that_do_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--lm with --decoding-method greedy_search"):
        DecodeConfig(lm=tmp_path)
    with pytest.raises(ConfigError, match=r"--lm-scale is -0\.3"):
        config(lm=tmp_path, lm_scale=-0.3)
    with pytest.raises(ConfigError, match="--lodr-arpa goes with --lm"):
        config(lodr_arpa=tmp_path)
    with pytest.raises(ConfigError, match=r"--lodr-scale \(now 0.1\) is below 0"):
        config(lm=tmp_path, lodr_arpa=tmp_path, lodr_scale=0.1)
