"""The picture of packed rows: its numbers are the loader's batches, its colours tell sources apart.

Positions in the picture are found by the drawing's own constants of layout.
"""

import struct
from dataclasses import replace
from io import BytesIO
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from typer.testing import CliRunner, Result

from ochat.cli import app
from ochat.config import load_config
from ochat.data import inspect_packing
from ochat.data.inspect_packing import (
    BOTTOM,
    COLOURS,
    DPI,
    LEFT,
    RIGHT,
    ROOM_COLOUR,
    ROOM_HATCH_COLOUR,
    WIDTH,
    DrawnRow,
    DrawnSource,
    DrawnStep,
    PackingPicture,
    packing_picture,
    render_png,
    write_packing,
)
from ochat.data.loader import Loader
from ochat.data.prepare import prepare
from ochat.data.store import TRAIN_SPLIT, Manifest, PreparedSplit
from ochat.errors import ConfigError, DataError
from tests.experiment import make_experiment, write_experiment
from tests.launch import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared experiment: expert 30 chats at 1.0, crowd 90 at 0.1; a step is 4 rows of 256 tokens."""
    folder = tmp_path_factory.mktemp("packing")
    prepare(make_experiment(folder))
    return folder


def load(folder: Path, *overrides: str):
    config = load_config(folder / "experiment.yaml", overrides)
    return config, PreparedSplit(Path(config.data.prepared_dir) / TRAIN_SPLIT)


def picture_of(folder: Path, *overrides: str, num_steps: int = 4) -> PackingPicture:
    config, split = load(folder, *overrides)
    return packing_picture(config, Manifest.read(Path(config.data.prepared_dir)), split, num_steps=num_steps)


def drawn_rows(picture: PackingPicture) -> list[tuple[list[int], list[int]]]:
    return [(row.bounds.tolist(), row.source_ids.tolist()) for step in picture.steps for row in step.rows]


def trained_rows(loader: Loader, num_steps: int, epoch: int = 0) -> list[tuple[list[int], list[int]]]:
    batches = [batch for index in range(num_steps) for batch in loader.step(epoch, index).batches]
    return [(batch.cu_seqlens.tolist(), batch.source_ids.tolist()) for batch in batches]


# --- what is drawn


def test_rows_have_the_boundaries_and_sources_of_the_batches_that_train_them(folder: Path):
    loader, drawn = Loader(*load(folder)), drawn_rows(picture_of(folder))

    assert drawn == trained_rows(loader, 4)
    assert drawn != trained_rows(loader, 4, epoch=1)
    assert drawn != drawn_rows(picture_of(folder, "run.seed=1"))


def test_a_repeated_source_is_drawn_as_often_as_it_is_trained(folder: Path):
    override = "data.sources.0.repeat=3"

    assert drawn_rows(picture_of(folder, override)) == trained_rows(Loader(*load(folder, override)), 4)
    assert drawn_rows(picture_of(folder, override)) != drawn_rows(picture_of(folder))


def test_the_fill_of_a_step_is_the_training_steps_and_that_of_the_epoch_the_plans(folder: Path):
    eight_rows = "batch.global_batch_tokens=2048"  # a step, of which the last one has four
    loader, shown = Loader(*load(folder, eight_rows)), picture_of(folder, eight_rows, num_steps=64)
    last = loader.step(0, shown.num_steps - 1)

    assert [step.fill for step in shown.steps] == [loader.step(0, n).fill for n in range(shown.num_steps)]
    assert last.fill < 0.9  # it holds what was left over
    assert shown.fill == loader.epoch_plan(0).plan.fill


@pytest.mark.parametrize(
    "overrides", [(), ("loss.weighting=message",), ("data.sources.0.repeat=3", "data.sources.1.weight=3")]
)
def test_a_sources_shares_are_those_of_the_batches_tokens_and_loss_weights(folder: Path, overrides: tuple[str, ...]):
    loader, shown = Loader(*load(folder, *overrides)), picture_of(folder, *overrides, num_steps=2)
    tokens, weight = np.zeros(2), np.zeros(2)
    for batch in (batch for index in range(2) for batch in loader.step(0, index).batches):
        lengths = np.diff(batch.cu_seqlens.numpy())
        of_token = np.repeat(batch.source_ids.numpy(), lengths)
        tokens += np.bincount(of_token, minlength=2)
        weight += np.bincount(of_token, batch.loss_weights.numpy(), minlength=2)

    assert [source.tokens for source in shown.sources] == pytest.approx(tokens / tokens.sum())
    assert [source.weight for source in shown.sources] == pytest.approx(weight / weight.sum(), rel=1e-5)
    assert shown.sources[0].weight != pytest.approx(shown.sources[0].tokens, rel=0.1)


def test_shares_count_the_rows_that_are_not_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch):
    whole = picture_of(folder)
    monkeypatch.setattr(inspect_packing, "MAX_ROWS", 4)
    limited = picture_of(folder)

    assert [len(step.rows) for step in limited.steps] == [1] * 4
    assert limited.sources == whole.sources
    assert [step.fill for step in limited.steps] == [step.fill for step in whole.steps]


def test_a_source_has_the_conditions_of_its_rows_and_the_weights_it_is_trained_with(folder: Path, tmp_path: Path):
    expert, crowd = picture_of(folder, "data.sources.1.weight=0.3").sources
    config = make_experiment(tmp_path, "model.template=chatml")

    assert (expert.name, expert.conditions, expert.weights) == ("expert", ("GPT4",), (1.0, 1.0))
    assert (crowd.name, crowd.conditions, crowd.weights) == ("crowd", ("GPT3",), (0.3, 0.3))
    prepare(config)
    assert [s.conditions for s in picture_of(tmp_path, "model.template=chatml").sources] == [None, None]


def test_rewards_show_the_weights_they_come_to(folder: Path):
    rewards = ("data.sources.0.weight=null", "data.sources.1.weight=null", "loss.beta=1",
               "data.sources.0.reward=1", "data.sources.1.reward=0")  # fmt: skip

    assert picture_of(folder, *rewards).sources[1].weights == pytest.approx((np.exp(-1), np.exp(-1)))


def test_a_row_of_padding_has_no_documents_and_64_rows_are_drawn_at_most(folder: Path):
    override = "batch.global_batch_tokens=25600"  # 100 rows a step, more than there are
    (step,) = picture_of(folder, override).steps
    used = Loader(*load(folder, override)).epoch_plan(0).plan.num_rows

    assert len(step.rows) == 64
    assert [len(row.source_ids) > 0 for row in step.rows] == [True] * used + [False] * (64 - used)
    assert step.rows[-1].bounds.tolist() == [0]


def test_more_steps_show_fewer_rows_of_each(folder: Path):
    overrides = ("data.sources.1.repeat=60", "batch.global_batch_tokens=16384")  # 64 rows a step
    rows = {n: [len(step.rows) for step in picture_of(folder, *overrides, num_steps=n).steps] for n in (1, 2, 4)}

    assert rows == {1: [64], 2: [32, 32], 4: [16] * 4}


def test_no_more_steps_are_drawn_than_are_trained(folder: Path):
    assert len(picture_of(folder, num_steps=64).steps) == picture_of(folder).num_steps < 64
    assert len(picture_of(folder, "training.max_steps=2").steps) == 2


# --- how it is drawn


def made_up(num_sources: int = 2, rows_per_step: int = 2, num_steps: int = 2, **changes: object) -> PackingPicture:
    """Rows of 1,000 tokens: documents of 100, the last of them shorter: 0 to 90 are free."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(num_sources, size=10).astype(np.int32) for _ in range(min(rows_per_step, 64 // num_steps))]
    rows = tuple(
        DrawnRow(source_ids=s, bounds=np.r_[np.arange(0, 1000, 100), 1000 - 10 * n % 100]) for n, s in enumerate(ids)
    )
    sources = tuple(
        DrawnSource(name=f"source-{n}-of-many", conditions=(f"GPT{n}",), weights=(0.1, 1.0), tokens=0.123, weight=0.9)
        for n in range(num_sources)
    )
    steps = tuple(DrawnStep(index=n, rows=rows, fill=0.95) for n in range(num_steps))
    picture = PackingPicture(
        run_name="made-up", rows_per_step=rows_per_step, row_tokens=1000, num_steps=1234, fill=0.99,
        steps=steps, sources=sources,
    )  # fmt: skip
    return replace(picture, **changes)


def pixels(picture: PackingPicture) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(render_png(picture))).convert("RGB"))


def rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def test_the_file_is_a_png_of_the_pages_width_and_taller_for_more_rows():
    heights = []
    for rows in (2, 8):
        png = render_png(made_up(rows_per_step=rows))
        width, height = struct.unpack(">II", png[16:24])
        heights.append(height)
        assert png[:16] == b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
        assert width == WIDTH * DPI
    assert heights[1] > heights[0] > 300


def test_every_document_has_its_sources_colour_where_its_tokens_are():
    picture = made_up(num_sources=12, rows_per_step=8, num_steps=1)
    image = pixels(picture)
    row_height = 0.34
    for number, row in enumerate(reversed(picture.steps[0].rows)):  # from the bottom of the page up
        y = round(image.shape[0] - DPI * (BOTTOM + row_height * (number + 0.5)))
        for tokens in (row.bounds[:-1] + 4, row.bounds[1:] - 4):
            xs = (DPI * (LEFT + tokens / 1000 * (WIDTH - LEFT - RIGHT))).round().astype(int)
            assert image[y, xs].tolist() == [rgb(COLOURS[source]) for source in row.source_ids]
        free = round(DPI * (LEFT + (row.bounds[-1] + 1000) / 2000 * (WIDTH - LEFT - RIGHT)))
        beside = image[y - 9 : y + 9, free].tolist()
        assert row.bounds[-1] == 1000 or {tuple(rgb(ROOM_COLOUR)), tuple(rgb(ROOM_HATCH_COLOUR))} <= set(
            map(tuple, beside)
        )


def test_neighbours_of_one_source_are_divided_and_short_ones_still_have_colour():
    one = made_up(num_sources=1, rows_per_step=1, num_steps=1)
    wide, narrow = (np.linspace(0, 1000, n + 1).astype(int) for n in (10, 1000))
    saturated = {}
    for bounds in (wide, narrow):
        row = DrawnRow(source_ids=np.zeros(len(bounds) - 1, np.int32), bounds=bounds)
        image = pixels(replace(one, steps=(DrawnStep(index=0, rows=(row,), fill=1.0),)))
        line = image[round(image.shape[0] - DPI * (BOTTOM + 0.17)), round(DPI * LEFT) + 3 : -round(DPI * RIGHT) - 3]
        darkness = 255 - line[:, 0].astype(int)  # of red, of which the colour has none
        saturated[len(bounds) - 1] = darkness.mean() / 255
        if bounds is wide:
            assert np.count_nonzero(np.diff((darkness < 200).astype(int)) == 1) == 9
    assert saturated[10] > 0.95
    assert saturated[1000] > 0.6


def texts_of(picture: PackingPicture):
    """The boxes, in pixels, of all texts of the page, and of the page."""
    figure = inspect_packing._figure(picture)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    axes_off = [text for axes in figure.axes if not axes.axison for axis in (axes.xaxis, axes.yaxis)
                for text in axis.findobj(Text)]  # fmt: skip
    return [t.get_window_extent(canvas.get_renderer()) for t in shown if t not in axes_off], figure.bbox


def num_overlaps(picture: PackingPicture) -> int:
    boxes, _ = texts_of(picture)
    return sum(a.overlaps(b) for a, b in combinations(boxes, 2))


LONG = {"name": "a-source-with-a-name-that-does-not-end " * 4, "conditions": ("GPT4 Correct", "W" * 40)}


@pytest.mark.parametrize("num_sources", [1, 2, 12])
@pytest.mark.parametrize("rows_per_step", [1, 2, 8, 64, 512])
def test_texts_do_not_overlap_and_stay_on_the_page(num_sources: int, rows_per_step: int):
    picture = made_up(num_sources, rows_per_step, num_steps=3, run_name="a" * 300)
    picture = replace(picture, sources=(replace(picture.sources[0], **LONG), *picture.sources[1:]))
    boxes, page = texts_of(picture)

    assert len(boxes) > 15
    assert num_overlaps(picture) == 0
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)


def test_names_that_were_not_cut_would_overlap(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inspect_packing, "NAME_CELLS", 400)
    picture = made_up()

    assert num_overlaps(replace(picture, sources=(replace(picture.sources[0], **LONG),))) > 0


def test_a_name_with_dollars_and_newlines_is_text():
    picture = made_up()
    odd = replace(picture.sources[0], name="$\\frac{cheap$\nchats", conditions=("$a_", ""))

    assert render_png(replace(picture, sources=(odd, picture.sources[1]))) != render_png(picture)


def test_a_source_without_conversations_and_a_template_without_conditions_are_said_to_be():
    picture = made_up(num_sources=1)
    bare = replace(picture.sources[0], weights=None, conditions=None, tokens=0.0, weight=0.0)

    assert inspect_packing._weight_text(bare) == "no conversations"
    assert inspect_packing._condition_text(bare) == "not written"
    assert num_overlaps(replace(picture, sources=(*picture.sources, bare))) == 0


def as_seen(colours: tuple[str, ...], sight: list[list[float]]) -> np.ndarray:
    """Colours in OKLab, where distance is difference to the eye, as they look to somebody."""
    s = np.array([rgb(colour) for colour in colours]) / 255
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4) @ np.array(sight).T
    lms = [
        [0.41222147, 0.53633254, 0.05144599],
        [0.2119035, 0.68069955, 0.10739696],
        [0.08830246, 0.28171884, 0.6299787],
    ]
    lab = [
        [0.21045426, 0.79361779, -0.00407205],
        [1.9779985, -2.42859221, 0.45059371],
        [0.0259040, 0.78277177, -0.80867577],
    ]
    return np.cbrt(np.clip(linear, 0, 1) @ np.array(lms).T) @ np.array(lab).T


# Machado, Oliveira and Fernandes 2009, the whole deficiency; on linear RGB.
SIGHTS = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TABLEAU = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def least_distance(colours: tuple[str, ...], sight: list[list[float]]) -> float:
    seen = as_seen(colours, sight)
    return min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2))


@pytest.mark.parametrize("sight", SIGHTS.values(), ids=SIGHTS)
def test_no_two_of_twelve_sources_are_closer_than_two_of_okabe_and_itos(sight: list[list[float]]):
    assert len(COLOURS) == 12
    assert least_distance(COLOURS, sight) >= min(least_distance(COLOURS[:7], s) for s in SIGHTS.values()) > 0.07


def test_common_colours_would_be_mistaken_for_each_other():
    assert min(least_distance(TABLEAU, sight) for sight in SIGHTS.values()) < 0.01


def test_the_thirteenth_source_is_hatched():
    one, thirteen = made_up(num_sources=1, rows_per_step=1, num_steps=1), made_up(13, 1, 1)
    row = DrawnRow(source_ids=np.array([12], np.int32), bounds=np.array([0, 1000]))
    colours = [
        len(np.unique(pixels(p)[-round(DPI * (BOTTOM + 0.2)), round(DPI * 2) : round(DPI * 8)], axis=0))
        for p in (
            replace(one, steps=(DrawnStep(index=0, rows=(replace(row, source_ids=row.source_ids * 0),), fill=1.0),)),
            replace(thirteen, steps=(DrawnStep(index=0, rows=(row,), fill=1.0),)),
        )
    ]

    assert colours[0] == 1
    assert colours[1] > 2


def test_matplotlib_is_loaded_to_draw_only_without_pyplot_and_without_the_users_settings(folder: Path, tmp_path: Path):
    (tmp_path / "matplotlibrc").write_text("figure.facecolor: black\naxes.facecolor: black\nfont.size: 40\n")
    here, there = tmp_path / "here.png", tmp_path / "there.png"
    write_packing(load(folder)[0], "", here)
    done = run(
        "python", "-c",
        "import sys; from pathlib import Path; from ochat.config import load_config\n"
        "from ochat.data.inspect_packing import write_packing\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"write_packing(load_config({str(folder / 'experiment.yaml')!r}), '', Path({str(there)!r}))\n"
        "import matplotlib; assert matplotlib.rcParams['font.size'] == 40\n"
        "assert 'matplotlib.pyplot' not in sys.modules",
        env={"MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "MPLBACKEND": "TkAgg", "DISPLAY": ""},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert there.read_bytes() == here.read_bytes()


# --- the command


def invoke(folder: Path, *options: object) -> Result:
    return CliRunner().invoke(app, ["inspect", str(folder / "experiment.yaml"), *map(str, options)])


def test_the_command_writes_the_picture_instead_of_conversations(folder: Path, tmp_path: Path):
    done = invoke(folder, "--packing", tmp_path / "p.png", "--steps", 1)
    smaller = (tmp_path / "p.png").read_bytes()
    invoke(folder, "--packing", tmp_path / "p.png")

    assert done.output == f"wrote {tmp_path}/p.png\n"
    assert smaller == render_png(picture_of(folder, num_steps=1))
    assert (tmp_path / "p.png").read_bytes() == render_png(picture_of(folder, num_steps=4))


def test_page_and_picture_can_be_written_at_once(folder: Path, tmp_path: Path):
    done = invoke(folder, "--packing", tmp_path / "p.png", "--html", tmp_path / "p.html", "--source", "crowd")

    assert done.output == f"wrote {tmp_path}/p.png\nwrote {tmp_path}/p.html; open it in a browser\n"
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert "crowd.jsonl:1" in (tmp_path / "p.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "2"], "--steps: has no effect without --packing"),
        (["--packing", "p.png", "--source", "crowd"], "--packing: draws whole steps, so --source, --row and --num"),
        (["--packing", "p.png", "--row", "3"], "--packing: draws whole steps, so --source, --row and --num"),
        (["--packing", "p.pdf"], "--packing p.pdf: the picture is a PNG. Give it a name that ends in .png."),
        (["--packing", "png"], "--packing png: the picture is a PNG"),
    ],
)
def test_options_without_effect_and_other_kinds_of_file_are_refused(folder: Path, options: list[str], message: str):
    error = invoke(folder, *options).exception

    assert isinstance(error, ConfigError)
    assert str(error).startswith(message)


@pytest.mark.parametrize("name", ["nowhere/p.png", "folder.png"])
def test_a_file_that_cannot_be_written_is_named_with_the_reason(folder: Path, tmp_path: Path, name: str):
    (tmp_path / "folder.png").mkdir()
    reason = {"nowhere/p.png": "No such file or directory", "folder.png": "Is a directory"}[name]

    with pytest.raises(
        ConfigError, match=rf"--packing {tmp_path}/{name}: cannot be written \({reason}\)\. Name a file"
    ):
        write_packing(load(folder)[0], "", tmp_path / name)


def test_data_that_was_not_prepared_is_refused_with_the_command(tmp_path: Path):
    path = write_experiment(tmp_path)
    error = invoke(tmp_path, "--packing", tmp_path / "p.png").exception

    assert isinstance(error, DataError)
    assert str(error).endswith(f"no prepared dataset there (manifest.json is missing). Run: ochat prepare {path}")
    assert not (tmp_path / "p.png").exists()
