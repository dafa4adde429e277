"""Pydantic's validation errors in words: the dotted path, the value, what was expected, the nearest right name."""

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, model: type[BaseModel], tree: Any, origin: str, origins: Mapping[str, str]) -> str:
    """One paragraph per mistake.

    tree     what was validated
    origin   the file the tree came from
    origins  dotted path -> where that path was set instead (an override)
    """
    sentences: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        if item["type"] == "too_short" and item["input"]:
            continue  # its items were wrong, and have their own sentences
        path, sentence = _sentence(item, _dotted(item["loc"], tree), model)
        sentences.setdefault(path, []).append(sentence)
    lines = []
    for path, parts in sentences.items():
        # `trainig.num_epochs=3` makes the section `trainig` that the sentence is about.
        where = next(
            (o for p, o in origins.items() if f"{path}.".startswith(f"{p}.") or p.startswith(f"{path}.")), origin
        )
        # `learning_rate: atuo` fails both as a number and as the word 'auto': one line, two expectations.
        head, *alternatives = parts
        rest = [part.partition(": ")[2].replace("input should be ", "") for part in alternatives]
        lines.append(f"{where}: `{path}` " + ", or ".join([head.rstrip(".") if rest else head, *rest]))
    return "\n".join(lines)


def _dotted(loc: tuple[int | str, ...], tree: Any) -> str:
    # A union's alternatives ('float', "literal['auto']") stand in `loc` after a scalar; inside a scalar are no keys.
    parts = []
    for part in loc:
        if not isinstance(tree, dict | list):
            break
        parts.append(str(part))
        known = part in tree if isinstance(tree, dict) else int(part) < len(tree)
        tree = tree[part] if known else None  # type: ignore[index]
    return ".".join(parts)


def _sentence(item: Any, path: str, model: type[BaseModel]) -> tuple[str, str]:
    """The dotted path a mistake is about, and the rest of the sentence."""
    value = _short(item["input"])
    if item["type"] == "extra_forbidden":
        return path, f"is not a known key (found {value}).{_suggestion(path, model)}"
    if item["type"] == "missing":
        return path, f"is missing. {_meaning(path, model)}".rstrip()
    if item["type"] == "value_error" and not path:
        # Raised by Config's own check over sections, which names the path itself.
        dotted, _, rest = str(item["ctx"]["error"]).partition(": ")
        return dotted, rest
    message = str(item["ctx"]["error"]) if item["type"] == "value_error" else item["msg"]
    nearest = _nearest_choice(item, path, model)
    return path, f"is {value}: {message[:1].lower()}{message[1:]}.{nearest}"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _suggestion(path: str, model: type[BaseModel]) -> str:
    parent, _, key = path.rpartition(".")
    leaves = list(field_paths(model))
    template = ".".join("*" if part.isdigit() else part for part in parent.split("."))
    siblings = {p.rpartition(".")[2] for p in leaves if p.rpartition(".")[0] == template}
    if near := difflib.get_close_matches(key, sorted(siblings), n=1):
        return f" Did you mean `{f'{parent}.{near[0]}' if parent else near[0]}`?"
    # The right word in the wrong section: learning_rate under training.
    by_key = {p.rpartition(".")[2]: p for p in leaves}
    if near := difflib.get_close_matches(key, by_key, n=1, cutoff=0.8):
        return f" Did you mean `{by_key[near[0]]}`?"
    return f" Known here: {', '.join(sorted(siblings))}." if siblings else ""


def _meaning(path: str, model: type[BaseModel]) -> str:
    template = ".".join("*" if part.isdigit() else part for part in path.split("."))
    return next((description for p, description in _fields(model) if p == template), "")


def _nearest_choice(item: Any, path: str, model: type[BaseModel]) -> str:
    if item["type"] != "literal_error" or not isinstance(item["input"], str):
        return ""
    choices = [c.strip("' ") for c in item["ctx"]["expected"].replace(" or ", ", ").split(",")]
    near = difflib.get_close_matches(item["input"], choices, n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def field_paths(model: type[BaseModel]) -> Iterator[str]:
    """Every dotted path of the configuration, sections included; list items are `*`."""
    return (path for path, _ in _fields(model))


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field.description or ""
        for section in _sections(field.annotation):
            item = "*." if section is not field.annotation and "tuple" in str(field.annotation) else ""
            yield from _fields(section, f"{prefix}{name}.{item}")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)
