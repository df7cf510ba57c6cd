"""Searches over graphs with k2: fast beam search of transducers, CTC over its topology or HLG; one-best or n-best.

Fast beam search: Kang et al. 2022, "Fast and parallel decoding for transducer" (arXiv 2211.00484), k2's
RnntDecodingStreams.  A frame emits at most one symbol; every frame keeps the states (context, graph state) within
``beam`` of the best, at most ``max_states`` of them with at most ``max_contexts`` different contexts.
"""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.base import UNK_ID, Hypothesis, logits_to_scores
from icefall_kd.errors import ConfigError
from icefall_kd.runtime.optional import require_k2
from icefall_kd.text.graphs import Graph, load_graph, token_graph
from icefall_kd.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Bounds of the states that are active in a frame of CTC decoding; the beam decides between them.
_MIN_ACTIVE, _MAX_ACTIVE = 30, 10000
# Log-probability of what must not happen; finite, since k2 subtracts scores.
_NEVER = -1e10
# Token of the end of an utterance, which no model emits: sos/eos of every tokenizer.
END_ID = Tokenizer.sos_id


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Which hypotheses are taken from a lattice."""

    num_paths: int | None = None
    """Paths drawn for the n-best list; None: the best path alone."""
    nbest_scale: float = 0.5
    """Scale of the scores that paths are drawn with; smaller: more different ones."""
    nbest: int = 1
    """Hypotheses returned."""

    @classmethod
    def from_config(cls, config: DecodeConfig) -> "Paths":
        """Return what --decoding-method, --num-paths, --nbest-scale and --nbest ask for."""
        num_paths = config.num_paths if "nbest" in config.decoding_method else None
        return cls(num_paths=num_paths, nbest_scale=config.nbest_scale, nbest=config.nbest)


class FastBeamSearch:
    """Transducer search over a graph; the joiner runs once a frame over all contexts of all utterances.

    Args:
        model: TransducerModel in evaluation mode.
        graph: of tokens alone, or LG; without epsilons on the token side.
        beam: log-probability behind the best state at which a state is dropped.
        max_contexts: different decoder contexts a frame and utterance.
        max_states: states a frame and utterance.
        paths: one-best or n-best.
        blank_penalty: subtracted from the blank's logit.
        temperature: divides the logits.
        unk_id: its probability is the blank's, the graph has no arc of it; None: a token like any other.
    """

    def __init__(
        self,
        model,
        graph: Graph,
        *,
        beam: float = 20.0,
        max_contexts: int = 8,
        max_states: int = 64,
        paths: Paths = Paths(),
        blank_penalty: float = 0.0,
        temperature: float = 1.0,
        unk_id: int | None = UNK_ID,
    ) -> None:
        if model.decoder is None or model.joiner is None:
            raise ConfigError(
                "the model has no transducer (it was trained with --transducer-scale 0); "
                "decode it with --decoding-method ctc_decoding"
            )
        self.k2 = require_k2("fast_beam_search")
        self.graph = Graph(with_end_symbol(self.k2, graph.fsa), graph.words, graph.gap)
        self.model, self.paths, self.unk_id = model, paths, unk_id
        self.blank_penalty, self.temperature = blank_penalty, temperature
        self.config = self.k2.RnntDecodingConfig(
            vocab_size=model.decoder.vocab_size,
            decoder_history_len=model.decoder.context_size,
            beam=beam,
            max_states=max_states,
            max_contexts=max_contexts,
        )

    @classmethod
    def from_config(cls, model, config: DecodeConfig) -> "FastBeamSearch":
        """Return the search that the options of decode.py describe, with its graph."""
        return cls(
            model,
            _graph(config, "LG" if config.decoding_method.endswith("_LG") else "", config.ngram_lm_scale),
            beam=config.beam,
            max_contexts=config.max_contexts,
            max_states=config.max_states,
            paths=Paths.from_config(config),
            blank_penalty=config.blank_penalty,
            temperature=config.temperature,
        )

    @torch.no_grad()
    def decode(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> list[list[Hypothesis]]:
        """Return the hypotheses of every utterance, best first.

        Args:
            encoder_out: (N, T', C).
            encoder_out_lens: (N,).
        Returns:
            N lists of :class:`Hypothesis`.  One-best: the score is that of the best path, graph included; n-best:
            summed over the word sequence's paths in the lattice.
        """
        kept, lens = _not_empty(encoder_out_lens)
        result: list[list[Hypothesis]] = [[Hypothesis([], 0.0, [])] for _ in range(encoder_out.size(0))]
        if not kept:
            return result
        k2, joiner = self.k2, self.model.joiner
        device = encoder_out.device
        fsa = _on(k2, self.graph.fsa, device)
        streams = k2.RnntDecodingStreams([k2.RnntDecodingStream(fsa) for _ in kept], self.config)
        frames = joiner.encoder_proj(encoder_out[kept])  # (N', T', C)
        ends = torch.tensor(lens, device=device)
        # Behind its last frame an utterance can only end; the frame after that is the one that k2 does without.
        closing = torch.full((self.model.decoder.vocab_size,), _NEVER, device=device)
        closing[END_ID] = 0.0
        for t in range(max(lens) + 2):
            shape, contexts = streams.get_contexts()
            contexts = _with_start(contexts.to(device=device, dtype=torch.int64))
            decoder_out = joiner.decoder_proj(self.model.decoder(contexts, need_pad=False)[:, 0])
            rows = shape.row_ids(1).to(device=device, dtype=torch.int64)
            logits = joiner(frames[rows, min(t, max(lens) - 1)], decoder_out, project_input=False)  # (contexts, V)
            log_probs = logits_to_scores(logits, 0, self.blank_penalty, self.temperature).log_softmax(dim=-1)
            if self.unk_id is not None:
                log_probs[:, 0] = torch.logaddexp(log_probs[:, 0], log_probs[:, self.unk_id])
            log_probs[:, END_ID] = _NEVER
            log_probs = torch.where((ends[rows] <= t).unsqueeze(1), closing, log_probs)
            streams.advance(log_probs.to(fsa.device))
        streams.terminate_and_flush_to_streams()
        found = take_paths(k2, streams.format_output([n + 2 for n in lens]), self.graph, self.paths)
        if not all(found):  # the graph's words were not complete: what there is of them
            partial = streams.format_output([n + 1 for n in lens], allow_partial=True)
            rests = take_paths(k2, partial, self.graph, Paths())
            found = [hyps or rest for hyps, rest in zip(found, rests, strict=True)]
        for place, length, hyps in zip(kept, lens, found, strict=True):
            result[place] = [_transducer_hypothesis(path[:length], score, text) for path, score, text in hyps]
        return result


def _transducer_hypothesis(path: list[int], score: float, text: str | None) -> Hypothesis:
    times = [t for t, token in enumerate(path) if token]
    return Hypothesis([path[t] for t in times], score, times, text)


def with_end_symbol(k2, fsa):
    """Return a transducer's graph in which an arc of the end symbol stands before every final arc.

    k2's transducer search leaves the scores of final arcs out, and with them the language model's of sentence ends.
    """
    final = fsa.shape[0] - 1
    arcs = fsa.arcs.values()[:, :4].clone()
    arcs[:, 2] = torch.where(arcs[:, 2] == -1, END_ID, arcs[:, 2])
    last = torch.tensor([[final, final + 1, -1, 0]], dtype=torch.int32)
    ended = k2.Fsa(torch.cat([arcs, last]))
    if hasattr(fsa, "aux_labels"):
        rows = fsa.aux_labels.tolist()
        rows = [[w for w in (row if isinstance(row, list) else [row]) if w > 0] for row in rows]
        ended.aux_labels = k2.RaggedTensor([*rows, [-1]], dtype=torch.int32)
    return k2.arc_sort(ended)


class CtcGraphSearch:
    """CTC decoding over a graph: the topology alone, or HLG.

    Args:
        model: TransducerModel with a CTC head, in evaluation mode.
        graph: the CTC topology, or HLG.
        beam: log-probability behind the best state at which a state is dropped.
        output_beam: the same for the lattice, behind its best path.
        paths: one-best or n-best.
        unk_id: dropped from the output; None: kept.
    """

    def __init__(
        self,
        model,
        graph: Graph,
        *,
        beam: float = 20.0,
        output_beam: float = 8.0,
        paths: Paths = Paths(),
        unk_id: int | None = UNK_ID,
    ) -> None:
        if model.ctc_output is None:
            raise ConfigError(
                "the model has no CTC head (it was trained with --ctc-scale 0); "
                "decode it with --decoding-method fast_beam_search"
            )
        self.k2 = require_k2("ctc_decoding")
        self.model, self.graph, self.paths, self.unk_id = model, graph, paths, unk_id
        self.beam, self.output_beam = beam, output_beam

    @classmethod
    def from_config(cls, model, config: DecodeConfig) -> "CtcGraphSearch":
        """Return the search that the options of decode.py describe, with its graph."""
        name = "HLG" if config.decoding_method.endswith("_HLG") else "H"
        graph = _graph(config, name, config.hlg_scale, max_token=model.vocab_size - 1)
        return cls(
            model, graph, beam=config.beam, output_beam=config.output_beam, paths=Paths.from_config(config)
        )

    @torch.no_grad()
    def decode(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> list[list[Hypothesis]]:
        """Return the hypotheses of every utterance, best first.

        Args:
            encoder_out: (N, T', C).
            encoder_out_lens: (N,).
        Returns:
            N lists of :class:`Hypothesis`, scored as by :class:`FastBeamSearch`; the timestamp of a token is the
            first frame of its run.
        """
        kept, lens = _not_empty(encoder_out_lens)
        result: list[list[Hypothesis]] = [[Hypothesis([], 0.0, [])] for _ in range(encoder_out.size(0))]
        if not kept:
            return result
        k2 = self.k2
        fsa = _on(k2, self.graph.fsa, encoder_out.device)
        # k2 wants the longest first.
        order = sorted(range(len(kept)), key=lambda i: -lens[i])
        segments = torch.tensor([[i, 0, lens[order[i]]] for i in range(len(order))], dtype=torch.int32)
        chosen = [kept[i] for i in order]
        log_probs = self.model.ctc_output(encoder_out[chosen]).float().log_softmax(dim=-1)
        dense = k2.DenseFsaVec(log_probs.to(fsa.device), segments)
        lattice = k2.intersect_dense_pruned(fsa, dense, self.beam, self.output_beam, _MIN_ACTIVE, _MAX_ACTIVE)
        found = take_paths(k2, lattice, self.graph, self.paths)
        lost = sum(not hyps for hyps in found)
        if lost:
            logger.warning("%d of %d utterances end inside a word of the graph and stay empty; try a larger --beam",
                           lost, len(found))  # fmt: skip
        for place, hyps in zip(chosen, found, strict=True):
            hyps = hyps or [([], -math.inf, self.graph.text([]))]
            result[place] = [Hypothesis(*self._collapse(path, score), text) for path, score, text in hyps]
        return result

    def _collapse(self, path: list[int], score: float) -> tuple[list[int], float, list[int]]:
        """Return tokens, score and first frames of the runs of a path, blanks left out."""
        starts = [
            n for n, token in enumerate(path) if token not in (0, self.unk_id) and (n == 0 or path[n - 1] != token)
        ]
        return [path[n] for n in starts], score, starts


def take_paths(k2, lattice, graph: Graph, paths: Paths) -> list[list[tuple[list[int], float, str | None]]]:
    """Return the best hypotheses of every utterance of a lattice.

    Args:
        k2: the library.
        lattice: FsaVec of N utterances, one arc a frame; labels are tokens, 0 a blank.
        graph: that was searched; without words hypotheses differ by their tokens.
        paths: how many, and how they are drawn.
    Returns:
        N lists of (token of every frame, score, text or None), best first.  n-best scores are log-sums over all
        paths of the lattice with these words.  An utterance without a path has no hypothesis.
    """
    # Survives the operations below, in which arcs without a frame get -1.
    lattice.token, lattice.token_filler = lattice.labels.clone(), -1
    n = lattice.shape[0]
    if paths.num_paths is None:
        best = k2.shortest_path(lattice, use_double_scores=True)
        scores = best.get_tot_scores(use_double_scores=True, log_semiring=False).tolist()
        return [[entry] if math.isfinite(entry[1]) else [] for entry in _read_linear(best, graph, scores)]
    return [_nbest(k2, k2.index_fsa(lattice, _index(i, lattice.device)), graph, paths) for i in range(n)]


def _nbest(k2, lattice, graph: Graph, paths: Paths) -> list[tuple[list[int], float, str | None]]:
    """Return the best word (or token) sequences of the lattice of one utterance, scored by all their paths."""
    outer = lattice if graph.words is None else k2.invert(lattice)  # labels: what tells hypotheses apart, 0 for nothing
    outer = k2.arc_sort(k2.connect(outer))
    if outer.num_arcs == 0:
        return []
    drawn = outer.clone()
    drawn.scores = drawn.scores * paths.nbest_scale
    labels = drawn.labels.tolist()
    arcs = k2.random_paths(drawn, use_double_scores=True, num_paths=paths.num_paths).tolist()[0]
    sequences = sorted({tuple(labels[a] for a in path if labels[a] > 0) for path in arcs})
    linear = linear_with_loops(k2, sequences).to(lattice.device)
    zeros = torch.zeros(len(sequences), dtype=torch.int32, device=lattice.device)
    # Epsilons match the loops, so that this is all paths of the lattice with the words of each sequence.
    each = k2.intersect_device(outer, linear, b_to_a_map=zeros, sorted_match_a=True)
    each = k2.top_sort(k2.connect(each))
    scores = each.get_tot_scores(use_double_scores=True, log_semiring=True).tolist()
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: paths.nbest]
    linear_best = k2.shortest_path(k2.index_fsa(each, _index(best, lattice.device)), use_double_scores=True)
    read = _read_linear(linear_best, None, [scores[i] for i in best])
    return [(path, score, graph.text(sequences[i])) for i, (path, score, _) in zip(best, read, strict=True)]


def linear_with_loops(k2, sequences: list[tuple[int, ...]]):
    """Return an FsaVec of label sequences with epsilon loops; k2 fails where all it has is one empty sequence."""
    if sequences == [()]:
        return k2.create_fsa_vec([k2.Fsa(torch.tensor([[0, 0, 0, 0], [0, 1, -1, 0]], dtype=torch.int32))])
    return k2.linear_fsa_with_self_loops(k2.linear_fsa([list(sequence) for sequence in sequences]))


def _read_linear(best, graph: Graph | None, scores: list[float]) -> list[tuple[list[int], float, str | None]]:
    """Return the tokens, scores and (with a graph of words) texts of an FsaVec of linear FSAs."""
    splits = best.arcs.shape().remove_axis(1).row_splits(1).tolist()
    tokens = best.token.tolist()
    aux = None if graph is None or graph.words is None else best.aux_labels.tolist()
    result = []
    for score, begin, end in zip(scores, splits[:-1], splits[1:], strict=True):
        text = None
        if aux is not None:
            real = (aux[a] for a in range(begin, end) if tokens[a] >= 0)  # arcs of a frame, not the final one
            ids = (w for entry in real for w in (entry if isinstance(entry, list) else [entry]))
            text = graph.text([w for w in ids if w > 0])
        result.append(([t for t in tokens[begin:end] if t >= 0], score, text))
    return result


def _graph(config: DecodeConfig, name: str, scale: float, max_token: int | None = None) -> Graph:
    """Return the graph that a method needs: of tokens (""), H, LG or HLG, its scores scaled."""
    purpose = f"--decoding-method {config.decoding_method}"
    k2 = require_k2(purpose)
    tokenizer = Tokenizer.load(config.exp_dir / "tokenizer")
    if name == "":
        skipped = {tokenizer.blank_id, tokenizer.sos_id, tokenizer.unk_id, tokenizer.mask_id}
        return token_graph(k2, [i for i in range(tokenizer.vocab_size) if i not in skipped])
    if name == "H":
        return Graph(k2.arc_sort(k2.ctc_topo(max_token, modified=False)))
    if config.lang_dir is None:
        raise ConfigError(f"{purpose} needs --lang-dir, the folder with {name}.safetensors (prepare.sh --graphs true)")
    graph = load_graph(config.lang_dir, name, tokenizer, purpose)
    graph.fsa.scores = graph.fsa.scores * scale
    return graph


def _not_empty(encoder_out_lens: Tensor) -> tuple[list[int], list[int]]:
    """Return the utterances that have frames, and their lengths."""
    lens = encoder_out_lens.tolist()
    kept = [i for i, length in enumerate(lens) if length > 0]
    return kept, [lens[i] for i in kept]


def _with_start(contexts: Tensor) -> Tensor:
    """Mark what lies before the start: k2 fills contexts with zeros, a decoder was trained on [-1, ..., -1, 0]."""
    start = (contexts[:, :-1] == 0) & (contexts[:, 1:] == 0)
    contexts[:, :-1] = contexts[:, :-1].masked_fill(start, -1)
    return contexts


def _index(i: int | list[int], device: torch.device) -> Tensor:
    return torch.tensor([i] if isinstance(i, int) else i, dtype=torch.int32, device=device)


def _on(k2, fsa, device: torch.device):
    """Return a graph where k2 can search: beside the model, unless k2 was built for the CPU alone."""
    return fsa.to(device if k2.with_cuda else torch.device("cpu"))
