"""Ugly chats: noticed in any case, and treated as the configuration says."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat.config import DataConfig, SourceConfig
from ochat.data.conversation import Conversation, Message
from ochat.data.policies import Verdict, apply_policies, cleaned, is_ugly

ROLES = {"s": "system", "u": "user", "a": "assistant"}
POLICIES = {"empty_turns": "empty turn", "assistant_first": "assistant first", "same_role": "same role twice"}


def chat(*turns: str) -> Conversation:
    """ "u:Hi" is a user's turn; "a0:Hi" an assistant's of weight 0."""
    messages = []
    for turn in turns:
        who, _, content = turn.partition(":")
        role = ROLES[who[0]]
        weight = float(who[1:] or (1 if role == "assistant" else 0))
        messages.append(Message(role=role, content=content, weight=weight))
    return Conversation(messages=tuple(messages), condition="GPT4", source="chats")


def judge(conversation: Conversation, **policies: str) -> Verdict:
    sources = (SourceConfig(name="chats", path="chats.jsonl"),)
    return apply_policies(conversation, DataConfig(prepared_dir="p", sources=sources, **policies))


TIDY = chat("s:S", "u:a", "a:b", "u:c", "a:d")
UGLY = {
    "empty_turns": [chat("u:", "a:b"), chat("u:a", "a: \n\t"), chat("u:a", "a:\u200b"), chat("u:a", "a:\u200d\u2060")],
    "assistant_first": [chat("a:x", "u:a", "a:b"), chat("s:S", "a:x", "u:a")],
    "same_role": [chat("u:a", "u:b", "a:c"), chat("u:a", "a:b", "a:c")],
}
CASES = [(policy, case) for policy, cases in UGLY.items() for case in cases]


@pytest.mark.parametrize(("policy", "ugly"), CASES)
def test_by_default_a_chat_is_kept_as_it_is_and_its_trouble_is_noticed(policy: str, ugly: Conversation) -> None:
    assert judge(ugly) == Verdict(conversation=ugly, noticed=(POLICIES[policy],))
    assert judge(TIDY) == Verdict(conversation=TIDY)


@pytest.mark.parametrize("quiet", [chat(), chat("s:S"), chat("s:S", "u:a")])
def test_a_chat_in_which_no_assistant_speaks_does_not_begin_with_one(quiet: Conversation) -> None:
    assert judge(quiet, assistant_first="drop") == Verdict(conversation=quiet)


@pytest.mark.parametrize(("policy", "ugly"), CASES)
def test_drop_leaves_the_chat_out_for_a_reason(policy: str, ugly: Conversation) -> None:
    reason = POLICIES[policy]
    assert judge(ugly, **{policy: "drop"}) == Verdict(conversation=None, reason=reason, noticed=(reason,))
    assert judge(TIDY, **{policy: "drop"}).conversation == TIDY


@pytest.mark.parametrize(
    ("policies", "ugly", "left"),
    [
        ({"empty_turns": "trim"}, chat("u:a", "a: ", "u:b", "a:c"), chat("u:a", "u:b", "a:c")),
        ({"empty_turns": "trim"}, chat("u:", "a:"), chat()),
        ({"assistant_first": "trim"}, chat("s:S", "a:x", "a:y", "u:a", "a:b"), chat("s:S", "u:a", "a:b")),
        ({"assistant_first": "trim"}, chat("a:x"), chat()),
        ({"same_role": "merge"}, chat("u:a", "u:b", "u:c", "a:d"), chat("u:a\n\nb\n\nc", "a:d")),
        ({"same_role": "merge"}, chat("u:a", "a0:b", "a0:c"), chat("u:a", "a0:b\n\nc")),
        # weights that differ cannot share a turn
        ({"same_role": "merge"}, chat("u:a", "a0:b", "a:c"), chat("u:a", "a0:b", "a:c")),
        # what one policy leaves is what the next one sees
        ({"empty_turns": "trim", "same_role": "merge"}, chat("u:a", "a:", "u:b", "a:c"), chat("u:a\n\nb", "a:c")),
        ({"empty_turns": "trim", "assistant_first": "trim"}, chat("u:", "a:x", "u:a"), chat("u:a")),
    ],
)
def test_trim_and_merge_leave_a_tidy_chat(policies: dict[str, str], ugly: Conversation, left: Conversation) -> None:
    assert judge(ugly, **policies).conversation == left
    assert judge(ugly).conversation == ugly


TURNS = st.lists(st.sampled_from(["s:S", "u:a", "u:", "a:b", "a0:b", "a:\n"]), max_size=8)


@given(TURNS)
def test_with_the_defaults_no_chat_is_ever_changed(turns: list[str]) -> None:
    assert judge(chat(*turns)).conversation == chat(*turns)


@given(TURNS)
def test_merging_loses_no_word_and_no_weight(turns: list[str]) -> None:
    merged = judge(chat(*turns), same_role="merge").conversation
    assert merged is not None
    assert all((a.role, a.weight) != (b.role, b.weight) for a, b in pairwise(merged.messages))
    words = [w for m in merged.messages for w in m.content.split()]
    assert words == [w for m in chat(*turns).messages for w in m.content.split()]


# --- hygiene


@pytest.mark.parametrize(
    ("ugly", "clean"),
    [
        ("a\r\nb\rc\nd", "a\nb\nc\nd"),
        ("a\ufeffb", "ab"),
        ("a\x00b\x07c\x7fd\x85e", "abcde"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("half \ud83d", "half \ufffd"),
    ],
)
def test_hygiene_makes_text_printable(ugly: str, clean: str) -> None:
    assert cleaned(ugly) == clean
    assert is_ugly(ugly)
    assert not is_ugly(clean)


@pytest.mark.parametrize(
    "text", ["", "tab\tand\nline", "\u2028", "\u200d\U0001f469", "\ufffd", "e\u0301", "\u00a0", "日本"]
)
def test_hygiene_leaves_writing_alone(text: str) -> None:
    assert cleaned(text) == text
    assert not is_ugly(text)


@given(st.text(st.characters(codec=None)))
def test_clean_text_can_be_encoded_and_stays_clean(text: str) -> None:
    cleaned(text).encode()
    assert not is_ugly(cleaned(text))
