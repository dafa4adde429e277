"""The page of the configuration says what the configuration is."""

from ochat.config import Config
from scripts.configuration_docs import PAGE, page


def test_the_page_is_the_configurations_own():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m scripts.configuration_docs"


def test_every_field_is_on_it_with_a_meaning():
    rows = [line.split(" | ") for line in page().splitlines() if line.startswith("| `")]
    named = {row[0].strip("| `") for row in rows}

    assert {"repeat", "max_length", "beta", "zero_stage", "entity", "val_fraction"} <= named
    assert all(row[-1].strip(" |") for row in rows), "a field without a docstring"
    assert not any(section in named for section in Config.model_fields)
