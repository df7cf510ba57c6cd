"""HTML of a report: one page that needs nothing beside itself, light or dark as its reader's screen is."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# What figures are drawn in; report/plots.py writes these names where a drawing has a colour.
_COLOURS = {
    "fg": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9aa4af"),
    "line": ("#d1d9e0", "#3d444d"),
    "bg": ("#ffffff", "#0d1117"),
    "panel": ("#f6f8fa", "#151b23"),
    "link": ("#0550ae", "#79b8ff"),
    "c1": ("#0969da", "#58a6ff"),
    "c2": ("#bc4c00", "#ff9d57"),
    "c3": ("#1a7f37", "#4ac26b"),
}

_NOTE, _WIDE, _NUMBER = ' class="note"', ' class="wide"', ' class="number"'

_STYLE = """
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 75rem; background: var(--bg);
  color: var(--fg); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; line-height: 1.2; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p { max-width: 46rem; margin: .5rem 0; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
table code { overflow-wrap: normal; }
code.whole { white-space: nowrap; }
.note { color: var(--muted); }
.scroll { overflow-x: auto; margin: .8rem 0; }
.scroll:focus-visible { outline: 2px solid var(--c1); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding-bottom: .4rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--line); }
tbody th { font-weight: 600; }
.number { text-align: right; }
td.number { white-space: nowrap; }
thead th { vertical-align: bottom; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .7rem; background: var(--panel); border: 1px solid var(--line); border-radius: 6px; }
figure.wide { margin: 1rem 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { font-size: .9rem; color: var(--muted); padding-bottom: .4rem; }
figcaption b { color: var(--fg); }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--link); }
@media print { details > * { display: block; } figure { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    title: str
    body: str
    """HTML."""

    @property
    def anchor(self) -> str:
        """Return the target of links to the section."""
        return "-".join(word for word in "".join(c if c.isalnum() else " " for c in self.title.lower()).split())


def text(value: object) -> str:
    """Return a value as HTML text."""
    return html.escape(str(value))


def code(value: object) -> str:
    """Return a value as HTML in a typewriter's letters; long ones break behind / and _."""
    return f"<code>{text(value).replace('/', '/<wbr>').replace('_', '_<wbr>')}</code>"


def paragraph(content: str, note: bool = False) -> str:
    """Return a paragraph of HTML; a note is muted."""
    return f"<p{_NOTE if note else ''}>{content}</p>"


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a table that scrolls where the screen is narrow.

    Args:
        caption: what it shows, plain text.
        header: names of the columns, plain text.
        rows: cells in HTML; the first of each names the row.
        numbers: columns that are aligned to the right.
    """

    def attribute(column: int) -> str:
        return _NUMBER if column in numbers else ""

    heads = "".join(f'<th scope="col"{attribute(i)}>{text(name)}</th>' for i, name in enumerate(header))
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td{attribute(i)}>{cell}</td>" for i, cell in enumerate(rest, 1))
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}"><table><caption>{text(caption)}'
        f"</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def figure(name: str, caption: str, svg: str, wide: bool = False) -> str:
    """Return a drawing under its name and caption (plain text)."""
    told = f"<b>{text(name)}</b>{' ' if caption else ''}{text(caption)}"
    return f"<figure{_WIDE if wide else ''}><figcaption>{told}</figcaption>{svg}</figure>"


def figures(several: Iterable[str]) -> str:
    """Return small figures side by side."""
    return f'<div class="figures">{"".join(several)}</div>'


def details(summary: str, content: str) -> str:
    """Return HTML that is folded away under a summary (plain text)."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return the whole page.

    Args:
        title: heading, plain text.
        subtitle: line under it, HTML.
        sections: what follows.
    """
    light, dark = ("".join(f"--{name}: {pair[k]}; " for name, pair in _COLOURS.items()) for k in (0, 1))
    links = "".join(f'<li><a href="#{s.anchor}">{text(s.title)}</a></li>' for s in sections)
    bodies = "\n".join(
        f'<section aria-labelledby="{s.anchor}"><h2 id="{s.anchor}">{text(s.title)}</h2>\n{s.body}</section>'
        for s in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>
:root {{ color-scheme: light dark; {light}}}
@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}
{_STYLE.strip()}
</style>
</head>
<body>
<header><h1>{text(title)}</h1><p class="note">{subtitle}</p></header>
<nav aria-label="Contents"><ul>{links}</ul></nav>
<main>
{bodies}
</main>
</body>
</html>
"""
