"""An inspection as one page: no script, nothing loaded from elsewhere, every text escaped.

The page forbids scripts and foreign content by itself as well (its Content-Security-Policy), should an escape ever be
forgotten. Style is inspect_style.css's, put inside.
"""

from html import escape
from importlib.resources import files
from pathlib import Path

from ochat.data.inspect import InspectedConversation, InspectedRow, Inspection, LegendEntry
from ochat.data.inspect_tokens import Token, Turn, glyphs
from ochat.errors import ConfigError

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# Sources beyond these share colours; the tooltip names the file all the same.
NUM_SOURCE_COLOURS = 8


def write_page(inspection: Inspection, path: Path) -> Path:
    """The path of the page written."""
    try:
        path.write_text(render_page(inspection), encoding="utf-8")
    except OSError as exc:
        raise ConfigError(
            f"--html {path}: cannot be written ({exc.strerror}). Name a file in a folder you may write to."
        ) from exc
    return path


def render_page(inspection: Inspection) -> str:
    conversations = "\n".join(_conversation(inspection, c) for c in inspection.conversations)
    rows = "\n".join(_row(index, row) for index, row in enumerate(inspection.rows))
    style = files("ochat.data").joinpath("inspect_style.css").read_text(encoding="utf-8")
    title = f"ochat inspect: {escape(inspection.run_name)}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(inspection.run_name)} <small>what will be trained</small></h1>
<p class="facts">{_facts(inspection)}</p>
{_legend(inspection)}
</header>
<main>
<section id="conversations">
<h2>Conversations <small>{len(inspection.conversations)} shown, tokens as the model sees them</small></h2>
{conversations}
</section>
<section id="rows">
<h2>Packed rows <small>step 0 of {inspection.num_steps:,}, to scale</small></h2>
{_source_key(inspection)}
{rows}
</section>
</main>
</body>
</html>
"""


def _facts(inspection: Inspection) -> str:
    facts = (
        ("template", inspection.template),
        ("max_length", f"{inspection.max_length:,}"),
        ("dataset", inspection.prepared_dir),
        ("fingerprint", inspection.fingerprint[:12]),
    )
    return " ".join(f"<span><b>{name}</b> {escape(value)}</span>" for name, value in facts)


def _legend(inspection: Inspection) -> str:
    keys = "".join(_legend_key(entry) for entry in inspection.legend())
    return (
        f'<div class="legend" role="list" aria-label="colour of weights"><b>weight</b>{keys}'
        '<span role="listitem"><span class="t control">control</span> special token</span>'
        '<span role="listitem"><span class="t prefix">prefix</span> role and condition</span>'
        '<span role="listitem"><i class="mark">↵ ⇥ ‹F0›</i> newline, tab, part of a character</span></div>'
    )


def _legend_key(entry: LegendEntry) -> str:
    numbers = f"{entry.lowest:.4g}"
    if f"{entry.highest:.4g}" != numbers:
        numbers += f" to {entry.highest:.4g}"
    meaning = "" if entry.level else "context, "
    return (
        f'<span role="listitem"><span class="t w{entry.level}">{numbers}</span> '
        f"{meaning}{entry.num_tokens:,} tokens</span>"
    )


def _conversation(inspection: Inspection, conversation: InspectedConversation) -> str:
    facts = (
        ("source", conversation.source),
        ("condition", conversation.condition_text),
        ("weight", f"{conversation.weight:.4g}"),
        ("tokens", f"{conversation.num_tokens:,}"),
        ("supervised", f"{conversation.num_supervised:,}"),
        ("weight sum", f"{conversation.weight_sum:.4g}"),
        ("trained in", conversation.place_text),
    )
    shown = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    turns = "\n".join(_turn(inspection, turn) for turn in conversation.turns)
    cut = '<p class="cut">✂ the conversation was cut here</p>\n' if conversation.cut else ""
    return (
        f"<article>\n<h3>{escape(conversation.where)}</h3>\n<dl>{shown}</dl>\n"
        f'<div class="tokens">\n{turns}\n</div>\n{cut}<p class="ending">{escape(conversation.ending)}</p>\n</article>'
    )


def _turn(inspection: Inspection, turn: Turn) -> str:
    tokens = "".join(_token(token, inspection.level(token)) for token in turn.tokens)
    return f'<div class="turn">{tokens}</div>'


def _token(token: Token, level: int) -> str:
    drawn = "".join(
        (f'<i class="mark">{escape(g.text)}</i>' + "\n" * g.newline) if g.mark else escape(g.text)
        for g in glyphs(token)
    )
    kind = "" if token.kind == "content" else f" {token.kind}"
    return f'<span class="t w{level}{kind}" title="id {token.id}, weight {token.weight:.4g}">{drawn}</span>'


def _source_key(inspection: Inspection) -> str:
    keys = "".join(
        f'<span role="listitem"><span class="swatch s{n % NUM_SOURCE_COLOURS}"></span>{escape(name)}</span>'
        for n, name in enumerate(inspection.sources)
    )
    return f'<div class="legend" role="list" aria-label="colour of sources"><b>source</b>{keys}</div>'


def _row(index: int, row: InspectedRow) -> str:
    bar, table = [], []
    for document in row.documents:
        length = document.end - document.start
        where, colour = escape(document.where), f"s{document.source_id % NUM_SOURCE_COLOURS}"
        title = f"{where}: {length:,} tokens, {document.start:,} to {document.end:,}, weight {document.weight:.4g}"
        bar.append(f'<span class="{colour}" style="width:{100 * length / row.row_tokens:.4f}%" title="{title}"></span>')
        table.append(
            f'<tr><td><span class="swatch {colour}"></span>{where}</td><td>{document.start:,}</td>'
            f"<td>{length:,}</td><td>{document.weight:.4g}</td><td>{document.weight_sum:.4g}</td></tr>"
        )
    documents = (
        "<table><thead><tr><th>conversation</th><th>starts at</th><th>tokens</th><th>weight</th><th>weight sum</th>"
        f"</tr></thead><tbody>{''.join(table)}</tbody></table>"
        if table
        else "<p>padding: it runs with weight 0</p>"
    )
    return (
        f'<details class="row"><summary><b>row {index}</b><span class="bar">{"".join(bar)}</span>'
        f"<span>{row.fill:.1%} full, {len(row.documents)} documents, {row.num_tokens:,} of {row.row_tokens:,} tokens"
        f"</span></summary>{documents}</details>"
    )
