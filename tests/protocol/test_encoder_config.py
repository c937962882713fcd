"""Which keys and labels does an encoder's run have, and what is a budget there?"""

from __future__ import annotations

from pathlib import Path

import pytest

from fedblocks.protocol import run_config, site_file
from fedblocks.protocol.messages import ClientKey, DataFormat
from fedblocks.protocol.run_config import NO_BUDGET, ConfigError, from_mapping
from fedblocks.protocol.site_file import SiteFile


def test_an_encoders_budget_is_its_drift_and_without_one_nothing_is_enforced() -> None:
    config = run_config.for_model(from_mapping({}, ("forgetting.max_drift=0.01",)), encoder=True)
    assert (config.forgetting.name, config.forgetting.budget, config.forgetting.max_kl) == ("drift", 0.01, 0.01)
    assert run_config.for_model(config, encoder=True) == config
    config = run_config.for_model(from_mapping({}), encoder=True)
    assert (config.forgetting.name, config.forgetting.budget, config.forgetting.max_kl) == ("drift", None, NO_BUDGET)
    decoder = run_config.for_model(from_mapping({}), encoder=False)
    assert (decoder.forgetting.name, decoder.forgetting.budget) == ("kl", 0.03)


@pytest.mark.parametrize(
    ("override", "encoder", "match"),
    [
        ("forgetting.max_kl=0.05", True, "forgetting.max_kl is 0.05: an encoder predicts no tokens"),
        ("forgetting.min_retention=0.9", True, "measured by fedblocks evaluate"),
        ("forgetting.max_drift=0.01", False, "drift is for encoders"),
    ],
)
def test_a_key_of_the_other_kind_of_model_is_refused(override: str, encoder: bool, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        run_config.for_model(from_mapping({}, (override,)), encoder=encoder)
    assert run_config.foreign_override((override,), encoder=encoder) == override.partition("=")[0]
    assert run_config.foreign_override((override,), encoder=not encoder) is None


def test_the_written_file_has_the_keys_of_its_kind_of_model(tmp_path: Path) -> None:
    text = run_config.to_toml(from_mapping({}, ("forgetting.max_drift=0.01",)), encoder=True)
    assert "max_drift = 0.01" in text
    assert "max_kl" not in text
    (tmp_path / "run.toml").write_text(text)
    assert run_config.load(tmp_path / "run.toml").forgetting.max_drift == 0.01
    assert "max_drift" not in run_config.to_toml(from_mapping({}), encoder=False)


def invitation(labels: tuple[str, ...] = ()) -> SiteFile:
    return SiteFile(
        client_name="site-a",
        address="tcp://127.0.0.1:5555",
        server_key=ClientKey("x" * 40),
        run_id="r",
        base_name="b",
        base_hash="0" * 64,
        data=DataFormat(max_tokens=64, append_eos=False, join=" ", labels=labels),
    )


def test_labels_travel_in_the_invitation_and_a_decoders_says_nothing_of_them(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(site_file.dump(invitation(('say "no"', "ja\n", "größer"))))
    assert site_file.load(path).data.labels == ('say "no"', "ja\n", "größer")
    path.write_text(site_file.dump(invitation()))
    assert "labels" not in path.read_text()
    assert site_file.load(path).data.labels == ()


@pytest.mark.parametrize("labels", [("a", "a"), ("a", ""), ("a" * 101,), tuple(map(str, range(1025)))])
def test_labels_that_cannot_be_told_apart_or_are_too_many_are_refused(labels: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="data format"):
        DataFormat(max_tokens=64, append_eos=False, join=" ", labels=labels)
