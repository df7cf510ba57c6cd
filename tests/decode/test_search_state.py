"""Searches that go on from a state, against one call over all frames."""

import gc

import pytest
import torch
from toy_search import DIM, Model

from icefall_kd.decode import context_table
from icefall_kd.decode.base import StatefulDecoder
from icefall_kd.decode.prefixes import Prefix
from icefall_kd.decode.transducer import GreedySearch, ModifiedBeamSearch
from icefall_kd.errors import ConfigError

SEARCHES = [GreedySearch, lambda m: ModifiedBeamSearch(m, nbest=4), lambda m: ModifiedBeamSearch(m, 3, temperature=1.3)]


def streams(seed: int, n: int = 5, longest: int = 23):
    g = torch.Generator().manual_seed(seed)
    lens = torch.randint(0, longest + 1, (n,), generator=g)
    lens[0], lens[-1] = longest, 0
    return torch.randn(n, longest, DIM, generator=g, dtype=torch.float64), lens


def chunks(x, lens, seed: int):
    """Cut every stream at its own random places; yield (encoder_out, encoder_out_lens), the padding garbage."""
    g = torch.Generator().manual_seed(seed)
    done = torch.zeros_like(lens)
    while (done < lens).any():
        size = torch.minimum(torch.randint(0, 6, lens.shape, generator=g), lens - done)
        chunk = torch.full((len(x), int(size.max()) + int(torch.randint(0, 2, (), generator=g)), DIM), 1e3).double()
        for i, (a, k) in enumerate(zip(done.tolist(), size.tolist(), strict=True)):
            chunk[i, :k] = x[i, a : a + k]
        yield chunk, size
        done += size


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("context_size", [1, 2, 3])
def test_any_cutting_of_the_frames_gives_exactly_the_result_of_one_call(search, context_size):
    for seed in range(4):
        found = search(Model(context_size, seed))
        x, lens = streams(seed)
        whole = found.decode(x, lens)
        assert any(hyps[0].tokens for hyps in whole)
        for cut in range(3):
            state = found.start(len(x))
            for chunk, size in chunks(x, lens, 10 * seed + cut):
                found.advance(state, chunk, size)
            assert found.result(state) == whole  # tokens, scores and timestamps


@pytest.mark.parametrize("search", SEARCHES)
def test_partial_results_are_those_of_the_frames_heard_and_leave_the_state_alone(search):
    found = search(Model(seed=3))
    x, lens = streams(3)
    state, heard = found.start(len(x)), torch.zeros_like(lens)
    assert [[(h.tokens, h.score, h.timestamps) for h in hyps] for hyps in found.result(state)] == [[([], 0.0, [])]] * 5
    for chunk, size in chunks(x, lens, 3):
        found.advance(state, chunk, size)
        heard += size
        partial = found.result(state)
        assert partial == found.decode(x, heard)
        partial[0][0].tokens.append(-5)
        partial[0][0].timestamps.append(-5)
    assert found.result(state) == found.decode(x, lens)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_state_that_forgets_contexts_gives_the_same_result(search, monkeypatch):
    found = search(Model(seed=1))
    x, lens = streams(1, longest=60)
    whole = found.decode(x, lens)
    monkeypatch.setattr(context_table, "MAX_CONTEXTS", 4)
    state, largest = found.start(len(x)), 0
    for chunk, size in chunks(x, lens, 1):
        before = len(state.table.index)
        found.advance(state, chunk, size)
        largest = max(largest, before)
        # Four of earlier calls, those of the hypotheses, and what a call adds: four a frame and stream.
        assert len(state.table.index) <= 4 + 5 * 4 + 5 * 4 * int(size.max())
    assert largest > 4
    assert found.result(state) == whole


def test_a_long_stream_keeps_only_the_prefixes_of_its_hypotheses():
    earlier = [o for o in gc.get_objects() if type(o) is Prefix]
    found = ModifiedBeamSearch(Model(seed=2), beam_size=4)
    state = found.start(1)
    g = torch.Generator().manual_seed(0)
    for _ in range(40):
        found.advance(state, torch.randn(1, 10, DIM, generator=g, dtype=torch.float64), torch.tensor([10]))
    needed = set()
    for hyp in state.beams[0]:
        node = hyp.prefix
        while node is not None:
            needed.add(id(node))
            node = node.parent
    gc.collect()
    alive = {id(o) for o in gc.get_objects() if type(o) is Prefix} - {id(o) for o in earlier}
    assert alive == needed
    assert len(state.beams[0][0].prefix.tokens()) > 100


def test_searches_with_a_state_satisfy_the_protocol_and_refuse_another_number_of_streams():
    x, lens = streams(0)
    for search in SEARCHES:
        found = search(Model(seed=0))
        assert isinstance(found, StatefulDecoder)
        with pytest.raises(ConfigError, match="the state holds 3 streams, encoder_out has 5"):
            found.advance(found.start(3), x, lens)
        empty = found.start(0)
        found.advance(empty, x[:0], lens[:0])
        assert found.result(empty) == []
