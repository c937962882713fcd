"""How ``join`` ends: what a site is told of itself, when it does not fit, and when it takes no part."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from fedblocks import cli
from fedblocks.aggregator.server import serve
from fedblocks.edge_client import client
from fedblocks.protocol import site_file
from fedblocks.protocol.messages import DataFormat
from fedblocks.protocol.site_file import CacheSettings, JoinSettings, RuntimeSettings, SiteFile

RULES = ("expansion.blocks=1", "training.steps=4", "run.max_rounds=2")


def join_arguments(c, name: str, *more: str) -> list[str]:
    return [
        "fedblocks", "join", str(c.folder / f"{name}.toml"), "--data", str(c.folder / f"{name}.jsonl"),
        "--model", str(c.model), "--home", str(c.home(name)), *more,
    ]  # fmt: skip


@contextmanager
def served(c, lines: list[str]) -> Iterator[None]:
    """The aggregator in a thread of this process."""
    stop = threading.Event()
    thread = threading.Thread(target=serve, args=(c.run,), kwargs={"on_event": lines.append, "stop": stop})
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()


SITE = SiteFile(
    client_name="site-a",
    address="tcp://10.0.0.5:5555",
    server_key="k" * 40,
    run_id="starter-1a2b3c4d",
    base_name="starter",
    base_hash="a" * 64,
    data=DataFormat(max_tokens=512, append_eos=True, join=" "),
    cache=CacheSettings(max_gb=3.0, location="disk", keep=False),
    runtime=RuntimeSettings(memory_gb=2.0),
    join=JoinSettings(hours="22-6"),
)


@pytest.fixture
def options_of(tmp_path, monkeypatch):
    """What ``join`` is asked for by a command line, with a site file that sets things of its own."""

    def ask(*more: str) -> client.JoinOptions:
        site = tmp_path / "site-a.toml"
        site.write_text(site_file.dump(SITE))
        asked: list[client.JoinOptions] = []
        monkeypatch.setattr(client, "join", lambda options, *, say: asked.append(options) or 0)
        done = CliRunner().invoke(cli.app, ["join", str(site), "--data", "d.jsonl", "--model", "m", *more])
        assert done.exit_code == 0, done.output
        return asked[0]

    return ask


def test_join_takes_what_the_site_file_says(options_of):
    options = options_of()

    assert (options.cache, options.runtime, options.site) == (SITE.cache, SITE.runtime, SITE)


def test_options_of_join_go_over_the_site_file_one_by_one(options_of):
    options = options_of("--cache-gb", "0", "--cache-location", "ram", "--dtype", "bfloat16", "--hours", "9-17")

    assert options.cache == CacheSettings(max_gb=0.0, location="ram", keep=False)
    assert options.runtime == RuntimeSettings(dtype="bfloat16", memory_gb=2.0)
    assert options.site.join == JoinSettings(hours="9-17")
    assert options_of("--keep-cache").cache == CacheSettings(max_gb=3.0, location="disk", keep=True)
    assert options_of("--memory-gb", "0.5").runtime.memory_bytes == 500_000_000


class DoesNotFitError(Exception):
    exit_code = 5


def test_a_run_that_does_not_fit_this_device_ends_with_exit_code_5_one_line_and_a_goodbye(
    consortium, monkeypatch, capsys
):
    c = consortium(*RULES, clients=1)

    class TooLarge:
        def __init__(self, **_: object) -> None:
            raise DoesNotFitError("block 0 needs 900 MiB, 512 MiB are free; one block at micro-batch 1 would fit")

    monkeypatch.setattr("fedblocks.edge_client.work.Workbench", TooLarge)
    monkeypatch.setattr(sys, "argv", join_arguments(c, "site-1"))
    lines: list[str] = []
    with served(c, lines), pytest.raises(SystemExit) as ended:
        cli.main()

    assert ended.value.code == 5
    assert capsys.readouterr().err == (
        "fedblocks: block 0 needs 900 MiB, 512 MiB are free; one block at micro-batch 1 would fit\n"
    )
    assert not [t.name for t in threading.enumerate() if t.name == "fedblocks-transport"]
    sent = [json.loads(line) for line in next(c.home("site-1").glob("*/sent.jsonl")).read_text().splitlines()]
    assert sent[-1]["kind"] == "goodbye"
    assert "512 MiB are free" in sent[-1]["what"]
    assert any(line.startswith("site-1 left: does not fit: block 0 needs 900 MiB") for line in lines)
    assert json.loads(next(c.home("site-1").glob("*/summary.json")).read_text())["exit_code"] == 5


def test_an_error_that_names_the_sites_files_is_not_told_to_the_operator(consortium, monkeypatch, capsys):
    c = consortium(*RULES, clients=1)

    class Broken:
        def __init__(self, **_: object) -> None:
            error = ValueError("/home/ann/patients.jsonl, line 3: no JSON")
            error.exit_code = 6
            raise error

    monkeypatch.setattr("fedblocks.edge_client.work.Workbench", Broken)
    monkeypatch.setattr(sys, "argv", join_arguments(c, "site-1"))
    lines: list[str] = []
    with served(c, lines), pytest.raises(SystemExit) as ended:
        cli.main()

    assert ended.value.code == 6
    assert "patients.jsonl, line 3" in capsys.readouterr().err
    assert "site-1 left: an error, exit code 6" in lines
    assert not any("patients" in line for line in lines)


@pytest.mark.slow
def test_a_site_is_told_its_own_score_and_one_outside_its_hours_takes_no_part(consortium):
    c = consortium(*RULES, "allocation.min_cohort=1", clients=2)
    c.serve()
    hour = time.localtime().tm_hour
    c.join("site-2", "--hours", f"{(hour + 2) % 24}-{(hour + 4) % 24}")
    c.until(lambda: "outside this site's hours" in c.text("site-2"), "site-2 rests")
    c.join("site-1", "--no-keep-cache")
    for name in ("aggregator", "site-1", "site-2"):
        assert c.wait(name) == 0, c.text(name)

    (line,) = [line for line in c.text("site-1").splitlines() if line.startswith("own held-out part (")]
    assert line == c.text("site-1").splitlines()[-1]
    folder = next(c.home("site-1").glob("*/summary.json")).parent
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["first"]["version"], summary["last"]["version"]) == (0, 2)
    assert (summary["updates_counted"], summary["exit_code"]) == (2, 0)
    assert f"nll {summary['first']['nll_per_token']:.3f} -> {summary['last']['nll_per_token']:.3f}" in line
    assert (folder / "cache" / "backbone").is_dir()
    assert not (folder / "cache" / "prefix").exists()

    assert [[x["name"] for x in row["clients"]] for row in c.metrics()] == [["site-1"], ["site-1"]]
    assert "own held-out part: not measured yet" in c.text("site-2")


@pytest.mark.parametrize(("minute", "rests"), [(22 * 60, False), (22 * 60 - 1, True), (0, False), (6 * 60, True)])
def test_a_site_rests_by_its_own_clock(monkeypatch, minute, rests):
    now = time.struct_time((2026, 1, 1, minute // 60, minute % 60, 0, 3, 1, 0))
    monkeypatch.setattr(client.time, "localtime", lambda: now)

    assert client.rests(JoinSettings(hours="22-6")) is rests
    assert client.rests(JoinSettings()) is False
