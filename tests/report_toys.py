"""Reading a report, and the log of a training."""

import json
from html.parser import HTMLParser
from pathlib import Path

RECORDS = [
    {"kind": "train", "step": 1, "loss": 4.0, "ctc_loss": 3.0, "tot": {"loss": 4.0, "ctc_loss": 3.0}, "epoch": 1,
     "batch": 1, "lr": 0.1, "grad_norm": 1.0, "units": {"ctc_loss": "token"}},
    {"kind": "train", "step": 9, "loss": None, "ctc_loss": 2.0, "tot": {"loss": None, "ctc_loss": 2.25}, "epoch": 1,
     "batch": 9, "lr": 0.2, "grad_norm": 2.0, "units": {"ctc_loss": "token"}},
    {"kind": "valid", "step": 9, "loss": 3.5, "ctc_loss": 2.125, "epoch": 1, "units": {}},
]  # fmt: skip

VOID = {"meta", "br", "wbr", "link", "img", "hr"}


def write_result(exp_dir: Path, method: str, nbest: list[dict], errors: list[int], config: dict, **more) -> None:
    """Write what decode.py leaves of one part of utterances with ten reference words each."""
    folder, ids = exp_dir / method, [record["id"] for record in nbest]
    folder.mkdir()
    zeros, n = [0] * len(ids), len(ids)
    utterances = {"ids": ids, "ins": zeros, "del": zeros, "sub": errors, "ref_len": [10] * n, "ref_hash": ["0"] * n}
    rate = 100 * sum(errors) / (10 * n)
    result = {"part": "dev", "suffix": "s", "unit": "word", "error_rate": rate, "interval": [rate - 1, rate + 1],
              "bootstrap": {"samples": 10}, "decoding_method": method, "parameters": 1234, "rtf": 0.5,
              "utterances": utterances, "config": config, "command": "decode.py"}  # fmt: skip
    (folder / "results-dev-s.json").write_text(json.dumps(result | more))
    (folder / "nbest-dev-s.jsonl").write_text("".join(json.dumps(record) + "\n" for record in nbest))


class Page(HTMLParser):
    """The text, the rows of tables, and what would be fetched; a wrong nesting is an error."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open, self.rows, self.ids, self.links, self.fetched, self.alts = [], [], [], [], [], []
        self.text, self.source = "", file.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "svg":
            assert given["role"] == "img"
            self.alts.append(given["aria-label"])
        self.ids += [given["id"]] if "id" in given else []
        for name in ("href", "src", "xlink:href"):
            if name in given:
                (self.links if given[name].startswith("#") else self.fetched).append(given[name])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data
        if any(tag in ("td", "th") for tag in self.open) and "style" not in self.open:
            self.rows[-1][-1] += data

    def row(self, *begin: str) -> list[str]:
        return next(row for row in self.rows if row[: len(begin)] == list(begin))
