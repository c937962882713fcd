"""What does a researcher call? ``from fedblocks import simulate, evaluate, load_results``.

Thin functions over what the command line does; nothing heavy is imported before one is called.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from fedblocks.fleet_file import Fleet
    from fedblocks.simulation import SimulationResult

RESULT_FILE = "result.json"
METRICS_FILE = "metrics.jsonl"
_ROWS = ("rows", "rounds", "history")
"""Where a result has its rows: of a benchmark, of a simulation, of the demo."""


def simulate(
    fleet: Fleet | Path | str,
    *,
    out: Path | str,
    model: Path | str | None = None,
    train: Path | str | None = None,
    general: Path | str | None = None,
    labels: Path | str | None = None,
    anchor_texts: Path | str | None = None,
    workers: int = 1,
    say: Callable[[str], None] = lambda _line: None,
) -> SimulationResult:
    """Run a fleet of assumed devices on a virtual clock, as ``fedblocks simulate`` does; also writes its result.json.

    Args:
        fleet: the TOML file of docs/simulate.md, or a ``fedblocks.fleet_file.Fleet``.
        out: folder of the run and the result; what an earlier simulation left there is removed.
        model: the base model; None is the bundled starter with its own task.
        train: with ``model``: JSONL to deal to the clients.
        general: with ``model``: JSONL that measures general ability.
        labels, anchor_texts: with an encoder, as ``fedblocks init`` takes them.
        workers: processes that do the arithmetic; the result is the same with any number.
        say: takes lines about the rounds.

    Raises:
        ConfigError: the fleet, the rows or the folder cannot be used.
    """
    from fedblocks import fleet_file, simulation

    wanted = fleet_file.load(Path(fleet)) if isinstance(fleet, Path | str) else fleet
    folder = Path(out)
    inputs = simulation.inputs_of(
        _path(model), _path(train), _path(general), folder, labels=_path(labels), anchor_texts=_path(anchor_texts)
    )
    result = simulation.simulate(wanted, inputs, folder, workers=workers, say=say)
    (folder / RESULT_FILE).write_text(json.dumps(result.to_plain(), indent=1), encoding="utf-8")
    return result


def evaluate(
    model: Path | str | Sequence[Path | str],
    *,
    base: Path | str,
    suite: Path | str | None = None,
    downstream: Path | str | None = None,
    general: Path | str | None = None,
    strength: float | None = None,
    overrides: Sequence[str] = (),
    limit: int | None = None,
    packed: bool = False,
    window: int | None = None,
    kl_sequences: int = 256,
    draws: int = 10_000,
) -> dict[str, Any]:
    """Measure a model, or a run on its 4-bit stack, beside its base, as ``fedblocks evaluate`` does.

    Args:
        model: a Hugging Face folder or a run folder; with ``suite`` also several, seeds of one experiment.
        base: the base model.
        suite: folder whose ``*.jsonl`` are tasks (docs/evaluation.md).
        downstream: JSONL of the task that was learnt.
        general: JSONL of general ability.
        strength: for a run folder, of the expanded blocks; default: the one that the run chose within its budget.
        overrides: ``data.key=value``.
        limit: of the suite: first rows of each task only.
        packed: of the suite: plain texts as one text, in full windows.
        window: of the suite: longest input in tokens.
        kl_sequences: of the suite: texts that the base writes for the KL.
        draws: of the suite: bootstrap draws of an interval.

    Returns:
        The keys of ``evaluate --json`` (docs/evaluation.md); with a suite also ``suite``, whose ``items`` holds every
        item's log-likelihoods. With a suite and neither ``downstream`` nor ``general``: only ``suite``.

    Raises:
        CheckpointError: a folder holds no model.
        ConfigError: several models and more than a suite to measure.
        DataError: a file cannot be used.
    """
    from fedblocks.protocol.run_config import ConfigError

    models = [Path(model)] if isinstance(model, Path | str) else [Path(one) for one in model]
    with_files = suite is None or downstream is not None or general is not None
    if not models or (len(models) > 1 and with_files):
        raise ConfigError(
            f"evaluate: {len(models)} models, expected one; several seeds of an experiment need a suite, and neither "
            "downstream nor general"
        )
    settings = tuple(overrides)
    result: dict[str, Any] = {}
    if with_files:
        from fedblocks.edge_client.evaluation import evaluate_target

        result |= evaluate_target(
            models[0],
            base=Path(base),
            downstream=_path(downstream),
            general=_path(general),
            strength=strength,
            overrides=settings,
        )
    if suite is not None:
        from fedblocks.edge_client.suite import SuiteOptions, evaluate_suite

        options = SuiteOptions(limit=limit, packed=packed, window=window, kl_sequences=kl_sequences, draws=draws)
        result["suite"] = evaluate_suite(
            models, base=Path(base), suite=Path(suite), strength=strength, overrides=settings, options=options
        )
    return result


def load_results(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a result, ready for a table: ``pandas.DataFrame(load_results(path))``.

    Args:
        path: a JSON lines file (metrics.jsonl: a row a round); the JSON of ``simulate`` (rounds), ``demo`` (rounds),
            ``evaluate --suite`` (tasks) or a benchmark (rows; else the whole is one row); or the folder of a run or of
            a simulation.

    Raises:
        DataError: nothing there that holds rows; the text names file and line.
    """
    from fedblocks.edge_client.data import DataError

    file = Path(path)
    if file.is_dir():
        known = [file / name for name in (RESULT_FILE, METRICS_FILE) if (file / name).is_file()]
        if not known:
            raise DataError(
                f"{file}: holds neither {RESULT_FILE} nor {METRICS_FILE}, expected a run's folder or a file"
            )
        file = known[0]
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); expected JSON or JSON lines") from error
    if file.suffix == ".jsonl":
        lines = [(f"{file}, line {i}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return [_object(where, _parsed(where, line)) for where, line in lines]
    content = _parsed(str(file), text)
    if isinstance(content, dict):
        content = _rows_of(cast("dict[str, Any]", content))
    if not isinstance(content, list):
        raise DataError(f"{file}: a JSON {type(content).__name__}, expected an object or a list of rows")
    rows = cast("list[Any]", content)
    return [_object(f"{file}, row {i}", row) for i, row in enumerate(rows, start=1)]


def _rows_of(result: dict[str, Any]) -> Any:
    """The rows of a result that is one object; itself as the only row where it has none."""
    if "suite" in result and isinstance(result["suite"], dict):
        return cast("dict[str, Any]", result["suite"]).get("tasks")
    return next((result[key] for key in _ROWS if result.get(key)), [result])


def _parsed(where: str, text: str) -> Any:
    from fedblocks.edge_client.data import DataError

    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no valid JSON ({error})") from error


def _object(where: str, row: Any) -> dict[str, Any]:
    from fedblocks.edge_client.data import DataError

    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}, expected an object")
    return cast("dict[str, Any]", row)


def _path(value: Path | str | None) -> Path | None:
    return None if value is None else Path(value)
