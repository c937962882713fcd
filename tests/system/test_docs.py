"""The documents say what the program does: verbs, options, keys and links."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

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


def fixed_words() -> list[str]:
    """Every fixed part of a text in the program: whole texts, and what stands between the fields of an f-string."""
    found = []
    for room in ("aggregator", "edge_client", "fedblocks", "kernels", "profiles", "protocol"):
        for path in (REPO / room).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text()))
            found += [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return found


def test_every_message_of_the_troubleshooting_page_is_one_of_the_program():
    headings = re.findall(r"^### `(.+)`$", (REPO / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    words = fixed_words()
    parts = {part.strip() for heading in headings for part in heading.split("…") if len(part.strip()) > 3}

    assert len(headings) > 25
    assert [part for part in sorted(parts) if not any(part in text for text in words)] == []


UNITS = sorted((REPO / "docs" / "systemd").glob("*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda p: p.stem)
def test_a_unit_runs_a_verb_with_options_that_it_has_and_restarts_by_the_documented_exit_codes(unit, tmp_path):
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.optionxform = str
    parsed.read(unit)
    service = parsed["Service"]
    program, verb, *arguments = shlex.split(service["ExecStart"])
    command = typer.main.get_command(app).commands[verb]
    codes = set(re.findall(r"^\| (\d) \|", (REPO / "docs" / "exit-codes.md").read_text(), re.MULTILINE))

    assert Path(program).name == "fedblocks"
    command.make_context(verb, arguments)
    assert set(service["RestartPreventExitStatus"].split()) < codes
    assert service["SuccessExitStatus"] == "7"
    assert service["MemoryMax"]
    if shutil.which("systemd-analyze"):
        there = unit.read_text().replace("/opt/fedblocks/bin/fedblocks", "/bin/true")
        copy = tmp_path / unit.name.replace("@", "-check@")
        copy.write_text(there)
        done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
        complaints = [line for line in done.stderr.splitlines() if copy.name in line]
        assert complaints == []
