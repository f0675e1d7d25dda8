"""docs/papers.md: every row's call exists, and so does the test that holds it to the paper."""

import ast
import re
from pathlib import Path

import pytest

import solera

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "docs/papers.md"]
HEAD = ["paper", "what", "call", "test"]


def cells(line):
    """The cells of a table's line; a bar inside backticks or escaped is no border."""
    held = re.sub(r"`[^`]*`", lambda m: m[0].replace("|", "\0"), line.strip().strip("|"))
    parts = re.split(r"(?<!\\)\|", held)
    return [cell.replace("\0", "|").strip() for cell in parts]


def rows():
    for page in PAGES:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            if line.startswith("|") and not set(line) <= set("|-: "):
                found = cells(line)
                if found != HEAD:
                    yield pytest.param(found, id=f"{page.stem}:{number}")


def functions(path):
    """The tests of a file, by the names pytest gives them."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            yield from (
                f"{node.name}::{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)
            )


@pytest.mark.parametrize("row", list(rows()))
def test_a_papers_row_names_a_call_and_a_test_that_exist(row):
    assert len(row) == len(HEAD), row
    paper, what, call, test = row
    assert paper and what
    names = re.findall(r"\b(?:solera\.)?(norm|ensemble|sinkhorn|weights|nn)\.(\w+)", call)
    plain = re.search(r"\btorch\.\w+", call)  # one line of torch is all that some papers need
    assert names or plain, f"{paper}: the call names nothing: {call}"
    for family, name in names:
        assert hasattr(getattr(solera, family), name), (
            f"{paper}: solera.{family}.{name} is not there"
        )
    ids = re.findall(r"(tests/[\w/]+\.py)::([\w:]+)", test)
    assert ids, f"{paper}: no test is named"
    for path, name in ids:
        assert name in set(functions(ROOT / path)), f"{paper}: {path} has no {name}"


def test_no_paper_is_listed_twice():
    titles = [row.values[0][0] for row in rows()]
    assert titles and len(titles) == len(set(titles)), sorted(
        {t for t in titles if titles.count(t) > 1}
    )
