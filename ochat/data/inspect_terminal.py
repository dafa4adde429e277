"""An inspection on the terminal: colour is weight; without colour, brackets are.

Where colours cannot be seen (a pipe, a file, NO_COLOR) supervised runs stand in brackets with their weight, and "¦"
divides tokens; on a terminal every other token is underlined. 16 colours are enough.
"""

from itertools import groupby

from rich.console import Console
from rich.text import Text

from ochat.data.inspect import InspectedConversation, InspectedRow, Inspection
from ochat.data.inspect_tokens import Token, Turn, glyphs

# By level of weight, 0 = context. All of the 16 basic colours, black letters on light grounds.
LEVEL_STYLES = ("", "white on magenta", "white on blue", "black on cyan", "black on green", "black on bright_green")
KIND_STYLES = {"control": "bold", "prefix": "bold", "content": ""}
CONTEXT_KIND_STYLES = {"control": "bold magenta", "prefix": "bold yellow", "content": ""}
SOURCE_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")
BAR_WIDTH = 72
DOCUMENTS_SHOWN = 6


def print_inspection(inspection: Inspection, console: Console | None = None) -> None:
    """Conversations, legend, packed rows. A pipe gets whole lines, whatever their length."""
    console = console or Console()
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    printed = [_heading(inspection), _legend(inspection, coloured)]
    printed += [_conversation(inspection, conversation, coloured) for conversation in inspection.conversations]
    # The legend again: the first one has scrolled away, and the eye is at the end.
    printed += [_legend(inspection, coloured)] if coloured else []
    printed += [_rows(inspection, coloured)]
    for text in printed:
        console.print(text, soft_wrap=not console.is_terminal, overflow="fold" if console.is_terminal else None)


def weight_text(weight: float) -> str:
    return f"{weight:.4g}"


def _heading(inspection: Inspection) -> Text:
    return Text.assemble(
        (f"{inspection.run_name}", "bold"),
        f"  {inspection.prepared_dir} ({inspection.fingerprint[:12]})  template {inspection.template}, "
        f"max_length {inspection.max_length}\n",
    )


def _legend(inspection: Inspection, coloured: bool) -> Text:
    text = Text("weight  ")
    for entry in inspection.legend():
        numbers = weight_text(entry.lowest)
        if weight_text(entry.highest) != numbers:
            numbers += f" to {weight_text(entry.highest)}"
        label = f" {numbers} " if entry.level else f" {numbers} context "
        text.append(label, LEVEL_STYLES[entry.level] if coloured else "")
        text.append(f" {entry.num_tokens:,} tokens   ")
    if coloured:
        text.append("control", CONTEXT_KIND_STYLES["control"]).append("  ")
        text.append("prefix", CONTEXT_KIND_STYLES["prefix"]).append("  every other token underlined\n")
    else:
        text.append("\n[weight: supervised tokens]  ¦ divides tokens  ↵ newline  ⇥ tab  ‹F0› a byte of a character\n")
    return text


def _conversation(inspection: Inspection, conversation: InspectedConversation, coloured: bool) -> Text:
    text = Text.assemble(
        (conversation.where, "bold"),
        f"  source {conversation.source}, condition {conversation.condition_text}, "
        f"weight {weight_text(conversation.weight)}\n",
        f"{conversation.num_tokens:,} tokens, {conversation.num_supervised:,} supervised, "
        f"weight sum {weight_text(conversation.weight_sum)}; {conversation.place_text}\n",
        (f"{'✂ ' if conversation.cut else ''}{conversation.ending}\n", "bold red" if conversation.cut else ""),
    )
    at = 0
    for turn in conversation.turns:
        text.append("\n")
        if coloured:
            for token in turn.tokens:
                _append_coloured(text, token, inspection.level(token), odd=at % 2 == 1)
                at += 1
        else:
            text.append(_marked(turn))
    if conversation.cut:
        text.append(" ✂", "bold red")
    return text.append("\n")


def _append_coloured(text: Text, token: Token, level: int, *, odd: bool) -> None:
    kinds = KIND_STYLES if level else CONTEXT_KIND_STYLES
    style = f"{LEVEL_STYLES[level]} {kinds[token.kind]}{' underline' if odd else ''}".strip()
    for glyph in glyphs(token):
        text.append(glyph.text, f"{style} italic".strip() if glyph.mark else style)
        if glyph.newline:
            text.append("\n")


def _marked(turn: Turn) -> str:
    """A turn without colours: `GPT4¦ User¦:¦ Hi¦<|end_of_turn|>`, supervised runs as `[0.1: Hello¦<|end_of_turn|>]`."""
    runs = []
    for weight, run in groupby(turn.tokens, key=lambda token: token.weight):
        tokens = "¦".join("".join(g.text + "\n" * g.newline for g in glyphs(token)) for token in run)
        runs.append(f"[{weight_text(weight)}: {tokens}]" if weight else tokens)
    return "¦".join(runs)


def _rows(inspection: Inspection, coloured: bool) -> Text:
    text = Text.assemble((f"step 0 of {inspection.num_steps:,}", "bold"), f": {len(inspection.rows)} packed rows")
    if coloured:
        for position, name in enumerate(inspection.sources):
            text.append(f"  ▓ {name}", SOURCE_COLOURS[position % len(SOURCE_COLOURS)])
    text.append("\n")
    for index, row in enumerate(inspection.rows):
        text.append(f"row {index:<3}").append(_bar(row, coloured))
        text.append(f" {row.num_tokens:,} of {row.row_tokens:,} tokens, {row.fill:.1%}\n")
        shown = [f"{d.where} ({d.end - d.start:,})" for d in row.documents[:DOCUMENTS_SHOWN]]
        if len(row.documents) > DOCUMENTS_SHOWN:
            shown.append(f"and {len(row.documents) - DOCUMENTS_SHOWN:,} more")
        text.append("      " + (", ".join(shown) or "padding: runs with weight 0") + "\n")
    return text


def _bar(row: InspectedRow, coloured: bool) -> Text:
    """A row to scale: documents alternate in shade so that their boundaries show, dots are room left."""
    bar = Text()
    for position, document in enumerate(row.documents):
        start, end = (edge * BAR_WIDTH // row.row_tokens for edge in (document.start, document.end))
        colour = SOURCE_COLOURS[document.source_id % len(SOURCE_COLOURS)] if coloured else ""
        bar.append("▓░"[position % 2] * (end - start), colour)
    return bar.append("·" * (BAR_WIDTH - len(bar)))
