"""Which rows of its pairs does a client train? Scores from the gradient before training, kept from round to round.

The score of a row is a decaying mean of its Fisher energy (``protocol/row_mask.py``; methods.md 10.2, step 2). What a
round has scored is a file of that round's number, so that a round that is trained again starts from the same scores and
chooses the same rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from fedblocks.edge_client.store import write_tensors
from fedblocks.protocol.expansion import ExpansionPlan
from fedblocks.protocol.messages import ClientKey
from fedblocks.protocol.row_mask import FloatArray, RowMask, choose_rows, next_scores
from fedblocks.protocol.tensors import State, flatten, unflatten

logger = logging.getLogger(__name__)

Energies = Mapping[int, Mapping[str, FloatArray]]
"""Unit -> name of a pair's B -> |dL/dB[i,:]|² of one batch, (out,)."""


class RowScores:
    """The scores of one client in one run.

    Args:
        folder: inside the client's folder of the run; made when it is first needed.
        plan: the run's plan; what was scored under another one is not used.
        client: whose rows they are: others draw other ones.
    """

    def __init__(self, folder: Path, *, plan: ExpansionPlan, client: ClientKey) -> None:
        self._folder = folder
        self._digest = plan.digest()
        self._client = client

    def choose(self, batches: Sequence[Energies], *, round: int, width: float) -> dict[int, dict[str, RowMask]]:
        """The rows to train in this round, exactly ``ceil(width·out)`` of each B; keeps the scores.

        Args:
            batches: of the state that the round starts from, in order.

        Raises:
            ValueError: an energy is not finite.
        """
        scores = self._before(round)
        for energies in batches:
            for unit, by_name in energies.items():
                known = scores.setdefault(unit, {})
                for name, energy in by_name.items():
                    before = known.get(name)
                    known[name] = next_scores(np.zeros_like(energy) if before is None else before, energy)
        chosen = {
            unit: {
                name: choose_rows(values, width, client=self._client, round=round, matrix=f"{unit}/{name}")
                for name, values in by_name.items()
            }
            for unit, by_name in scores.items()
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self._path(round), flatten(scores), {"plan": self._digest})
        return chosen

    def _path(self, round: int) -> Path:
        return self._folder / f"{round:08d}.safetensors"

    def _before(self, round: int) -> State:
        """The scores after the last round before this one; older files are deleted."""
        paths = sorted(path for path in self._folder.glob("*.safetensors") if path < self._path(round))
        for path in paths[:-1]:
            path.unlink()
        if not paths:
            return {}
        try:
            with safe_open(paths[-1], framework="numpy") as file:
                if (file.metadata() or {}).get("plan") != self._digest:
                    return {}
                return unflatten({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError) as error:
            logger.warning("dropped the row scores %s: %s", paths[-1].name, error)
            paths[-1].unlink(missing_ok=True)
            return {}
