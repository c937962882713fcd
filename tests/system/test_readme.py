"""The README's second section, typed as it stands there, one verb after the other."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README[README.index("## A run by hand") : README.index("## What to install where")]
BLOCKS = re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]


@pytest.fixture
def desk(tmp_path, tiny_checkpoint) -> Path:
    """A folder with the files that the README speaks of, under its names."""
    tiny_checkpoint(tmp_path).rename(tmp_path / "base")
    rows = "".join(json.dumps({"prompt": f"p{i}", "completion": "ab"}) + "\n" for i in range(40))
    for name in ("train.jsonl", "test.jsonl", "general.jsonl"):
        (tmp_path / name).write_text(rows)
    return tmp_path


def line_with(*words: str) -> str:
    (found,) = [line for line in LINES if all(w in line for w in words)]
    return found


def test_every_command_of_the_section_does_what_it_says(desk, consortium_at):
    c = consortium_at(desk)
    run = c.run_line

    run(line_with("fedblocks init") + " --anchor-sequences 16 --anchor-tokens 32")
    settings = (desk / "clinic" / "run.toml").read_text()
    for old, new in (("max_rounds = 100", "max_rounds = 2"), ("steps = 16", "steps = 4"), ("tcp://*:5555", c.bind)):
        assert old in settings
        settings = settings.replace(old, new)
    (desk / "clinic" / "run.toml").write_text(settings)
    run(line_with("fedblocks invite").replace("tcp://aggregator.example:5555", c.bind))
    c.start_line("aggregator", line_with("fedblocks serve"))

    assert run(line_with("fedblocks preflight"), home=True).endswith("ready to join\n")
    told = run(line_with("fedblocks join", "--dry-run"), home=True)
    assert "hello (once per connection)" in told
    assert not (desk / "home" / "client.key.json").exists()

    (join,) = [line for line in LINES if "fedblocks join" in line and "--dry-run" not in line]
    c.start_line("site", join, home=True)
    key = c.wait_for_text("site", r"--key='([^']+)'")
    run(line_with("fedblocks keys enrol").replace("THE KEY THAT JOIN PRINTED", key))
    assert c.wait("aggregator") == 0, c.text("aggregator")
    assert c.wait("site") == 0, c.text("site")

    assert "finished" in run(line_with("fedblocks status"))
    assert re.search(r"site-a trains .*block", run(line_with("fedblocks plan")))
    assert "bit for bit" in run(line_with("fedblocks export"))
    assert "KL to the base" in run(line_with("fedblocks evaluate"))


def test_every_line_of_the_section_is_a_command_of_ours():
    assert all(shlex.split(line)[0] == "fedblocks" for line in LINES)
    assert len(LINES) >= 10
