"""The documents say what the program does: verbs, options, keys and links."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from fedblocks.cli import app, keys_app
from fedblocks.protocol.errors import REFUSAL_CODES
from fedblocks.protocol.messages import KINDS

REPO = Path(__file__).parents[2]
VERBS = sorted(c.name or c.callback.__name__ for c in app.registered_commands)


def test_the_command_line_page_is_the_help_of_every_verb():
    spec = importlib.util.spec_from_file_location("write_cli", REPO / "docs" / "write_cli.py")
    write_cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(write_cli)

    assert (REPO / "docs" / "cli.md").read_text() == write_cli.document(), "run: make docs"


@pytest.mark.parametrize("command", [*app.registered_commands, *keys_app.registered_commands])
def test_every_verb_has_a_help_text_and_an_example(command):
    assert command.callback.__doc__
    assert "Example: fedblocks" in (command.epilog or "")


def test_every_verb_stands_in_the_readme():
    readme = (REPO / "README.md").read_text()

    assert [v for v in VERBS if f"fedblocks {v}" not in readme] == []


def test_every_refusal_code_and_message_stands_in_the_protocol_document():
    text = (REPO / "docs" / "protocol.md").read_text()

    assert [code for code in REFUSAL_CODES if f"`{code}`" not in text] == []
    assert [kind for kind in KINDS if not re.search(rf"\b{kind}\b", text)] == []


@pytest.mark.parametrize("page", [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_readme_names_both_commands_that_do_everything():
    readme, makefile = (REPO / "README.md").read_text(), (REPO / "Makefile").read_text()

    for target in ("demo", "test"):
        assert f"make {target} " in readme
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_test_that_the_reliability_page_names_exists_and_every_case_has_a_row():
    page = (REPO / "docs" / "reliability.md").read_text()
    written = "\n".join(path.read_text() for path in (REPO / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page)

    assert [name for name in named if f"def {name}(" not in written] == []
    assert re.findall(r"^\| \*\*F(\d+)\*\*", page, re.MULTILINE) == [str(number) for number in range(1, 21)]
    assert [row for row in page.splitlines() if row.startswith(("| F", "| **F")) and "`test_" not in row] == []
