"""Problems as they are shown: the first few, and the way to go on without those rows."""

import pickle

import pytest

from ochat.data.problems import Problem, RowError, problems_error

SKIP = "To leave such rows out and have them counted: data.on_error=skip."


@pytest.mark.parametrize("number", [1, 4, 5, 9])
def test_at_most_five_are_shown_and_more_than_four_are_called_the_first(number: int) -> None:
    problems = [Problem(reason="not JSON", message=f"f:{n}: broken.") for n in range(1, number + 1)]
    *lines, last = str(problems_error(problems)).split("\n")
    first = ["These are the first 5 problems."] if number >= 5 else []
    assert lines == [problem.message for problem in problems[:5]] + first
    assert last == SKIP


def test_a_row_error_keeps_its_reason_on_the_way_from_a_worker() -> None:
    back = pickle.loads(pickle.dumps(RowError("f:1: broken.", "not JSON")))
    assert (str(back), back.reason) == ("f:1: broken.", "not JSON")
