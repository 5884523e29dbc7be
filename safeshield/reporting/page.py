"""The page of a report: its templates, its style, and the escaping of all inserted text.

The HTML of a report is built from the templates in this module. The module `drawings` makes the SVG
drawings. `fill` inserts values into a template and escapes every value that is not `Html` already.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Text that is HTML already, so that `fill` does not escape it."""

    __slots__ = ()


def escaped(value: object) -> Html:
    r"""Return a value as HTML: `Html` as it is, sequences one after the other, others escaped.

    Characters that cannot be printed, such as those that change the direction of the text, are
    written as escape sequences, so that no name in a file can change how the page reads.

    >>> escaped("<b>" + chr(0x202E))
    '&lt;b&gt;\\u202e'
    """
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("")
    if isinstance(value, list | tuple):
        return Html("".join(escaped(one) for one in value))
    text = "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in str(value))
    return Html(html.escape(text, quote=True))


def fill(template: str, **values: object) -> Html:
    """Return a template of HTML with its fields replaced by the escaped values."""
    return Html(template.format_map({name: escaped(value) for name, value in values.items()}))


def joined(parts: Iterable[object], between: str = "") -> Html:
    """Return parts as HTML with HTML between them; parts that are empty are left out."""
    return Html(Html(between).join(one for one in map(escaped, parts) if one))


_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<p class="kind">{kind}</p>
<h1>{heading}</h1>
<p class="state {tone}">{state}</p>
<p class="made">{made}</p>
</header>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main>
{sections}
</main>
<footer><p>{footer}</p></footer>
</body>
</html>
"""


def document(
    *,
    title: object,
    kind: object,
    heading: object,
    state: object,
    tone: str,
    made: object,
    contents: Iterable[tuple[str, str]],
    sections: Iterable[Html],
    footer: object,
) -> Html:
    """Return the whole page.

    Args:
        title: Title of the window.
        kind: What the page is, above its heading.
        heading: What the page is about.
        state: The state of the promise, in one sentence.
        tone: "good", "plain", "doubt" or "bad", which colours the state.
        made: When and by what the page was made.
        contents: The id and the heading of each section.
        sections: The sections.
        footer: The last sentences.
    """
    entries = [fill('<li><a href="#{id}">{name}</a></li>', id=i, name=name) for i, name in contents]
    return fill(
        _DOCUMENT, title=title, style=Html(_STYLE), kind=kind, heading=heading, state=state,
        tone=tone, made=made, contents=entries, sections=joined(sections, "\n"), footer=footer,
    )  # fmt: skip


def section(name: str, heading: object, *content: object) -> Html:
    """Return a section with the id `name`."""
    template = '<section id="{id}"><h2>{heading}</h2>\n{content}\n</section>'
    return fill(template, id=name, heading=heading, content=joined(content, "\n"))


def item(name: str, heading: object, *content: object) -> Html:
    """Return a piece of evidence with the id `name`, such as "E1"."""
    template = (
        '<article id="{id}"><h3><span class="tag">{id}</span> {heading}</h3>\n{content}\n</article>'
    )
    return fill(template, id=name, heading=heading, content=joined(content, "\n"))


def paragraph(*content: object, kind: str = "") -> Html:
    """Return a paragraph; `kind` is "", "note" or "words"."""
    template = '<p class="{kind}">{content}</p>' if kind else "<p>{content}</p>"
    return fill(template, kind=kind, content=joined(content))


def quote(text: object) -> Html:
    """Return the exact words of a record."""
    return fill("<blockquote>{text}</blockquote>", text=text)


def bullets(points: Iterable[object], *, ordered: bool = False) -> Html:
    """Return a list of points."""
    kind = Html("ol" if ordered else "ul")
    inner = [fill("<li>{point}</li>", point=point) for point in points]
    return fill("<{kind}>{inner}</{kind}>", kind=kind, inner=inner)


def boxes(pairs: Iterable[tuple[object, object]]) -> Html:
    """Return short answers side by side, each with its question above it."""
    inner = [
        fill("<div><dt>{name}</dt><dd>{value}</dd></div>", name=name, value=value)
        for name, value in pairs
    ]
    return fill('<dl class="boxes">{inner}</dl>', inner=inner)


def facts(pairs: Iterable[tuple[object, object]]) -> Html:
    """Return names and values as a table of two columns."""
    inner = [
        fill('<tr><th scope="row">{name}</th><td>{value}</td></tr>', name=name, value=value)
        for name, value in pairs
    ]
    return fill('<table class="facts"><tbody>{inner}</tbody></table>', inner=inner)


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, caption: object) -> Html:
    """Return a table with a caption. On a narrow screen it scrolls by itself."""
    top = [fill('<th scope="col">{one}</th>', one=one) for one in head]
    body = [
        fill("<tr>{cells}</tr>", cells=[fill("<td>{one}</td>", one=one) for one in row])
        for row in rows
    ]
    return fill(
        '<div class="wide" tabindex="0"><table><caption><span>{caption}</span></caption>'
        "<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>",
        caption=caption, top=top, body=body,
    )  # fmt: skip


_MARKS = {"yes": "\u2611", "no": "\u2610", "doubt": "\u2612"}


def checklist(rows: Iterable[tuple[str, str, object, object, object]]) -> Html:
    """Return a check list.

    Args:
        rows: For each entry its id ("" for none), its mark ("yes": the software looks at it; "no":
            a person has to; "doubt": a monitor doubts it), its name, its statement, and who looks
            at it.
    """
    inner = [
        fill(
            '<li{id} class="{mark}"><span class="box" aria-hidden="true">{box}</span>'
            '{tag}<strong>{name}.</strong> {statement} <span class="who">{who}</span></li>',
            id=fill(' id="{i}"', i=i) if i else None,
            tag=fill('<span class="tag">{i}</span> ', i=i) if i else None,
            mark=mark, box=_MARKS[mark], name=name, statement=statement, who=who,
        )
        for i, mark, name, statement, who in rows
    ]  # fmt: skip
    key = (
        '<p class="note">\u2611 The software compares it, as far as the text says. '
        "\u2610 A person has to confirm it. "
        "\u2612 A monitor doubts it.</p>"
    )
    return fill(key + '<ul class="checks">{inner}</ul>', inner=inner)


def figure(drawing: Html, caption: object, legend: Sequence[tuple[Html, object]] = ()) -> Html:
    """Return a drawing with its caption, and a legend of swatches and names."""
    entries = [fill("<li>{swatch} {name}</li>", swatch=one, name=name) for one, name in legend]
    key = fill('<ul class="legend">{entries}</ul>', entries=entries) if entries else Html("")
    template = "<figure>{drawing}{key}<figcaption>{caption}</figcaption></figure>"
    return fill(template, drawing=drawing, key=key, caption=caption)


def figures(drawn: Iterable[Html]) -> Html:
    """Return figures side by side where the page is wide enough."""
    return fill('<div class="figures">{drawn}</div>', drawn=list(drawn))


def link(name: str, text: object = None) -> Html:
    """Return a link to the part of the page with the id `name`."""
    template = '<a href="#{name}">{text}</a>'
    return fill(template, name=name, text=name if text is None else text)


def links(names: Iterable[str]) -> Html:
    """Return links to several parts of the page, separated by commas."""
    return joined(map(link, names), ", ")


_STYLE = """
:root {
  --paper: #fff; --ink: #1d2329; --soft: #59636e; --line: #d4d9de; --panel: #f4f6f8;
  --link: #0b5fa5; --good: #1a6e4b; --doubt: #8a5a00; --bad: #ad2a12;
  --c0: #0072b2; --c1: #b87700; --c2: #008a66; --c3: #a6517f; --c4: #d55e00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181c; --ink: #e4e8ec; --soft: #a3adb7; --line: #3a434b; --panel: #1e242a;
    --link: #7cc0f5; --good: #6fd0a3; --doubt: #e9bb5c; --bad: #ff9a82;
    --c0: #56b4e9; --c1: #f0b53c; --c2: #3ecfa2; --c3: #dd9abf; --c4: #ff8a4c;
  }
}
* { box-sizing: border-box; }
html { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem 1.25rem 3rem; background: var(--paper);
  color: var(--ink); overflow-wrap: anywhere; }
a { color: var(--link); }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .1rem 0 .8rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .8rem; padding-top: .8rem;
  border-top: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .5rem; }
h4 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p, ul, ol { margin: .5rem 0; max-width: 46rem; }
li { margin: .3rem 0; }
.kind, .made, .note, figcaption, caption, footer, .who { color: var(--soft); font-size: .9rem; }
.kind { margin: 0; }
.state { border-left: .35rem solid var(--soft); background: var(--panel); padding: .7rem 1rem;
  font-weight: 600; max-width: none; }
.state.good { border-color: var(--good); } .state.doubt { border-color: var(--doubt); }
.state.bad { border-color: var(--bad); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0;
  max-width: none; font-size: .95rem; }
nav li { margin: 0; }
blockquote { margin: .8rem 0; padding: .7rem 1rem; background: var(--panel);
  border-left: .35rem solid var(--line); }
.boxes { display: grid; gap: .8rem; margin: .8rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
.boxes div { border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .9rem; }
.boxes dt { font-weight: 700; margin-bottom: .25rem; }
.boxes dd { margin: 0; }
.boxes ul { padding-left: 1.1rem; margin: 0; }
table { border-collapse: collapse; font-size: .92rem; margin: .7rem 0; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0;
  border-bottom: 1px solid var(--line); }
.facts { width: 100%; }
.facts th { width: 13rem; font-weight: 600; }
.wide { overflow-x: auto; }
caption span { display: block; position: sticky; left: 0; max-width: calc(100vw - 1.8rem); }
.wide th, .wide td { overflow-wrap: normal; font-variant-numeric: tabular-nums; }
.tag { font-size: .78rem; font-weight: 700; color: var(--soft); border: 1px solid var(--line);
  border-radius: .25rem; padding: 0 .3rem; white-space: nowrap; }
.checks { list-style: none; padding: 0; }
.checks li { position: relative; padding-left: 1.9rem; margin: .6rem 0; }
.checks .box { position: absolute; left: 0; top: -.1rem; font-size: 1.25rem; line-height: 1.5; }
.checks .yes .box { color: var(--good); } .checks .doubt .box { color: var(--bad); }
.who { display: block; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
  gap: 1rem 1.5rem; }
figure { margin: .6rem 0; }
figure > svg { display: block; width: 100%; max-width: 30rem; height: auto; }
figcaption { max-width: 30rem; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1rem;
  font-size: .88rem; }
.legend li { margin: 0; } .legend svg { width: 1.1rem; height: .8rem; }
svg text { fill: var(--ink); font-size: 11px; font-family: inherit; }
svg text { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
svg .soft { fill: var(--soft); }
svg .axis, svg .grid { stroke: var(--line); fill: none; } svg .axis { stroke: var(--soft); }
svg .limit { stroke: var(--c4); stroke-dasharray: 5 3; fill: none; stroke-width: 1.4; }
svg .chosen { stroke: var(--ink); stroke-dasharray: 2 3; fill: none; }
svg .line { fill: none; stroke-width: 1.7; }
svg .open { fill: var(--paper); stroke-width: 1.7; }
svg .k0 { stroke: var(--c0); } svg .k1 { stroke: var(--c1); } svg .k2 { stroke: var(--c2); }
svg .k3 { stroke: var(--c3); } svg .k4 { stroke: var(--c4); }
svg .f0 { fill: var(--c0); } svg .f1 { fill: var(--c1); } svg .f2 { fill: var(--c2); }
svg .f3 { fill: var(--c3); } svg .f4 { fill: var(--c4); }
footer { margin-top: 2.5rem; border-top: 2px solid var(--line); }
@media (max-width: 34rem) {
  body { padding: .8rem .9rem 2rem; }
  .facts, .facts tbody, .facts tr, .facts th, .facts td { display: block; width: auto; }
  svg text { font-size: 12.5px; }
  .facts th { border: 0; padding: .5rem 0 0; } .facts td { padding-top: 0; }
}
@media print {
  :root {
    --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --panel: #f4f4f4; --link: #000;
    --good: #1a6e4b; --doubt: #8a5a00; --bad: #ad2a12;
    --c0: #0072b2; --c1: #b87700; --c2: #008a66; --c3: #a6517f; --c4: #d55e00;
  }
  @page { margin: 18mm 16mm; }
  html { font-size: 10.5pt; } body { max-width: none; padding: 0; }
  nav { display: none; } a { text-decoration: none; }
  .wide { overflow: visible; }
  figure, tr, blockquote, .checks li, .boxes div { break-inside: avoid; }
  h2, h3, h4, caption { break-after: avoid; }
}
"""
