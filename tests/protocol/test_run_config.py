"""run.toml: what it accepts, and how it says no."""

from __future__ import annotations

import pytest

from fedblocks.protocol import run_config
from fedblocks.protocol.run_config import ConfigError, RunConfig

tomllib = run_config.tomllib


def test_a_written_config_reads_back_unchanged():
    config = run_config.from_mapping({"training": {"learning_rate": 0.003}, "run": {"max_rounds": 7}})

    assert run_config.from_mapping(tomllib.loads(run_config.to_toml(config))) == config


def test_every_key_has_a_comment_in_the_written_file():
    text = run_config.to_toml(RunConfig())

    for key in run_config.known_keys():
        name = key.split(".")[1]
        assert any(line.startswith(f"{name} = ") and "# " in line for line in text.splitlines()), key


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("training.lerning_rate", "training.learning_rate"),
        ("steps", "training.steps"),
        ("forgeting.max_kl", "forgetting.max_kl"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest_one(key, nearest):
    with pytest.raises(ConfigError, match=nearest.replace(".", r"\.")):
        run_config.from_mapping({}, [f"{key}=1"])


@pytest.mark.parametrize(
    "override",
    [
        "training.steps=0",
        "training.steps=1.5",
        "training.steps=true",
        "delta.density=0",
        "delta.density=1.01",
        "forgetting.max_kl=0",
        "training.adam_beta2=1.0",
        "delta.format=int4",
        "run.max_rounds='ten'",
        "forgetting.lambda_max=0.5",
        "forgetting.min_lambda=-0.1",
        "forgetting.min_lambda=1.01",
    ],
)
def test_a_value_out_of_range_or_of_the_wrong_type_is_refused_and_named(override):
    key = override.split("=")[0]

    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        run_config.from_mapping({}, [override])


def test_the_anchors_weight_has_its_start_as_its_floor_unless_it_is_told_otherwise():
    forgetting = RunConfig().forgetting

    assert forgetting.min_lambda == forgetting.lambda_start == 1.0
    assert run_config.from_mapping({}, ["forgetting.min_lambda=0"]).forgetting.min_lambda == 0.0
    with pytest.raises(ConfigError, match=r"min_lambda is 1\.0, expected at most forgetting\.lambda_start \(0\.5\)"):
        run_config.from_mapping({}, ["forgetting.lambda_start=0.5"])


def test_a_whole_number_serves_where_a_real_one_is_meant():
    assert run_config.from_mapping({}, ["training.learning_rate=1"]).training.learning_rate == 1.0


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match="fedblocks init"):
        run_config.load(tmp_path / "run.toml")
