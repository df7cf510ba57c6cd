"""Decoding graphs made with k2: L, G, LG and HLG, and the files they lie in (safetensors, no pickle).

L maps tokens to words, G is the n-gram model, LG their composition, determinized and free of epsilons, and HLG is
LG behind the CTC topology H (Mohri et al. 2002, "Weighted finite-state transducers in speech recognition"; the
order of operations is icefall's).
"""

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.files import fingerprint, sha256_file
from icefall_kd.runtime.optional import require, require_k2
from icefall_kd.runtime.tensors import read_tensors, write_tensors
from icefall_kd.text.lexicon import BACKOFF, EPS, Lexicon, disambiguate
from icefall_kd.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
# Above so many tokens the standard topology, which has V x V arcs, gives way to the modified one.
LARGEST_STANDARD_TOPOLOGY = 1000


@dataclass(frozen=True, kw_only=True)
class GraphInfo:
    """What a graph was made of; stands in its file."""

    name: str
    """L, L_disambig, G, LG or HLG."""
    tokenizer_hash: str
    lexicon_hash: str
    words_hash: str
    """Of words.txt, whose ids the graph holds."""
    arpa_sha256: str = ""
    """Of the language model; empty for L."""
    ctc_topology: str = ""
    """standard or modified, of HLG."""
    format: int = FORMAT_VERSION


@dataclass(frozen=True)
class Graph:
    """A decoding graph with the words of its ids."""

    fsa: Any
    """k2.Fsa; labels are token ids, aux_labels word ids (where there are any)."""
    words: list[str] | None = None
    """Words by id; None: the graph knows tokens alone."""
    gap: str = " "
    """What stands between two words in a text."""

    def text(self, ids: Sequence[int]) -> str | None:
        """Return the text of word ids; None where the graph has no words."""
        return None if self.words is None else self.gap.join(self.words[i] for i in ids)


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """Which graphs are made, of what."""

    lang_dir: Path
    """Folder of tokenizer.json, lexicon.txt and words.txt; the graphs are written here."""
    arpa: Path
    """n-gram model of the words, in ARPA format."""
    max_order: int | None = None
    """Longest n-grams that are used; None: all."""
    ctc_topology: Literal["auto", "standard", "modified"] = "auto"
    """H of HLG; the modified one takes repeated tokens without a blank between for two, and is small; auto: standard
    up to 1000 tokens."""


def make_graphs(config: GraphConfig) -> dict[str, Path]:
    """Write L, L_disambig, G, LG and HLG into ``lang_dir``, as ``<name>.safetensors``.

    Returns:
        The files by name.
    Raises:
        ConfigError: k2 or kaldilm is absent or broken.
        DataError: a file is missing, or the words of the language model are not those of the lexicon.
    """
    k2 = require_k2("the stage of decoding graphs")
    tokenizer = Tokenizer.load(config.lang_dir)
    lexicon = Lexicon.read(config.lang_dir / "lexicon.txt", tokenizer)
    words_file = config.lang_dir / "words.txt"
    if read_words(words_file) != lexicon.words:
        raise DataError(f"{words_file} does not fit lexicon.txt beside it; run the lexicon stage again")
    topology = config.ctc_topology
    if topology == "auto":
        topology = "standard" if tokenizer.vocab_size <= LARGEST_STANDARD_TOPOLOGY else "modified"
    plain, disambig = (lexicon_fst(k2, lexicon, tokenizer, with_symbols) for with_symbols in (False, True))
    g = grammar_fst(k2, config.arpa, words_file, config.max_order)
    lg = compose_lg(k2, disambig, g, tokenizer.vocab_size, lexicon.words.index(BACKOFF))
    hlg = compose_hlg(k2, lg, tokenizer.mask_id, topology == "modified")
    facts = {
        "tokenizer_hash": tokenizer.hash,
        "lexicon_hash": lexicon.hash,
        "words_hash": fingerprint(lexicon.words),
    }
    arpa = {"arpa_sha256": sha256_file(config.arpa)}
    made = {"L": (plain, {}), "L_disambig": (disambig, {}), "G": (g, arpa), "LG": (lg, arpa)}
    made["HLG"] = (hlg, {**arpa, "ctc_topology": topology})
    files = {}
    for name, (fsa, more) in made.items():
        files[name] = graph_file(config.lang_dir, name)
        save_graph(files[name], fsa, GraphInfo(name=name, **facts, **more))
        logger.info("%s: %d states, %d arcs", files[name], fsa.shape[0], fsa.num_arcs)
    return files


def graph_file(lang_dir: Path, name: str) -> Path:
    """Return where the graph of a name lies."""
    return Path(lang_dir) / f"{name}.safetensors"


def read_words(path: Path) -> list[str]:
    """Return the words of a words.txt by id."""
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        words = [word for word, _ in rows]
        if [int(i) for _, i in rows] != list(range(len(rows))) or words[:1] != [EPS]:
            raise ValueError("ids do not count from 0, or <eps> is not the first")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); run the lexicon stage again") from error
    return words


def lexicon_fst(k2, lexicon: Lexicon, tokenizer: Tokenizer, disambig: bool):
    """Return L: any number of words, tokens in, words out.

    Without a token between words, one state stands before and behind them.  Else they are three: the start, before a
    word, behind a word; all may end.  The backoff passes at the start and behind words, in one place for each word,
    so that no path is there twice.

    Args:
        k2: the library.
        lexicon: the words.
        tokenizer: gives the ids of tokens, and the token between words.
        disambig: close ambiguous spellings with #1, #2, ... and let #0 pass (ids from vocab_size on).
    """
    token_ids = {token: i for i, token in enumerate(tokenizer.tokens)}
    words = lexicon.words
    word_ids = {word: i for i, word in enumerate(words)}
    marks = disambiguate([pieces for _, pieces in lexicon.entries])
    before, after = (0, 0) if tokenizer.word_separator is None else (1, 2)
    arcs, state = [], after + 1
    for (word, pieces), mark in zip(lexicon.entries, marks, strict=True):
        labels = [token_ids[piece] for piece in pieces]
        if disambig and mark:
            labels.append(tokenizer.vocab_size + mark)
        here = before
        for i, label in enumerate(labels):
            last = i == len(labels) - 1
            there = after if last else state
            arcs.append((here, there, label, word_ids[word] if i == 0 else 0))
            here, state = there, state + (not last)
    if before:
        arcs += [(0, before, 0, 0), (after, before, token_ids[tokenizer.word_separator], 0)]
    if disambig:
        arcs += [(end, end, tokenizer.vocab_size, word_ids[BACKOFF]) for end in {0, after}]
    arcs += [(end, state, -1, -1) for end in {0, before, after}]
    arcs.sort(key=lambda arc: arc[0])
    table = torch.tensor(arcs, dtype=torch.int32)
    fsa = k2.Fsa(torch.cat([table[:, :3], torch.zeros(len(arcs), 1, dtype=torch.int32)], dim=1))
    fsa.aux_labels = table[:, 3].contiguous()
    return k2.arc_sort(fsa)


def grammar_fst(k2, arpa: Path, words_file: Path, max_order: int | None = None):
    """Return G: the n-gram model as an acceptor of words, with #0 on the backoff arcs.

    Raises:
        DataError: the ARPA file is missing or damaged, or none of its words is in ``words_file``.
    """
    if not Path(arpa).is_file():
        raise DataError(f"there is no language model {arpa}; run the language model stage, or give --arpa FILE")
    require("kaldilm", "the stage of decoding graphs", "pip install kaldilm==1.15.5")
    command = [sys.executable, "-m", "kaldilm", f"--disambig-symbol={BACKOFF}", f"--read-symbol-table={words_file}"]
    command += [f"--max-order={max_order}"] if max_order else []
    # In a process of its own: a damaged file ends in an abort, a good one in pages of log.
    done = subprocess.run([*command, str(arpa)], capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith(("[F]", "[E]"))] or ["it aborted"]
        raise DataError(f"kaldilm cannot read {arpa} ({said[0]}); is it a language model in ARPA format, unzipped?")
    fsa = k2.Fsa.from_openfst(done.stdout, acceptor=False)
    backoff = read_words(words_file).index(BACKOFF)
    if not ((fsa.labels > 0) & (fsa.labels < backoff)).any():
        raise DataError(f"no word of {arpa} is in {words_file}; is it a model of other words, or of tokens?")
    return k2.arc_sort(fsa)


def compose_lg(k2, lexicon, grammar, first_token_symbol: int, first_word_symbol: int):
    """Return LG: composed, determinized, without disambiguation symbols and epsilons on the token side.

    Args:
        k2: the library.
        lexicon: L with disambiguation symbols.
        grammar: G.
        first_token_symbol: ids from here on are disambiguation symbols of tokens.
        first_word_symbol: the same of words.
    Raises:
        DataError: no sentence of G can be written in the tokens of L.
    """
    fsa = k2.connect(k2.compose(lexicon, grammar))
    if fsa.num_arcs == 0:
        raise DataError("L and G have no sentence in common: the language model and the lexicon know different words")
    fsa = k2.connect(k2.determinize(fsa, k2.DeterminizeWeightPushingType.kLogWeightPushing))
    labels = fsa.labels.clone()
    labels[labels >= first_token_symbol] = 0
    fsa.labels = labels
    aux = _ragged(k2, fsa)
    values = aux.values.clone()
    values[values >= first_word_symbol] = 0
    fsa.aux_labels = k2.RaggedTensor(aux.shape, values)
    fsa = k2.connect(k2.remove_epsilon(fsa))
    fsa.aux_labels = _ragged(k2, fsa).remove_values_eq(0)
    fsa = k2.arc_sort(fsa)
    if (fsa.labels == 0).any():
        raise DataError("LG has epsilon arcs on the token side; the lexicon holds a word without tokens")
    return fsa


def compose_hlg(k2, lg, max_token: int, modified: bool):
    """Return HLG: the CTC topology of tokens 1 ... max_token before LG."""
    fsa = k2.connect(k2.compose(k2.ctc_topo(max_token, modified=modified), lg, inner_labels="tokens"))
    delattr(fsa, "tokens")
    return k2.arc_sort(fsa)


def token_graph(k2, allowed: list[int]) -> Graph:
    """Return the graph of all token sequences, for searches without a lexicon: one state, one arc a token."""
    rows = [(0, 0, token, 0) for token in sorted(allowed)] + [(0, 1, -1, 0)]
    return Graph(k2.arc_sort(k2.Fsa(torch.tensor(rows, dtype=torch.int32))))


def _ragged(k2, fsa):
    """Return the aux_labels as a ragged tensor [arc][label]."""
    aux = fsa.aux_labels
    return k2.RaggedTensor(aux.unsqueeze(1)) if isinstance(aux, Tensor) else aux


def save_graph(path: Path, fsa, info: GraphInfo) -> None:
    """Write a single Fsa: its arcs (source, target, label, bits of the score) and its aux_labels."""
    tensors = {"arcs": fsa.arcs.values()[:, :4]}
    if isinstance(getattr(fsa, "aux_labels", None), Tensor):
        tensors["aux_labels"] = fsa.aux_labels
    elif hasattr(fsa, "aux_labels"):
        tensors["aux_labels"] = fsa.aux_labels.values
        tensors["aux_row_splits"] = fsa.aux_labels.shape.row_splits(1)
    write_tensors(path, {name: t.to(torch.int32) for name, t in tensors.items()}, {"graph": json.dumps(asdict(info))})


def load_graph(lang_dir: Path, name: str, tokenizer: Tokenizer, purpose: str) -> Graph:
    """Read a graph for decoding.

    Args:
        lang_dir: folder of the graph.
        name: LG or HLG (or another one of :class:`GraphInfo`).
        tokenizer: of the model.
        purpose: what needs it, for the messages ("--decoding-method x").
    Raises:
        ConfigError: k2 does not work, the graph is not there, or it was made for another tokenizer.
        DataError: it is damaged, or words.txt beside it is not its own.
    """
    k2 = require_k2(purpose)
    path = graph_file(lang_dir, name)
    if not path.is_file():
        raise ConfigError(f"{purpose} needs {path}; make it with prepare.sh --graphs true, or name another --lang-dir")
    metadata, tensors = read_tensors(path)
    try:
        info = GraphInfo(**json.loads(metadata["graph"]))
        aux = tensors.get("aux_labels")
        fsa = k2.Fsa(tensors["arcs"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} is not a graph of this project ({error!r}); run the graph stage again") from error
    if info.format > FORMAT_VERSION:
        raise ConfigError(f"{path} has format {info.format}, this code reads up to {FORMAT_VERSION}; update the code")
    if info.tokenizer_hash != tokenizer.hash:
        raise ConfigError(
            f"{path} was made for the tokenizer {info.tokenizer_hash[:12]}, the model has {tokenizer.hash[:12]}; "
            "name the --lang-dir that the model was trained with, and make its graphs"
        )
    words = read_words(Path(lang_dir) / "words.txt")
    if fingerprint(words) != info.words_hash:
        raise DataError(f"{path} was made with another words.txt; run the graph stage again")
    if aux is not None and "aux_row_splits" in tensors:
        shape = k2.ragged.create_ragged_shape2(row_splits=tensors["aux_row_splits"])
        aux = k2.RaggedTensor(shape, aux)
    if aux is not None:
        fsa.aux_labels = aux
    return Graph(fsa, words, " " if tokenizer.unit == "word" else "")
