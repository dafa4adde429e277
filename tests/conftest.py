"""What every test may use: the folder beside the checkout with real data, and the --slow switch."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real chats, tokenizers and golden vectors; not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside this checkout: real data and tokenizers are not in the repository")
    return SHARED


@pytest.fixture(scope="session")
def real_tokenizers() -> Path:
    """Folder with mistral-v0.1-eot/ and llama-3/."""
    for folder in (SHARED / "tokenizers", ROOT / ".cache" / "tokenizers"):
        if folder.is_dir():
            return folder
    pytest.skip("real tokenizers are neither in ../shared nor built: run `python scripts/build_tokenizers.py`")
