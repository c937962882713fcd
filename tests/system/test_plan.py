"""``fedblocks plan``: a plan for devices that nobody has connected yet."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from fedblocks.cli import app
from fedblocks.profiles.catalog_files import names


def devices():
    return [argument for name in names() for argument in ("--device", name)]


def test_every_device_of_the_catalog_is_planned_for_in_one_sentence_each(tiny_run_folder):
    found = CliRunner().invoke(app, ["plan", str(tiny_run_folder), *devices(), "--examples", "200", "--tokens", "16"])
    assert found.exit_code == 0, found.output
    deadline, *sentences = found.output.splitlines()
    assert deadline.startswith("round 0: deadline ")
    assert [sentence.split(" ")[0] for sentence in sentences] == list(names())
    assert all(" trains block" in sentence for sentence in sentences)


def test_the_records_name_every_part_of_the_value(tiny_run_folder):
    found = CliRunner().invoke(app, ["plan", str(tiny_run_folder), *devices(), "--json"])
    choices = json.loads(found.output)["choices"]
    assert [choice["name"] for choice in choices] == list(names())
    for choice in choices:
        assert choice["parts"].keys() == {"gain", "debt", "rarity"}
        assert sum(choice["parts"].values()) == choice["value"]


def test_a_device_that_the_catalog_lacks_is_answered_with_those_it_has(tiny_run_folder):
    found = CliRunner().invoke(app, ["plan", str(tiny_run_folder), "--device", "rtx-9090"])
    assert found.exit_code != 0
    assert "rtx-4090" in str(found.exception or found.output)
