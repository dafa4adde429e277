"""What will be trained, as plain data: conversations token by token with their weights, and the rows of step 0.

Everything shown is taken from the loader's own batches, so it cannot differ from what is trained. Called by
`ochat inspect`; drawn by inspect_terminal.py and inspect_html.py.
"""

import difflib
from collections import Counter
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ochat.config import Config
from ochat.data.batch import PackedBatch
from ochat.data.inspect_tokens import Token, TokenReader, Turn, weight_level
from ochat.data.items import OVERLONG
from ochat.data.loader import Loader
from ochat.data.prepare import open_prepared
from ochat.data.store import Manifest, PreparedSplit
from ochat.data.template import get_template
from ochat.data.tokenize import ChatTokenizer, load_tokenizer
from ochat.data.weights import item_weights, weight_sums
from ochat.errors import ConfigError, DataError

NUM_CONVERSATIONS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedConversation:
    """A conversation as it is trained.

    where       file:line it came from
    condition   as the tokens have it; None: the template writes none
    weight      factor of its source or reward, that every token's weight includes
    weight_sum  sum of its tokens' weights as trained
    cut         whether it certainly lost tokens at model.max_length; `ending` says what is known
    place       step and row where the first epoch trains it; None: not at all, by `repeat` or `max_steps`
    """

    where: str
    source: str
    condition: str | None
    turns: tuple[Turn, ...]
    num_tokens: int
    num_supervised: int
    weight: float
    weight_sum: float
    cut: bool
    ending: str
    place: tuple[int, int] | None

    @property
    def condition_text(self) -> str:
        return "not written by this template" if self.condition is None else self.condition or "none"

    @property
    def place_text(self) -> str:
        return (
            "not trained in the first epoch" if self.place is None else f"step {self.place[0]:,}, row {self.place[1]}"
        )

    @property
    def tokens(self) -> tuple[Token, ...]:
        return tuple(token for turn in self.turns for token in turn.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedDocument:
    """A conversation's place in a packed row; start and end are tokens of the row."""

    where: str
    source_id: int
    start: int
    end: int
    weight: float
    weight_sum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedRow:
    """A packed row; one without documents is padding that runs with weight 0."""

    documents: tuple[InspectedDocument, ...]
    row_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.documents[-1].end if self.documents else 0

    @property
    def fill(self) -> float:
        return self.num_tokens / self.row_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class LegendEntry:
    """The weights that share a colour, of the tokens shown."""

    level: int
    lowest: float
    highest: float
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """rows: of step 0 of the first epoch, which has num_steps. highest: the weight with the strongest colour."""

    run_name: str
    prepared_dir: str
    fingerprint: str
    template: str
    max_length: int
    sources: tuple[str, ...]
    conversations: tuple[InspectedConversation, ...]
    rows: tuple[InspectedRow, ...]
    num_steps: int
    highest: float

    def level(self, token: Token) -> int:
        return weight_level(token.weight, self.highest)

    def legend(self) -> tuple[LegendEntry, ...]:
        weights = Counter(token.weight for conversation in self.conversations for token in conversation.tokens)
        entries = []
        for level in sorted({weight_level(weight, self.highest) for weight in weights}):
            of_level = [weight for weight in weights if weight_level(weight, self.highest) == level]
            count = sum(weights[weight] for weight in of_level)
            entries.append(LegendEntry(level=level, lowest=min(of_level), highest=max(of_level), num_tokens=count))
        return tuple(entries)


def inspect(
    config: Config, prepare_command: str, *, source: str | None = None, row: int | None = None, num: int | None = None
) -> Inspection:
    """Conversations of the prepared dataset and the packed rows of step 0.

    source  only this one's conversations; None: of every source
    row     begin at this line of the chat file, and show one conversation unless `num` says otherwise
    num     conversations of each source
    """
    template = get_template(config.model.template)
    tokenizer = load_tokenizer(config.tokenizer_name_or_path, template)
    manifest, split = open_prepared(config, template, tokenizer, prepare_command)
    conditions = {c for count in manifest.counts.values() for c in count["conditions"]}
    reader = TokenReader(tokenizer, ChatTokenizer(tokenizer, template), conditions)
    larder = _Larder(config, manifest, split, reader)
    items = _select(config, larder.split, source=source, row=row, num=num or (NUM_CONVERSATIONS if row is None else 1))
    conversations = tuple(larder.conversation(item) for item in items)
    shown_weights = (token.weight for conversation in conversations for token in conversation.tokens)
    return Inspection(
        run_name=config.run.name,
        prepared_dir=config.data.prepared_dir,
        fingerprint=manifest.fingerprint,
        template=template.name,
        max_length=config.model.max_length,
        sources=tuple(s.name for s in config.data.sources),
        conversations=conversations,
        rows=larder.first_rows(),
        num_steps=larder.num_steps,
        highest=max(chain([larder.highest_mean_weight()], shown_weights)),
    )


def _select(config: Config, split: PreparedSplit, *, source: str | None, row: int | None, num: int) -> list[int]:
    """The items to show: of each source, the first `num` from line `row` on."""
    names = [s.name for s in config.data.sources]
    if source is not None and source not in names:
        near = difflib.get_close_matches(source, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"--source {source!r}: data.sources has none of that name.{hint} Known: {', '.join(names)}.")
    chosen = [i for i, name in enumerate(names) if source in (None, name)]
    source_id, lines = split.column("source_id"), split.column("line")
    items: list[int] = []
    for position in chosen:
        of_source = np.flatnonzero(source_id == position)
        if row is not None and row not in lines[of_source]:
            continue
        items += of_source[lines[of_source] >= (row or 0)][:num].tolist()
    if not items:
        raise DataError(_nothing_there(config, chosen, lines[np.isin(source_id, chosen)], row))
    return items


def _nothing_there(config: Config, chosen: list[int], lines: NDArray[np.int64], row: int | None) -> str:
    files = ", ".join(config.data.sources[position].path for position in chosen)
    if row is None or not len(lines):
        return f"{files}: no conversation of it was kept. See the counts of `ochat prepare`."
    nearest = int(lines[np.abs(lines - row).argmin()])
    return (
        f"--row {row}: no conversation of that line of {files} was kept: the file ends before it, the line is empty, "
        f"it was left or held out (`ochat prepare` says how many, and why), or nothing in it has a weight within "
        f"model.max_length = {config.model.max_length} tokens. "
        f"The nearest line kept is {nearest}."
    )


class _Larder:
    """The prepared dataset with its loader, by item."""

    def __init__(self, config: Config, manifest: Manifest, split: PreparedSplit, reader: TokenReader) -> None:
        self.split = split
        self._config, self._manifest, self._reader = config, manifest, reader
        self._loader = Loader(config, self.split)
        made = self._loader.epoch_plan(0)
        self.plan, self._epoch_items = made.plan, made.items
        self.num_steps = min(made.plan.num_steps, self._loader.schedule.total_steps)
        self._weights = item_weights(config, self.split)
        self._source_id, self._line = self.split.column("source_id"), self.split.column("line")
        # Where the first epoch trains an item first; -1: nowhere, by its source's repeat.
        self._place = np.full(len(self.split), -1)
        in_order = self._epoch_items[self.plan.rows.items]
        self._place[in_order[::-1]] = np.arange(len(in_order))[::-1]

    def conversation(self, item: int) -> InspectedConversation:
        """The item as the loader makes it for a row."""
        ids, weights = _document(self._loader.batch(np.array([item])), 0)
        turns = self._reader.read(ids, weights)
        cut, ending = self._ending(item, ids)
        return InspectedConversation(
            where=self._where(item),
            source=self._config.data.sources[self._source_id[item]].name,
            condition=next((turn.condition for turn in turns if turn.condition is not None), None),
            turns=turns,
            num_tokens=len(ids),
            num_supervised=int(np.count_nonzero(weights)),
            weight=float(self._weights[item]),
            weight_sum=float(weights.sum(dtype=np.float64)),
            cut=cut,
            ending=ending,
            place=self._place_of(item),
        )

    def _place_of(self, item: int) -> tuple[int, int] | None:
        row = int(np.searchsorted(self.plan.rows.ends, self._place[item], side="right"))
        step, row = divmod(row, self.plan.rows_per_step)
        return None if self._place[item] < 0 or step >= self.num_steps else (step, row)

    def first_rows(self) -> tuple[InspectedRow, ...]:
        """The rows of step 0, boundaries as in their batches."""
        rows = []
        for position, batch in enumerate(self._loader.step(0, 0).batches):
            items = self._epoch_items[self.plan.rows[position]].tolist()
            bounds = batch.cu_seqlens.tolist()
            documents = tuple(
                InspectedDocument(
                    where=self._where(item),
                    source_id=int(batch.source_ids[n]),
                    start=bounds[n],
                    end=bounds[n + 1],
                    weight=float(self._weights[item]),
                    weight_sum=float(_document(batch, n)[1].sum(dtype=np.float64)),
                )
                for n, item in enumerate(items)
            )
            rows.append(InspectedRow(documents=documents, row_tokens=self.plan.row_tokens))
        return tuple(rows)

    def highest_mean_weight(self) -> float:
        """The highest mean weight of an item's supervised tokens: anchors colours to the dataset, not to the page."""
        return float((weight_sums(self._config, self.split) / self.split.column("num_supervised")).max())

    def _where(self, item: int) -> str:
        return f"{self._config.data.sources[self._source_id[item]].path}:{self._line[item]}"

    def _ending(self, item: int, ids: NDArray[np.int64]) -> tuple[bool, str]:
        """Whether it was certainly cut, and what is known about its end.

        A reply's end-of-turn has the reply's weight and trailing context is dropped, so only a cut leaves it open.
        """
        limit, data = self._config.model.max_length, self._config.data
        count = self._manifest.counts[data.sources[self._source_id[item]].name]
        part = self._part(item)
        if not self._reader.ends_turn(ids):
            return True, f"{part}cut inside a reply, at model.max_length = {limit} tokens"
        if data.overlong == "drop":
            number = count["dropped"].get(OVERLONG, 0)
            known = f"over-long conversations are left out, never cut ({number:,} of its source)"
        elif number := count["truncated"]:
            known = f"turns may be missing after it ({number:,} of its source were cut at model.max_length = {limit})"
        else:
            known = "nothing of its source was cut off"
        return False, f"{part}ends with a whole reply; {known}"

    def _part(self, item: int) -> str:
        """Which part it is, of a conversation that data.overlong=split made several of: those of one line."""
        parts = np.flatnonzero((self._source_id == self._source_id[item]) & (self._line == self._line[item]))
        if len(parts) == 1:
            return ""
        number = int(np.searchsorted(parts, item)) + 1
        return f"part {number} of {len(parts)} of its conversation, cut between turns; "


def _document(batch: PackedBatch, index: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """input_ids [n] and the weight [n] of predicting each, of one document of a row; the first is never predicted."""
    start, end = batch.cu_seqlens[index : index + 2].tolist()
    shifted = batch.loss_weights[start : end - 1].numpy()
    return batch.input_ids[start:end].numpy(), np.concatenate([np.zeros(1, np.float32), shifted])
