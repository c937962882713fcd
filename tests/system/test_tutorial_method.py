"""docs/tutorial-method.md as its reader would do it: the method, the fleet, both runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from fedblocks.aggregator import methods
from fedblocks.protocol.run_config import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "tutorial-method.md"
METHOD, FLEET, SCRIPT = re.findall(r"```(?:python|toml)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in (("agreement.py", METHOD), ("fleet.toml", FLEET), ("compare.py", SCRIPT)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_the_method_is_small_and_moves_only_what_most_agree_on(folder):
    assert len(METHOD.splitlines()) < 100
    scope: dict = {}
    exec(METHOD, scope)  # the page's own code
    changes = [np.array([1.0, 1.0, -1.0, 0.0]), np.array([2.0, -1.0, -1.0, 0.0]), np.array([3.0, 1.0, 4.0, 0.0])]
    found = scope["agreed_mean"](changes, [0.4, 0.4, 0.2])
    assert found == pytest.approx([1.8, 0.0, 0.0, 0.0])  # the second and third: 0.6 and 0.2 of the weight agree


def test_a_rule_replaces_only_what_it_has(folder):
    method = methods.of("fedit", str(folder / "agreement.py"))
    assert method.plan is methods.of("fedit").plan
    assert method.publish is methods.of("fedit").publish
    assert method.aggregate is not methods.of("fedit").aggregate


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("nowhere.py", r"'nowhere\.py', which cannot be imported \(FileNotFoundError"),
        ("no.such.module", r"cannot be imported \(ModuleNotFoundError"),
        ("json", "has no function aggregate"),
    ],
)
def test_a_rule_that_cannot_be_used_is_one_clear_error(rule, text):
    with pytest.raises(ConfigError, match=text):
        methods.of("fedit", rule)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_runs_as_it_stands(folder):
    done = subprocess.run([sys.executable, "compare.py"], cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    plain, agreement = (json.loads((folder / name / "result.json").read_text()) for name in ("plain", "agreement"))
    assert plain["finished"]
    assert agreement["finished"]
    assert plain["state_sha256"] != agreement["state_sha256"]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["plain", "agreement"]
