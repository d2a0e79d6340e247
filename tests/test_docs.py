"""Every code block of the README and the docs runs, or says why it cannot; every link leads somewhere."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from m2f_hf import BUNDLED_SCENES
from m2f_hf.cli import main


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- not run: *(?P<reason>.*?) *-->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)\s]*)?\)")
# Blocks that show a file or an output.
SHOWN = ("json", "text", "yaml")


class Block(NamedTuple):
    language: str
    code: str
    reason: str | None  # why it is not run
    line: int


def blocks(text: str) -> list[Block]:
    return [
        Block(m["language"], m["code"], m["reason"], text.count("\n", 0, m.start("code")) + 1)
        for m in BLOCK.finditer(text)
    ]


def run_python(block: Block, page: str, namespace: dict) -> None:
    # As many empty lines as make the line numbers of an error those of the page.
    exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)


def run_commands(block: Block) -> None:
    for line in block.code.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True) or [""]
        assert program in ("", "m2f"), f"`{line}` cannot be run here: say why above it, <!-- not run: … -->"
        if program:
            assert main(arguments) == 0, line


def run_page(text: str, page: str) -> int:
    """Run a page's blocks in order, the Python ones in one namespace, and return how many there were."""
    namespace: dict = {"__name__": "page"}
    runnable = [block for block in blocks(text) if block.reason is None and block.language not in SHOWN]
    for block in runnable:
        if block.language == "python":
            run_python(block, page, namespace)
        elif block.language == "bash":
            run_commands(block)
        else:
            raise AssertionError(f"{page}:{block.line}: a block of {block.language or 'no language'}: use {SHOWN}")
    return len(runnable)


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder to run pages in, with the files they mention."""
    scenes = sorted(BUNDLED_SCENES.glob("*.png"))
    Image.open(scenes[0]).save(tmp_path / "photo.jpg")
    (tmp_path / "photos").mkdir()
    for scene in scenes[1:3]:
        Image.open(scene).save(tmp_path / "photos" / f"{scene.stem}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page, workplace):
    text = page.read_text(encoding="utf-8")
    run_page(text, str(page))
    assert text.count("```") == 2 * len(blocks(text)), "a fence that is not at the start of a line or not closed"


def test_pages_that_a_newcomer_follows_do_run_something(workplace):
    counts = {
        page.name: sum(b.reason is None and b.language not in SHOWN for b in blocks(page.read_text())) for page in PAGES
    }
    assert counts["README.md"] >= 2
    assert counts["quickstart.md"] >= 8
    assert counts["cli.md"] >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_that_are_not_run_say_why(page):
    text = page.read_text(encoding="utf-8")
    skipped = [block for block in blocks(text) if block.reason is not None]
    assert len(skipped) == text.count("<!-- not run"), "a mark that is not right above its block"
    for block in skipped:
        assert len(block.reason.split()) >= 3, f"{page.name}:{block.line}: `{block.reason}` is no reason"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = [m[1] for m in LINK.finditer(page.read_text(encoding="utf-8")) if "://" not in m[1]]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_index_lists_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = {m[1] for m in LINK.finditer(index)}
    assert {page.name for page in PAGES if page.parent.name == "docs" and page.name != "index.md"} <= listed


# --- the checks above can fail ---


@pytest.mark.parametrize(
    "page",
    [
        "```python\nassert False\n```\n",
        "```python\nx = 1\n```\nand then\n```python\nassert x == 2\n```\n",
        "```bash\nm2f segment missing.jpg --model none\n```\n",
        "```bash\nls\n```\n",
        "```\nx\n```\n",
    ],
)
def test_a_wrong_page_is_noticed(page, workplace):
    with pytest.raises(AssertionError):
        run_page(page, "page.md")


def test_errors_have_the_pages_line_numbers(workplace):
    page = "# Title\n\n```python\nx = 1\nraise ValueError\n```\n"
    with pytest.raises(ValueError) as caught:
        run_page(page, "page.md")
    assert caught.traceback[-1].lineno + 1 == 5


def test_a_marked_block_is_not_run():
    page = "<!-- not run: needs the Hub -->\n```python\nraise ValueError\n```\n"
    assert run_page(page, "page.md") == 0
    assert blocks(page)[0].reason == "needs the Hub"
