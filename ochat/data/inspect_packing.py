"""The packed rows of the first steps as a picture: what `ochat inspect --packing` writes.

prepared dataset -> the Loader that trains -> `PackingPicture`, plain numbers -> a PNG. matplotlib is loaded when one
is drawn, without pyplot: no display is needed, and nobody's figures or settings are touched.
S documents (conversations) in a row.
"""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.text import Text

from ochat.config import Config
from ochat.data.loader import EpochPlan, Loader
from ochat.data.prepare import open_prepared
from ochat.data.store import Manifest, PreparedSplit
from ochat.data.template import get_template, writes_condition
from ochat.data.tokenize import load_tokenizer
from ochat.data.weights import item_weights, weight_sums
from ochat.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_STEPS = 4
MAX_ROWS = 64  # drawn, of all steps: more would be too thin to read, or too long to scroll

# Okabe and Ito's seven and five dark ones: for no kind of colour-blindness are any two closer than two of the seven.
COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442",
    "#4b0000", "#000096", "#962d00", "#693c69", "#a569ff",
)  # fmt: skip
HATCHES = ("", "///", "...", "xxx")  # of the first twelve sources, the next twelve, ...
ROOM_COLOUR, ROOM_HATCH, ROOM_HATCH_COLOUR = "#f0f0f0", "/////", "#b5b5b5"
INK, FAINT_INK = "#1b2330", "#5f6875"

# Inches, so that texts keep clear of each other however many rows and sources there are.
WIDTH, LEFT, RIGHT, BOTTOM = 11.0, 0.75, 0.4, 0.65
TITLE_HEIGHT, LINE_HEIGHT, STEP_GAP = 0.85, 0.22, 0.38
COLUMNS = (0.3, 3.3, 6.8, 8.3, 9.85)  # of the legend: name, condition; right ends of weight and the two shares
NAME_CELLS, CONDITION_CELLS = 34, 24
FONT_SIZE, DPI = 9, 130


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnRow:
    """A row: document s is of source source_ids[s] and has tokens bounds[s] to bounds[s + 1]. S = 0: padding."""

    source_ids: NDArray[np.int32]  # [S]
    bounds: NDArray[np.int64]  # [S + 1], from 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnStep:
    """rows: the first of the step's; fill: tokens of all its rows / tokens they could hold."""

    index: int
    rows: tuple[DrawnRow, ...]
    fill: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnSource:
    """A source and its part in the steps drawn, rows that are not drawn included.

    conditions  of its conversations; None: the template writes none
    weights     lowest and highest factor of its conversations; None: it has no conversations
    tokens      its share of the steps' tokens
    weight      its share of the steps' loss weight
    """

    name: str
    conditions: tuple[str, ...] | None
    weights: tuple[float, float] | None
    tokens: float
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingPicture:
    """The first steps of the first epoch, which has num_steps; fill is the plan's, of rows that are not empty."""

    run_name: str
    rows_per_step: int
    row_tokens: int
    num_steps: int
    fill: float
    steps: tuple[DrawnStep, ...]
    sources: tuple[DrawnSource, ...]


def write_packing(config: Config, prepare_command: str, path: Path, *, num_steps: int | None = None) -> Path:
    """The path of the picture written."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--packing {path}: the picture is a PNG. Give it a name that ends in .png.")
    template = get_template(config.model.template)
    tokenizer = load_tokenizer(config.tokenizer_name_or_path, template)
    manifest, split = open_prepared(config, template, tokenizer, prepare_command)
    png = render_png(packing_picture(config, manifest, split, num_steps=num_steps or NUM_STEPS))
    try:
        path.write_bytes(png)
    except OSError as exc:
        raise ConfigError(
            f"--packing {path}: cannot be written ({exc.strerror}). Name a file in a folder you may write to."
        ) from exc
    return path


def packing_picture(config: Config, manifest: Manifest, split: PreparedSplit, *, num_steps: int) -> PackingPicture:
    """The first `num_steps` steps, or as many as the run has."""
    loader = Loader(config, split)
    epoch = loader.epoch_plan(0)
    plan = epoch.plan
    num_drawn = min(num_steps, plan.num_steps, loader.schedule.total_steps)
    num_rows = min(plan.rows_per_step, max(1, MAX_ROWS // num_drawn))
    source_id = split.column("source_id")
    steps = []
    for index in range(num_drawn):
        rows = [epoch.items[row] for row in plan.step(index)]
        num_tokens = int(split.lengths[np.concatenate(rows)].sum())
        drawn = (
            DrawnRow(source_ids=source_id[row], bounds=np.cumsum([0, *split.lengths[row]])) for row in rows[:num_rows]
        )
        fill = num_tokens / (plan.rows_per_step * plan.row_tokens)
        steps.append(DrawnStep(index=index, rows=tuple(drawn), fill=fill))
    return PackingPicture(
        run_name=config.run.name,
        rows_per_step=plan.rows_per_step,
        row_tokens=plan.row_tokens,
        num_steps=plan.num_steps,
        fill=plan.fill,
        steps=tuple(steps),
        sources=_sources(config, manifest, split, epoch, num_drawn),
    )


def _sources(
    config: Config, manifest: Manifest, split: PreparedSplit, epoch: EpochPlan, num_drawn: int
) -> tuple[DrawnSource, ...]:
    items = epoch.items[np.concatenate([row for index in range(num_drawn) for row in epoch.plan.step(index)])]
    source_id, factors, number = split.column("source_id"), item_weights(config, split), len(config.data.sources)
    tokens = np.bincount(source_id[items], split.lengths[items], minlength=number)
    weight = np.bincount(source_id[items], weight_sums(config, split)[items], minlength=number)
    written = writes_condition(get_template(config.model.template))
    sources = []
    for position, source in enumerate(config.data.sources):
        mine = factors[source_id == position]
        sources.append(
            DrawnSource(
                name=source.name,
                conditions=tuple(manifest.counts[source.name]["conditions"]) if written else None,
                weights=(float(mine.min()), float(mine.max())) if len(mine) else None,
                tokens=float(tokens[position] / tokens.sum()),
                # Steps may hold nothing but sources of weight 0.
                weight=float(weight[position] / (weight.sum() or 1.0)),
            )
        )
    return tuple(sources)


def render_png(picture: PackingPicture) -> bytes:
    """The picture as the bytes of a PNG file."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = BytesIO()
    with style.context("default"):  # the user's matplotlibrc may ask for LaTeX, or for black paper
        FigureCanvasAgg(_figure(picture)).print_png(file)
    return file.getvalue()


def _figure(picture: PackingPicture) -> "Figure":
    """Heading above rows; both have inches downwards as their y."""
    from matplotlib.figure import Figure

    num_rows = len(picture.steps[0].rows)
    row_height = 0.34 if num_rows * len(picture.steps) <= 16 else 0.22  # few rows can be tall
    heading_height = TITLE_HEIGHT + LINE_HEIGHT * (len(picture.sources) + 2)
    rows_height = (STEP_GAP + row_height * num_rows) * len(picture.steps)
    height, width = heading_height + rows_height + BOTTOM, WIDTH - LEFT - RIGHT
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    rows = figure.add_axes((LEFT / WIDTH, BOTTOM / height, width / WIDTH, rows_height / height))
    rows.set(xlim=(0, picture.row_tokens), ylim=(rows_height, 0))
    _draw_rows(rows, picture, row_height)
    heading = figure.add_axes((LEFT / WIDTH, 1 - heading_height / height, width / WIDTH, heading_height / height))
    heading.set(xlim=(0, width), ylim=(heading_height, 0))
    heading.axis("off")
    _draw_heading(heading, picture)
    return figure


def _draw_heading(axes: "Axes", picture: PackingPicture) -> None:
    """The title, and a line for each source; x is inches too."""
    last = len(picture.steps) - 1
    step = f"{_count(picture.rows_per_step, 'row')} x {picture.row_tokens:,} tokens a step"
    epoch = f"first epoch: {_count(picture.num_steps, 'step')}, rows {_percent(picture.fill)} full"
    _write(axes, 0, 0.3, _elided(f"{picture.run_name}: packed rows", 60), fontsize=14, fontweight="bold")
    _write(axes, 0, 0.58, f"{step}; {epoch}", color=FAINT_INK)
    drawn = f"steps 0-{last}" if last else "step 0"
    lines = [("source", "condition", "weight", f"tokens, {drawn}", f"loss weight, {drawn}")]
    for s in picture.sources:
        name, condition = _elided(s.name, NAME_CELLS), _elided(_condition_text(s), CONDITION_CELLS)
        lines.append((name, condition, _weight_text(s), _percent(s.tokens), _percent(s.weight)))
    for number, cells in enumerate([*lines, ("room left", "", "", "", "")]):
        y = TITLE_HEIGHT + LINE_HEIGHT * (number + 0.5)
        colour = INK if 0 < number < len(lines) else FAINT_INK
        for column, (x, cell) in enumerate(zip(COLUMNS, cells, strict=True)):
            _write(axes, x, y, cell, ha="left" if column < 2 else "right", color=colour)
        if number:
            _draw_boxes(axes, _box(0, 0.2, y - 0.065, y + 0.065), number - 1 if number < len(lines) else None)


def _draw_rows(axes: "Axes", picture: PackingPicture, row_height: float) -> None:
    """Every step's label, then its rows to scale."""
    documents, rooms, centres, names = [], [], [], []
    y = 0.0
    for step in picture.steps:
        _write(axes, 0, y + 0.22, f"step {step.index}, fill {_percent(step.fill)}", fontweight="bold")
        if len(step.rows) < picture.rows_per_step:
            shown = f"rows 0-{len(step.rows) - 1}" if len(step.rows) > 1 else "row 0"
            shown += f" of {picture.rows_per_step:,}"
            _write(axes, picture.row_tokens, y + 0.22, shown, ha="right", color=FAINT_INK)
        y += STEP_GAP
        for number, row in enumerate(step.rows):
            top, bottom = y + 0.1 * row_height, y + 0.9 * row_height
            documents.append(_box(row.bounds[:-1], row.bounds[1:], top, bottom))
            rooms.append(_box(row.bounds[-1], picture.row_tokens, top, bottom))
            centres.append(y + row_height / 2)
            names.append(f"row {number}")
            y += row_height
    boxes, room = np.concatenate(documents), np.concatenate(rooms)
    source_ids = np.concatenate([row.source_ids for step in picture.steps for row in step.rows])
    points = (boxes[:, 1, 0] - boxes[:, 0, 0]) * 72 * (WIDTH - LEFT - RIGHT) / picture.row_tokens
    for position in range(len(picture.sources)):
        mine = source_ids == position
        # White lines between documents; thinner around short ones, of which nothing else would be seen.
        _draw_boxes(axes, boxes[mine], position, line=np.minimum(0.8, points[mine] / 5))
    _draw_boxes(axes, room[room[:, 1, 0] > room[:, 0, 0]], None)
    _label_axes(axes, picture.row_tokens, centres, names)


def _label_axes(axes: "Axes", row_tokens: int, centres: list[float], names: list[str]) -> None:
    axes.set_yticks(centres, names)
    ticks = np.linspace(0, row_tokens, 5).round().astype(int).tolist()
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("token of the row", color=FAINT_INK, fontsize=FONT_SIZE)
    axes.tick_params(length=0, labelsize=FONT_SIZE - 1, labelcolor=FAINT_INK)
    axes.spines[:].set_visible(False)


def _box(left: ArrayLike, right: ArrayLike, top: float, bottom: float) -> NDArray[np.float64]:
    """Corners [n, 4, 2] of n boxes beside each other."""
    left, right = np.atleast_1d(left), np.atleast_1d(right)
    xs = np.stack([left, right, right, left], axis=1)
    return np.stack([xs, np.broadcast_to([top, top, bottom, bottom], xs.shape)], axis=2).astype(np.float64)


def _draw_boxes(axes: "Axes", boxes: NDArray[np.float64], source: int | None, *, line: ArrayLike = 0.0) -> None:
    """Boxes [n, 4, 2] in the colour of a source; None: of room that is left. One collection: patches are slow."""
    from matplotlib.collections import PolyCollection

    cycle, colour = divmod(source or 0, len(COLOURS))
    face, edge, hatch = COLOURS[colour], "white", HATCHES[cycle % len(HATCHES)]
    if source is None:
        face, edge, hatch = ROOM_COLOUR, ROOM_HATCH_COLOUR, ROOM_HATCH
    drawn = PolyCollection(list(boxes), facecolors=face, edgecolors=edge, hatch=hatch, linewidths=np.atleast_1d(line))
    axes.add_collection(drawn, autolim=False)


def _write(axes: "Axes", x: float, y: float, text: str, **look: Any) -> None:
    # A name may hold dollar signs; it is no formula.
    axes.text(x, y, text, **{"va": "center", "fontsize": FONT_SIZE, "color": INK, "parse_math": False, **look})


def _elided(text: str, cells: int) -> str:
    """On one line, and cut to a width: names and conditions may be anything."""
    line = Text(" ".join(text.split()))
    line.truncate(cells, overflow="ellipsis")
    return line.plain


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _condition_text(source: DrawnSource) -> str:
    if source.conditions is None:
        return "not written"
    return ", ".join(condition or "none" for condition in source.conditions)


def _weight_text(source: DrawnSource) -> str:
    if source.weights is None:
        return "no conversations"
    low, high = (f"{weight:.4g}" for weight in source.weights)
    return low if low == high else f"{low} to {high}"
