"""The page of `ochat inspect --html`: nothing in it but text and style, whatever the chats spell."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ochat.config import load_config
from ochat.data.inspect import Inspection, inspect
from ochat.data.inspect_html import render_page, write_page
from ochat.data.inspect_tokens import Token, Turn
from ochat.data.prepare import prepare
from ochat.errors import ConfigError
from tests.experiment import write_experiment

INJECTIONS = (
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    '"><svg onload="document.title=\'owned\'">',
    "</span></title></style><script>document.title = 'owned'</script>",
    "' onmouseover='x & &lt;",
)
BLOCKS = {"html", "head", "meta", "title", "style", "body", "header", "main", "section", "article", "h1", "h2", "h3"}
INLINE = {"small", "p", "b", "i", "span", "div", "dl", "dt", "dd", "details", "summary"}
TABLE = {"table", "thead", "tbody", "tr", "th", "td"}


class Page(HTMLParser):
    """Tags, attributes, and the text of every token, as a parser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.tokens, self.titles, self.path = set(), set(), [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        classes = (dict(attrs).get("class") or "").split()
        if "t" in classes and "title" in dict(attrs):
            self.tokens.append("")
            self.titles.append(dict(attrs)["title"])
        self.path += [] if tag == "meta" else ["token" if "t" in classes else tag]

    def handle_endtag(self, tag):
        self.path.pop()

    def handle_data(self, data):
        if "token" in self.path and "article" in self.path and self.path[-1] != "i":
            self.tokens[-1] += data


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    """Chats, a condition and a source's name that spell markup."""
    folder = tmp_path_factory.mktemp("html")
    path = write_experiment(folder)
    chats = folder / "<b onclick=x>chats.jsonl"
    with chats.open("w", encoding="utf-8") as file:
        for text in INJECTIONS:
            turns = [{"from": "human", "value": text}, {"from": "gpt", "value": f"{text}\n\n\tend 😀"}]
            file.write(json.dumps({"conversations": turns}) + "\n")
    source = {"name": "<a href=x>s</a>", "path": str(chats), "condition": '"><script>', "weight": 1.0}
    config = load_config(path, [f"data.sources=[{json.dumps(source)}]", "model.max_length=256"])
    prepare(config)
    shown = inspect(config, "", num=9)
    # A tokenizer with large pieces: each injection is one token, so no span of ours divides it.
    tokens = tuple(Token(id=9, raw=text.encode(), text=text, weight=1.0, kind="content") for text in INJECTIONS)
    whole = replace(shown.conversations[0], turns=(Turn(tokens=tokens, role=None, condition=None),))
    return replace(shown, run_name=f"</title>{INJECTIONS[0]}", conversations=(whole, *shown.conversations))


def test_the_page_has_no_tag_but_its_own(hostile: Inspection):
    page = Page(render_page(hostile))

    assert page.tags <= BLOCKS | INLINE | TABLE
    assert {"onerror", "onload", "onclick", "onmouseover", "src", "href"}.isdisjoint(page.attributes)


def test_a_page_without_escapes_would_be_noticed(hostile: Inspection, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ochat.data.inspect_html.escape", str)
    page = Page(render_page(hostile))

    assert {"script", "img", "svg"} <= page.tags
    assert {"onerror", "onload", "onclick"} <= page.attributes


def test_every_token_is_on_the_page_as_its_text(hostile: Inspection):
    tokens = [token for conversation in hostile.conversations for token in conversation.tokens]
    page = Page(render_page(hostile))

    assert [shown.strip("\n") for shown in page.tokens] == [re.sub(r"[\n\t]", "", token.text) for token in tokens]
    assert page.titles == [f"id {token.id}, weight {token.weight:.4g}" for token in tokens]


def test_the_page_loads_nothing_and_forbids_scripts(hostile: Inspection):
    html = render_page(hostile)
    own = html[: html.index("<body>")]

    assert "default-src 'none'; style-src 'unsafe-inline'" in own
    assert not re.search(r"https?:|url\(|@import|<link|<script", own)


def test_the_legend_has_the_numbers_and_both_schemes_and_print_are_styled(hostile: Inspection):
    html = render_page(hostile)

    assert '<span class="t w5">1</span>' in html
    assert "@media screen and (prefers-color-scheme: dark)" in html
    assert "@media print" in html


def test_widths_of_a_row_add_up_to_its_fill(hostile: Inspection):
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", render_page(hostile))]

    assert sum(widths) == pytest.approx(100 * sum(row.fill for row in hostile.rows), abs=0.01)


def browse(page: Path, profile: Path) -> str:
    """The document after chromium has loaded it and run what runs."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on this machine: `apt-get install chromium` to see the page in a real browser")
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom",
    )  # fmt: skip
    done = subprocess.run(
        [browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )  # fmt: skip
    return done.stdout


def title_of(document: str) -> str:
    return re.search(r"<title>(.*?)</title>", document, re.S)[1]


def without_policy(html: str) -> str:
    return re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)


def test_in_a_browser_injected_scripts_stay_text(hostile: Inspection, tmp_path: Path):
    # Without the page's policy, so that escaping alone is seen to hold.
    page = tmp_path / "page.html"
    page.write_text(without_policy(write_page(hostile, page).read_text(encoding="utf-8")), encoding="utf-8")
    document = browse(page, tmp_path / "profile")

    assert title_of(document).startswith("ochat inspect: &lt;/title&gt;&lt;script&gt;")
    assert "owned" in document  # as text
    assert "<script" not in document


@pytest.mark.parametrize(("policy", "title"), [(False, "owned"), (True, "ochat inspect: ")])
def test_in_a_browser_a_forgotten_escape_is_noticed_and_the_policy_stops_it(
    hostile: Inspection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: bool, title: str
):
    monkeypatch.setattr("ochat.data.inspect_html.escape", str)
    html = render_page(hostile)
    page = tmp_path / "page.html"
    page.write_text(html if policy else without_policy(html), encoding="utf-8")

    assert title_of(browse(page, tmp_path / "profile")) == title


def test_a_page_that_cannot_be_written_is_no_bare_errno(hostile: Inspection, tmp_path: Path):
    with pytest.raises(ConfigError, match=rf"--html {tmp_path}/none/p.html: cannot be written \(No such file"):
        write_page(hostile, tmp_path / "none" / "p.html")
