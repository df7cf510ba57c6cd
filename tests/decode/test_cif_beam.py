"""Searches of the CIF recogniser against every token sequence of short utterances."""

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from cif_search_toys import V, cif_model, ragged_batch
from hkd_toys import hkd_batch, hkd_config
from nar_toys import VOCAB

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.cif_beam import CifBeamSearch, CifGreedySearch
from icefall_kd.decode.ctc import CtcGreedySearch
from icefall_kd.decode.fusion import Fusion, HotwordScorer, NeuralScorer, NgramScorer
from icefall_kd.decode.hotwords import HotwordGraph
from icefall_kd.decode.runner import build_decoder, decode_parts
from icefall_kd.decode.suffix import decode_suffix
from icefall_kd.errors import ConfigError
from icefall_kd.models.cif import TAIL_THRESHOLD
from icefall_kd.models.lm import LmConfig, TokenLm
from icefall_kd.systems.hkd import HkdSystem
from icefall_kd.text.ngram import estimate
from icefall_kd.text.tokenizer import Tokenizer

END, TOKENS = 1, (3, 4)


@torch.no_grad()
def brute_force(model, frames, threshold=TAIL_THRESHOLD, lm=lambda y: 0.0) -> list[tuple[float, tuple[int, ...]]]:
    """Return [(score, text)] of every text of an utterance, best first, by whole forward calls of the decoder.

    A text shorter than what fires is followed by the end, and by the best token in each step.
    """
    fired = model.fire(frames.unsqueeze(0), torch.tensor([len(frames)]), tail_threshold=threshold)
    n, found = int(fired.lens), {}
    if not n:
        return [(lm(()), ())]
    for text in itertools.chain(*(itertools.product(TOKENS, repeat=length) for length in range(n + 1))):
        y = [*text, END][:n]
        while True:
            seen = [END, *y, *([END] * n)][:n]  # what is said later changes nothing before
            logits, _ = model.decoder(torch.tensor([seen]), fired.c)
            log_probs = logits[0].float().log_softmax(-1)
            if len(y) == n:
                break
            y.append(max((END, *TOKENS), key=lambda v: float(log_probs[len(y), v])))
        found[text] = sum(float(log_probs[u, v]) for u, v in enumerate(y)) + lm(text)
    return sorted(((score, y) for y, score in found.items()), reverse=True)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_a_beam_that_drops_nothing_finds_the_best_of_all_texts(threshold):
    lengths = set()
    for seed in range(4):
        model, (x, lens) = cif_model(seed), ragged_batch(seed)
        found = CifBeamSearch(model, 70, nbest=7, tail_threshold=threshold).decode(x, lens)
        for hyps, frames, length in zip(found, x, lens.tolist(), strict=True):
            expected = brute_force(model, frames[:length], threshold)
            lengths.add(max(len(y) for _, y in expected))
            assert [tuple(h.tokens) for h in hyps] == [y for _, y in expected[:7]]
            assert [h.score for h in hyps] == pytest.approx([s for s, _ in expected[:7]], abs=1e-4)
    assert len(lengths) > 2


def test_a_text_that_ends_early_pays_for_what_is_left():
    """Of two sentences the first alone must not win because it says less."""
    model = cif_model(0)
    frames = torch.randn(1, 6, 16, dtype=torch.float64)
    model.cif.alpha = lambda encoder_out, lens: torch.ones(1, 6, dtype=torch.float64)
    # The end is always possible, and a token a little less unlikely than all others together.
    table = torch.full((V,), -1e4, dtype=torch.float64)
    table[[END, *TOKENS]] = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    model.decoder.step = lambda y, before, c, cache: table.expand(len(y), V)
    (best, *_), = CifBeamSearch(model, 10, nbest=3).decode(frames, torch.tensor([6]))
    assert best.tokens == [TOKENS[0]] * 6 and best.score == pytest.approx(6 * math.log(0.5))


def test_a_beam_of_one_is_greedy_search_and_an_utterance_alone_is_the_same():
    texts = set()
    for seed in range(4):
        model, (x, lens) = cif_model(seed, vocab_size=12), ragged_batch(seed, n=6, longest=20)
        greedy = CifGreedySearch(model).decode(x, lens)
        for search, found in (
            (CifGreedySearch(model), greedy),
            (CifBeamSearch(model, 1), CifBeamSearch(model, 1).decode(x, lens)),
            (CifBeamSearch(model, 5, nbest=5), CifBeamSearch(model, 5, nbest=5).decode(x, lens)),
        ):
            for i, hyps in enumerate(found):
                alone = search.decode(x[i : i + 1, : lens[i]], lens[i : i + 1])[0]
                assert [h.tokens for h in alone] == [h.tokens for h in hyps]
                assert [h.timestamps for h in alone] == [h.timestamps for h in hyps]
                assert [h.score for h in alone] == pytest.approx([h.score for h in hyps], abs=1e-5)
                assert [h.score for h in hyps] == sorted((h.score for h in hyps), reverse=True)
                assert len({tuple(h.tokens) for h in hyps}) == len(hyps)
        for one, (other,) in zip(greedy, CifBeamSearch(model, 1).decode(x, lens), strict=True):
            assert (one[0].tokens, one[0].timestamps) == (other.tokens, other.timestamps)
            assert one[0].score == pytest.approx(other.score, abs=1e-6)
            texts.add(tuple(other.tokens))
    assert len(texts) > 10


def test_a_token_is_where_it_took_most_and_the_tail_fires_above_its_threshold():
    model = cif_model(0)
    frames = torch.randn(1, 4, 16, dtype=torch.float64)
    alpha = torch.tensor([[0.9, 0.3, 0.8, 0.45]], dtype=torch.float64)  # 2 whole ones, 0.45 behind them
    model.cif.alpha = lambda encoder_out, lens: alpha[:, : encoder_out.shape[1]]
    with torch.no_grad():
        model.decoder.output.weight[END] = 0.0  # never the best
        model.decoder.output.weight[3] *= 0.0
        model.decoder.output.bias = torch.nn.Parameter(torch.tensor([0, -50.0, 0, 50, 0, 0]).double())
    for threshold, times in ((0.44, [0, 2, 3]), (0.46, [0, 2])):
        for search in (CifGreedySearch, CifBeamSearch):
            hyp = search(model, tail_threshold=threshold).decode(frames, torch.tensor([4]))[0][0]
            assert hyp.tokens == [3] * len(times) and hyp.timestamps == times


@pytest.mark.parametrize("search", [CifGreedySearch, CifBeamSearch])
def test_what_fires_nothing_is_the_empty_text(search):
    model, (x, lens) = cif_model(1, rate=1e-6), ragged_batch(1)
    with torch.no_grad():
        model.cif.output.weight.zero_()
    empty = search(model).decode(x, lens)
    assert [[(h.tokens, h.score, h.timestamps) for h in hyps] for hyps in empty] == [[([], 0.0, [])]] * len(lens)
    lens[1] = 0
    several = [search(cif_model(seed, vocab_size=12)).decode(x, lens) for seed in range(4)]
    assert all((found[1][0].tokens, found[1][0].score) == ([], 0.0) for found in several)
    assert any(hyps[0].tokens for found in several for hyps in found)


def language_models():
    rng = random.Random(0)
    names = [*"_^?ab", "m"]
    ngram = NgramScorer(estimate([rng.choices("ab", k=rng.randint(1, 6)) for _ in range(30)], 3), names, 0.7)
    torch.manual_seed(0)
    lm = TokenLm(LmConfig(lm_embedding_dim=6, lm_hidden_dim=8, lm_layers=2), V).double().eval()
    with torch.no_grad():
        lm.output.weight.mul_(6)
    return {"ngram": ngram, "neural": NeuralScorer(lm, 0.5), "hotword": HotwordScorer(HotwordGraph([([3, 4, 4], 2.0)]))}


def added(scorer, tokens) -> float:
    """Return what a scorer says of a whole text, token by token."""
    state, total = scorer.start(), 0.0
    for token in tokens:
        (gain,), (state,) = scorer.extend([state], [token])
        total += gain
    return total + scorer.final(state)


@pytest.mark.parametrize("names", [["ngram"], ["neural"], ["ngram", "hotword"]], ids="+".join)
def test_fusion_adds_to_every_text_what_its_models_say(names):
    scorers, changed = [language_models()[name] for name in names], 0
    for seed in range(3):
        model, (x, lens) = cif_model(seed), ragged_batch(seed)
        search = CifBeamSearch(model, 70, nbest=5)
        plain = search.decode(x, lens)
        search.fusion = Fusion(scorers)
        found = search.decode(x, lens)
        for hyps, frames, length in zip(found, x, lens.tolist(), strict=True):
            lm = lambda y: sum(added(scorer, y) for scorer in scorers)  # noqa: E731
            expected = brute_force(model, frames[:length], lm=lm)
            assert [tuple(h.tokens) for h in hyps] == [y for _, y in expected[:5]]
            assert [h.score for h in hyps] == pytest.approx([s for s, _ in expected[:5]], abs=1e-4)
        changed += sum(a[0].tokens != b[0].tokens for a, b in zip(plain, found, strict=True))
    assert changed


def test_ctc_greedy_search_cuts_at_the_end_of_the_text():
    model, (x, lens) = cif_model(0, vocab_size=8), ragged_batch(0, n=6, longest=20)
    whole = CtcGreedySearch(model).decode(x, lens)
    cut = CtcGreedySearch(model, end_id=END).decode(x, lens)
    assert any(END in hyp.tokens for (hyp,) in whole)
    for (a,), (b,) in zip(whole, cut, strict=True):
        length = a.tokens.index(END) if END in a.tokens else len(a.tokens)
        assert b.tokens == a.tokens[:length] and b.timestamps == a.timestamps[:length] and b.score == a.score


METHODS = {"cif_greedy_search": {}, "cif_beam_search": {"beam_size": 5, "nbest": 3}, "ctc_greedy_search": {}}


@pytest.mark.parametrize("method", METHODS)
def test_the_distillation_heads_change_no_bit_of_what_is_recognised(method):
    torch.manual_seed(0)
    system = HkdSystem(hkd_config(), VOCAB, {"acd": 1.0, "lrd": 0.01}, "labels", 16).eval()
    with torch.no_grad():
        system.model.ctc_output.weight.mul_(12)  # so that CTC says something
    bare = HkdSystem(hkd_config(), VOCAB).eval()
    bare.load_state_dict(system.inference_state_dict())
    assert len(bare.state_dict()) < len(system.state_dict())
    config = DecodeConfig(decoding_method=method, **METHODS[method])
    batch = dataclasses.replace(hkd_batch(), labels={})
    one, other = (build_decoder(s, config).decode(*s.encode(batch)) for s in (system, bare))
    assert one == other and any(hyp.tokens for hyps in one for hyp in hyps)


def test_a_search_leaves_its_files_with_times_of_80_ms(tmp_path):
    tokenizer = Tokenizer.train_char(["THE CAT SAT", "A DOG RAN"])
    torch.manual_seed(0)
    system = HkdSystem(hkd_config(), tokenizer.vocab_size)
    assert sorted(system.decoders()) == sorted(METHODS)
    batch = dataclasses.replace(hkd_batch(), labels={}, texts=["THE CAT"] * 3, durations=[1.2, 0.9, 0.5])
    config = DecodeConfig(
        exp_dir=tmp_path, decoding_method="cif_beam_search", beam_size=3, nbest=2, epoch=1, ctm=True, bootstrap=10
    )
    result = decode_parts(system, tokenizer, {"dev": [batch]}, config)["dev"]
    assert result["suffix"] == "epoch-1_avg-1_cif_beam_search_beam-size-3_use-averaged-model"
    (file,) = (tmp_path / "cif_beam_search").glob("nbest-dev-*.jsonl")
    hyps = [hyp for line in file.read_text().splitlines() for hyp in json.loads(line)["nbest"]]
    assert len(hyps) == 6 and any(hyp["tokens"] for hyp in hyps)
    for hyp in hyps:
        assert hyp["times"] == pytest.approx([0.08 * t for t in hyp["timestamps"]])
        assert len(hyp["times"]) == len(hyp["tokens"])


def test_options_name_the_files_and_those_that_do_nothing_are_refused():
    beam = DecodeConfig(decoding_method="cif_beam_search", tail_threshold=0.5, lm=Path("x/4gram.arpa"), epoch=3)
    assert decode_suffix(beam).startswith("epoch-3_avg-1_cif_beam_search_beam-size-4_lm-4gram-scale-0.3_tail-0.5")
    greedy = DecodeConfig(decoding_method="cif_greedy_search", epoch=3)
    assert decode_suffix(greedy) == "epoch-3_avg-1_cif_greedy_search_use-averaged-model"
    with pytest.raises(ConfigError, match="add --decoding-method cif_greedy_search or cif_beam_search"):
        DecodeConfig(decoding_method="ctc_greedy_search", tail_threshold=0.5)
    with pytest.raises(ConfigError, match="or cif_beam_search for --system hkd"):
        DecodeConfig(decoding_method="cif_greedy_search", lm=Path("x"))
    with pytest.raises(ConfigError, match="it must lie in 0"):
        DecodeConfig(decoding_method="cif_greedy_search", tail_threshold=1.5)
    assert DecodeConfig().tail_threshold == TAIL_THRESHOLD
