"""How does a federation of text classifiers go with each method? One loop over an encoder, in process.

The encoder (all-MiniLM-L6-v2) is pooled by the mean over its tokens, and a linear head classifies; the head trains in
every line with one learning rate. What else trains, and how the server folds it, is a *line*:

==================  =================================================================================================
head                nothing: the yardstick that forgets nothing
fedavg              every tensor of the encoder; theta += sum w_k (theta_k - theta)
fedit               LoRA r = 16, alpha = 2r, on every projection; A and B averaged separately
hetlora             LoRA of the device's rank, zero-padded; A and B averaged by |B_k A_k|
fedhft              ``aggregator/methods/fedhft.py`` and ``edge_client/masked_low_rank.py``; K from one on, by BIC
fedhft-k2           the same with two clusters from the start
fedhft-published    what the published code does (git-disl/FedHFT): trained at full rank, masked on the server, clusters
                    that are one aliased object, means by count, accumulated by adding once per cluster
==================  =================================================================================================

No device is slower than another here; its class decides how many rows or which rank it trains. All payloads are fp32.
Source: methods.md 10, 11, 12.
"""

# ruff: noqa: ARG002 - all lines have the same interface

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedblocks.aggregator.cohort import choose_cohort
from fedblocks.aggregator.methods import fedhft
from fedblocks.aggregator.methods.fedhft import MixtureState, PairUpdate, Prior, Update
from fedblocks.aggregator.run_rules import draw
from fedblocks.edge_client.masked_low_rank import FrozenPrior, MaskedLowRank, first_factor
from fedblocks.protocol import low_rank
from fedblocks.protocol.low_rank import Factored, Truncated
from fedblocks.protocol.messages import ClientKey
from fedblocks.protocol.row_mask import choose_rows, next_scores

LineName = Literal["head", "fedavg", "fedit", "hetlora", "fedhft", "fedhft-k2", "fedhft-published"]
Arrays = dict[str, npt.NDArray[np.float32]]

CLIENTS: Final = 20
COHORT: Final = 0.4
MIN_EXAMPLES: Final = 8
#: Device class -> share of the rows that it trains (methods.md 10.1), its rank in ``hetlora``, how many of the clients.
SHARES: Final = {"weak": 0.25, "middle": 0.5, "strong": 1.0}
RANKS: Final = {"weak": 8, "middle": 16, "strong": 32}
CLASS_SIZES: Final = {"weak": 6, "middle": 8, "strong": 6}
FEDIT_RANK: Final = 16
PAIR_SCALE: Final = 2.0
"""alpha = 2r (methods.md 11)."""
MAX_TOKENS: Final = 24
HEAD_RATE: Final = 0.1
"""The best of 0.003, 0.01, 0.03 and 0.1 for the line ``head`` on CLINC150, seed 0, validation parts."""
SCORING_BATCHES: Final = 2
ANCHOR_BATCH: Final = 4
BATCH_OF_EVALUATION: Final = 64
BETAS: Final = (0.9, 0.99)
CLIP_NORM: Final = 1.0
#: Names of the projections in a layer of BERT.
PROJECTIONS: Final = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
QUERY_VALUE: Final = ("query", "value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run."""

    line: LineName
    data: str
    """``banking77``, ``clinc150``, or ``two``: the ten domains of CLINC150, half of the clients name them otherwise."""
    alpha: float
    """Of the Dirichlet distribution over labels."""
    learning_rate: float
    seed: int
    anchor: bool = False
    """Drift of the embedding on general texts, weight 1 (methods.md 2.6)."""
    rounds: int = 12
    steps: int = 5
    batch_size: int = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Texts:
    """Tokenised texts and their classes."""

    ids: tuple[tuple[int, ...], ...]
    labels: npt.NDArray[np.int64]

    def batch(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, padded to the longest of the batch: (B, T) each."""
        return padded([self.ids[i] for i in index])


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask of the rows, (B, T) each; id 0 pads."""
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        mask[i, : len(row)] = 1
    return ids, mask


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Client:
    """One site: its rows of the train and test files, and its device."""

    key: ClientKey
    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    """A tenth of its rows of the train file."""
    test: npt.NDArray[np.int64]
    device: str
    population: int = 0
    labels: npt.NDArray[np.int64] | None = None
    """Class -> what this client calls it; None for the file's own name."""

    @property
    def share(self) -> float:
        """Of the rows that its device trains."""
        return SHARES[self.device]

    def name_of(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The classes as this client names them."""
        return labels if self.labels is None else self.labels[labels]


def partition(
    train: npt.NDArray[np.int64], test: npt.NDArray[np.int64], *, alpha: float, seed: int, populations: int = 1
) -> list[Client]:
    """The clients: Dirichlet over labels, the same shares of a label in both files, redrawn until each has enough.

    A second population has the classes' names permuted.
    """
    rng = np.random.default_rng([seed, int(1000 * alpha)])
    classes = int(train.max()) + 1
    while True:
        shares = rng.dirichlet([alpha] * CLIENTS, size=classes)
        trains = _dealt(train, shares, rng)
        if min(len(rows) for rows in trains) >= MIN_EXAMPLES:
            break
    tests = _dealt(test, shares, rng)
    devices = rng.permutation([name for name, count in CLASS_SIZES.items() for _ in range(count)]).tolist()
    renamed = rng.permutation(classes)
    clients: list[Client] = []
    for i in range(CLIENTS):
        held = max(1, len(trains[i]) // 10)
        population = i % populations
        clients.append(
            Client(
                key=ClientKey(f"client-{i:02d}"),
                train=trains[i][held:],
                validation=trains[i][:held],
                test=tests[i],
                device=devices[i],
                population=population,
                labels=renamed if population else None,
            )
        )
    return clients


def _dealt(
    labels: npt.NDArray[np.int64], shares: npt.NDArray[np.float64], rng: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    rows: list[list[int]] = [[] for _ in range(CLIENTS)]
    for label, parts in enumerate(shares):
        found = rng.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(parts)[:-1] * len(found)).round().astype(int)
        for client, chosen in enumerate(np.split(found, cuts)):
            rows[client] += chosen.tolist()
    return [rng.permutation(np.array(found, dtype=np.int64)) for found in rows]


def partition_hash(clients: Sequence[Client]) -> str:
    """SHA-256 of who has which rows, device and names."""
    plain = [
        [c.key, c.train.tolist(), c.validation.tolist(), c.test.tolist(), c.device, c.population]
        + ([] if c.labels is None else c.labels.tolist())
        for c in clients
    ]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


class Encoder:
    """The encoder with whatever stands over its projections at the moment."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.hash = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        self.base: dict[str, nn.Linear] = {
            f"{number}.{name}": layer.get_submodule(path)
            for number, layer in enumerate(self.model.encoder.layer)
            for name, path in PROJECTIONS.items()
        }
        self.start = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}

    def tokenised(self, texts: Sequence[str], labels: Sequence[int]) -> Texts:
        """Cut to :data:`MAX_TOKENS`."""
        ids = self.tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return Texts(ids=tuple(tuple(row) for row in ids), labels=np.array(labels, dtype=np.int64))

    def put(self, name: str, module: nn.Module) -> None:
        """Places a module where a projection was."""
        number, short = name.split(".")
        parent, _, last = PROJECTIONS[short].rpartition(".")
        setattr(self.model.encoder.layer[int(number)].get_submodule(parent), last, module)

    def restore(self) -> None:
        """The base itself, frozen."""
        for name, linear in self.base.items():
            self.put(name, linear)
        with torch.no_grad():
            for name, tensor in self.model.named_parameters():
                if tensor.requires_grad:
                    tensor.copy_(self.start[name])
        self.model.requires_grad_(False)
        for tensor in self.model.parameters():
            tensor.grad = None

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean over the tokens: (B, d)."""
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, T, d)
        weight = mask[:, :, None].float()
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1)

    @torch.no_grad()
    def embeddings(self, texts: Texts, index: Sequence[int]) -> Tensor:
        """Of the rows named, (rows, d); batched by length."""
        order = sorted(range(len(index)), key=lambda i: len(texts.ids[index[i]]))
        found = torch.empty(len(index), self.model.config.hidden_size)
        for first in range(0, len(order), BATCH_OF_EVALUATION):
            rows = order[first : first + BATCH_OF_EVALUATION]
            found[rows] = self.embed(*texts.batch([index[i] for i in rows]))
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Anchor:
    """General texts and what the base makes of them."""

    texts: Texts
    embeddings: Tensor
    """Normalised, (texts, d)."""

    def drift(self, encoder: Encoder, index: Sequence[int]) -> Tensor:
        """Mean squared distance of the normalised embeddings to the base's (methods.md 2.6); has a gradient."""
        found = functional.normalize(encoder.embed(*self.texts.batch(index)), dim=1)
        return (found - self.embeddings[list(index)]).square().sum(dim=1).mean()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """What a client sends: its part of the encoder is the line's matter."""

    client: Client
    head: Arrays
    encoder: Any = None


class Line(Protocol):
    """What a method does at both ends."""

    def begin(self, client: Client, round: int) -> Arrays:
        """Puts the client's model into the encoder, nothing of it trained yet; returns its head."""
        ...

    def needs_scores(self, client: Client) -> bool:
        """Whether gradients are taken before training."""
        ...

    def scored(self, client: Client) -> None:
        """One scoring batch's backward pass is done."""
        ...

    def trained(self, client: Client, round: int) -> list[Tensor]:
        """The leaf tensors of the encoder that train from here on."""
        ...

    def taken(self, client: Client) -> Any:
        """What the client trained of the encoder."""
        ...

    def fold(self, updates: Sequence[Trained]) -> None:
        """The server's step."""
        ...

    def show(self, client: Client | None) -> Arrays:
        """Puts the population's model, or a client's own one, into the encoder; returns its head."""
        ...

    def personal(self) -> bool:
        """Whether clients have models of their own."""
        ...

    def costs(self, client: Client) -> tuple[int, int, int]:
        """Bytes up, bytes down and bytes of values, gradients and moments while training, of one round."""
        ...

    def more(self, clients: Sequence[Client]) -> dict[str, Any]:
        """What else goes into the row."""
        ...


def head_shapes(classes: int, width: int) -> dict[str, tuple[int, ...]]:
    """Of the classification head."""
    return {"head.weight": (classes, width), "head.bias": (classes,)}


class Averaged:
    """Common to the lines with one model for all: a head averaged by examples."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        self.encoder = encoder
        self.head: Arrays = {
            name: np.zeros(shape, dtype=np.float32)
            for name, shape in head_shapes(classes, encoder.model.config.hidden_size).items()
        }
        self.head_values = sum(value.size for value in self.head.values())

    def begin(self, client: Client, round: int) -> Arrays:
        return self.show(client)

    def needs_scores(self, client: Client) -> bool:
        return False

    def scored(self, client: Client) -> None:
        raise AssertionError

    def trained(self, client: Client, round: int) -> list[Tensor]:
        return []

    def taken(self, client: Client) -> Any:
        return None

    def fold(self, updates: Sequence[Trained]) -> None:
        weights = example_weights(updates)
        for name in self.head:
            self.head[name] = weighted([u.head[name] for u in updates], weights)

    def show(self, client: Client | None) -> Arrays:
        self.encoder.restore()
        return self.head

    def personal(self) -> bool:
        return False

    def costs(self, client: Client) -> tuple[int, int, int]:
        values = self.values(client) + self.head_values
        return 4 * values, 4 * values, 16 * values

    def values(self, client: Client) -> int:
        """How many of the encoder's values train."""
        return 0

    def more(self, clients: Sequence[Client]) -> dict[str, Any]:
        return {}


def example_weights(updates: Sequence[Trained]) -> list[float]:
    """n_k / sum n."""
    total = sum(len(u.client.train) for u in updates)
    return [len(u.client.train) / total for u in updates]


def weighted(arrays: Sequence[npt.NDArray[np.float32]], weights: Sequence[float]) -> npt.NDArray[np.float32]:
    """The weighted sum, in fp64."""
    total = np.zeros(arrays[0].shape, dtype=np.float64)
    for array, weight in zip(arrays, weights, strict=True):
        total += weight * array.astype(np.float64)
    return total.astype(np.float32)


class FullFineTuning(Averaged):
    """``fedavg``"""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__(encoder, classes)
        self.names = [name for name in encoder.start if not name.startswith("pooler.")]
        self.values_of = {name: encoder.start[name].numpy().copy() for name in self.names}

    def trained(self, client: Client, round: int) -> list[Tensor]:
        return self._parameters()

    def _parameters(self) -> list[Tensor]:
        named = dict(self.encoder.model.named_parameters())
        return [named[name].requires_grad_() for name in self.names]

    def show(self, client: Client | None) -> Arrays:
        with torch.no_grad():
            for name, tensor in zip(self.names, self._parameters(), strict=True):
                tensor.copy_(torch.from_numpy(self.values_of[name]))
        return self.head

    def taken(self, client: Client) -> Arrays:
        return {n: t.detach().numpy().copy() for n, t in zip(self.names, self._parameters(), strict=True)}

    def fold(self, updates: Sequence[Trained]) -> None:
        super().fold(updates)
        weights = example_weights(updates)
        for name in self.names:
            self.values_of[name] = weighted([u.encoder[name] for u in updates], weights)

    def values(self, client: Client) -> int:
        return sum(value.size for value in self.values_of.values())


class Pairs(Averaged):
    """``fedit``, and what ``hetlora`` shares with it."""

    def __init__(self, encoder: Encoder, classes: int, seed: int, rank: int = FEDIT_RANK) -> None:
        super().__init__(encoder, classes)
        self.rank = rank
        self.a: Arrays = {}
        self.b: Arrays = {}
        for name, linear in encoder.base.items():
            bound = 1 / math.sqrt(linear.in_features)  # as peft draws it
            rng = np.random.default_rng(draw(seed, name))
            self.a[name] = rng.uniform(-bound, bound, (rank, linear.in_features)).astype(np.float32)
            self.b[name] = np.zeros((linear.out_features, rank), dtype=np.float32)
        self.modules: dict[str, MaskedLowRank] = {}

    def rank_of(self, client: Client | None) -> int:
        return self.rank

    def show(self, client: Client | None) -> Arrays:
        self.encoder.restore()
        rank = self.rank_of(client)
        for name, linear in self.encoder.base.items():
            module = MaskedLowRank(
                linear, num_out=linear.out_features, a=torch.from_numpy(self.a[name][:rank]), scale=PAIR_SCALE
            )
            module.train_rows(np.ones(linear.out_features, dtype=np.bool_))
            assert module.b is not None
            with torch.no_grad():
                module.b.copy_(torch.from_numpy(np.ascontiguousarray(self.b[name][:, :rank])))
            self.modules[name] = module
            self.encoder.put(name, module)
        return self.head

    def trained(self, client: Client, round: int) -> list[Tensor]:
        return [tensor for module in self.modules.values() for tensor in module.trained.values()]

    def taken(self, client: Client) -> dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        return {name: (m.a.detach().numpy().copy(), m.whole_b()) for name, m in self.modules.items()}

    def fold(self, updates: Sequence[Trained]) -> None:
        super().fold(updates)
        for name in self.a:
            pairs = [u.encoder[name] for u in updates]
            weights = self.weights(updates, pairs)
            self.a[name] = weighted([_grown(a, self.rank, 0) for a, _ in pairs], weights)
            self.b[name] = weighted([_grown(b, self.rank, 1) for _, b in pairs], weights)

    def weights(self, updates: Sequence[Trained], pairs: Sequence[Any]) -> list[float]:
        return example_weights(updates)

    def values(self, client: Client) -> int:
        rank = self.rank_of(client)
        return sum(rank * (m.out_features + m.in_features) for m in self.encoder.base.values())


class HeterogeneousPairs(Pairs):
    """``hetlora`` (2401.06432), without its optional rank decay and pruning."""

    def __init__(self, encoder: Encoder, classes: int, seed: int) -> None:
        super().__init__(encoder, classes, seed, rank=max(RANKS.values()))

    def rank_of(self, client: Client | None) -> int:
        return self.rank if client is None else RANKS[client.device]

    def weights(self, updates: Sequence[Trained], pairs: Sequence[Any]) -> list[float]:
        norms = [low_rank.pair_norm(b.astype(np.float64), a.astype(np.float64).T) for a, b in pairs]
        total = sum(norms)
        return [norm / total for norm in norms] if total > 0 else example_weights(updates)


def _grown(array: npt.NDArray[np.float32], rank: int, axis: int) -> npt.NDArray[np.float32]:
    """Zero-padded to the rank."""
    missing = [(0, 0), (0, 0)]
    missing[axis] = (0, rank - array.shape[axis])
    return np.pad(array, missing)


class Mixtures:
    """``fedhft``"""

    def __init__(self, encoder: Encoder, classes: int, seed: int, method: fedhft.Settings | None = None) -> None:
        self.encoder, self.seed = encoder, seed
        self.targets = {n: m for n, m in encoder.base.items() if n.split(".")[1] in QUERY_VALUE}
        heads = head_shapes(classes, encoder.model.config.hidden_size)
        self.method = method if method is not None else fedhft.Settings(seed=seed, test_rounds=1)
        self.layout = fedhft.Layout(
            matrices={name: (m.out_features, m.in_features) for name, m in self.targets.items()},
            dense=heads,
            signature=("head.weight",),
        )
        self.state: MixtureState = fedhft.initial_state(self.layout, self.method)
        self.row_scores: dict[tuple[ClientKey, str], npt.NDArray[np.float32]] = {}
        self.modules: dict[str, MaskedLowRank] = {}
        self.head: Arrays = {}
        self.masks: dict[str, npt.NDArray[np.bool_]] = {}
        self.errors: list[float] = []
        self._priors: dict[tuple[float, ...], Prior] = {}

    def _prior(self, memberships: tuple[float, ...]) -> Prior:
        if memberships not in self._priors:
            self._priors[memberships] = fedhft.prior(self.state, memberships)
        return self._priors[memberships]

    def _place(self, found: Prior) -> Arrays:
        self.encoder.restore()
        for name, linear in self.targets.items():
            cut: Truncated = found.matrices[name]
            module = MaskedLowRank(
                linear,
                num_out=linear.out_features,
                a=first_factor(self.method.rank, linear.in_features, draw(self.seed, name)),
                prior=FrozenPrior(left=cut.left, right=cut.right),
                scale=self.method.scale,
            )
            self.modules[name] = module
            self.encoder.put(name, module)
        self.head = dict(found.dense)
        return self.head

    def begin(self, client: Client, round: int) -> Arrays:
        found = self._prior(self.state.memberships(client.key))
        self.errors.append(found.error)
        return self._place(found)

    def needs_scores(self, client: Client) -> bool:
        if client.share == 1.0:
            return False
        for module in self.modules.values():
            module.begin_scoring()
        return True

    def scored(self, client: Client) -> None:
        for name, module in self.modules.items():
            energy = module.take_energy()
            before = self.row_scores.get((client.key, name), np.zeros_like(energy))
            self.row_scores[client.key, name] = next_scores(before, energy)

    def trained(self, client: Client, round: int) -> list[Tensor]:
        for name, module in self.modules.items():
            scores = self.row_scores.get((client.key, name), np.zeros(module.num_out, dtype=np.float32))
            self.masks[name] = choose_rows(scores, client.share, client=client.key, round=round, matrix=name)
            module.train_rows(self.masks[name])
        return [tensor for module in self.modules.values() for tensor in module.trained.values()]

    def taken(self, client: Client) -> dict[str, PairUpdate]:
        return {
            name: PairUpdate(
                rows=self.masks[name], b=module.whole_b()[self.masks[name]], a=module.a.detach().numpy().copy()
            )
            for name, module in self.modules.items()
        }

    def fold(self, updates: Sequence[Trained]) -> None:
        starts = {u.client.key: self._prior(self.state.memberships(u.client.key)).dense for u in updates}
        sent = [
            Update(
                client=u.client.key,
                num_examples=len(u.client.train),
                pairs=u.encoder,
                dense={name: value - starts[u.client.key][name] for name, value in u.head.items()},
            )
            for u in updates
        ]
        self.state = fedhft.after_priors(self.state, self.errors, self.method)
        self.errors = []
        self.state = fedhft.aggregate(self.state, sent, layout=self.layout, settings=self.method)
        self._priors = {}

    def show(self, client: Client | None) -> Arrays:
        known = self.state.population() if client is None else self.state.memberships(client.key)
        return self._place(self._prior(known))

    def personal(self) -> bool:
        return len(self.state.clusters) > 1

    def costs(self, client: Client) -> tuple[int, int, int]:
        return (
            fedhft.update_bytes(self.layout, self.method, client.share),
            fedhft.prior_bytes(self.layout, self.state),
            fedhft.trained_bytes(self.layout, self.method, client.share),
        )

    def more(self, clients: Sequence[Client]) -> dict[str, Any]:
        known = [c for c in clients if c.key in self.state.members]
        table = np.array([self.state.memberships(c.key) for c in known])
        planted = np.array([c.population for c in known])
        return {
            "clusters": len(self.state.clusters),
            "prior_rank": self.state.prior_rank,
            "prior_error": self._prior(self.state.population()).error,
            "memberships": table.round(3).tolist(),
            "adjusted_rand": adjusted_rand(table.argmax(axis=1), planted) if planted.any() else None,
        }


def adjusted_rand(found: npt.NDArray[np.int64], planted: npt.NDArray[np.int64]) -> float:
    """Adjusted Rand index (Hubert and Arabie, 1985); 0 where there is one group on either side."""
    if len(set(found.tolist())) == 1 or len(set(planted.tolist())) == 1:
        return 0.0
    table = np.array([[np.sum((found == a) & (planted == b)) for b in set(planted)] for a in set(found)])

    def pairs(counts: npt.NDArray[Any]) -> float:
        return float(np.sum(counts * (counts - 1) / 2))

    rows, columns, total = pairs(table.sum(axis=1)), pairs(table.sum(axis=0)), len(found) * (len(found) - 1) / 2
    expected = rows * columns / total
    return (pairs(table) - expected) / ((rows + columns) / 2 - expected)


class Published(Averaged):
    """``fedhft-published``: the behaviour of the published code, for reference, and nowhere else.

    K lists that are one object, so K clusters are one; every cluster's addition goes into it, K times the update (in
    the first round 2^(K-1) times); means are divided by the number of clients, not by membership; rows are chosen by
    the energy of what was trained, on the server, so the device trains, holds and sends all of them. Memberships have
    no effect, since they sum to one in the common object.
    """

    CLUSTERS: Final = 2

    def __init__(self, encoder: Encoder, classes: int, seed: int, rank: int = 32) -> None:
        super().__init__(encoder, classes)
        self.seed, self.rank = seed, rank
        self.targets = {n: m for n, m in encoder.base.items() if n.split(".")[1] in QUERY_VALUE}
        self.gradients: list[dict[str, npt.NDArray[np.float64]]] = [{}] * self.CLUSTERS
        self.modules: dict[str, MaskedLowRank] = {}

    def show(self, client: Client | None) -> Arrays:
        self._place()
        return self.head

    def begin(self, client: Client, round: int) -> Arrays:
        self._place()
        return self.head

    def _place(self) -> None:
        self.encoder.restore()
        for name, linear in self.targets.items():
            accumulated = self.gradients[0].get(name)
            prior = None
            if accumulated is not None:
                whole = Factored(
                    left=accumulated.astype(np.float32), right=np.eye(linear.in_features, dtype=np.float32)
                )
                cut = low_rank.truncate(whole, self.rank)
                prior = FrozenPrior(left=cut.left, right=cut.right)
            self.modules[name] = MaskedLowRank(
                linear,
                num_out=linear.out_features,
                a=first_factor(self.rank, linear.in_features, draw(self.seed, name)),
                prior=prior,
            )
            self.encoder.put(name, self.modules[name])

    def trained(self, client: Client, round: int) -> list[Tensor]:
        for module in self.modules.values():
            module.train_rows(np.ones(module.num_out, dtype=np.bool_))
        return [tensor for module in self.modules.values() for tensor in module.trained.values()]

    def taken(self, client: Client) -> dict[str, npt.NDArray[np.float64]]:
        """The product, with the rows of least energy taken out."""
        found = {}
        for name, module in self.modules.items():
            product = module.whole_b().astype(np.float64) @ module.a.detach().numpy().astype(np.float64)
            energy = (product**2).sum(axis=1)
            threshold = np.sort(energy)[int(len(energy) * (1 - client.share))] if client.share < 1 else -1.0
            product[energy < threshold] = np.nan
            found[name] = product
        return found

    def fold(self, updates: Sequence[Trained]) -> None:
        for name in self.head:
            self.head[name] = weighted([u.head[name] for u in updates], [1 / len(updates)] * len(updates))
        accumulate_as_published(self.gradients, [u.encoder for u in updates])

    def values(self, client: Client) -> int:
        return sum(self.rank * (m.out_features + m.in_features) for m in self.targets.values())


def accumulate_as_published(
    gradients: list[dict[str, npt.NDArray[np.float64]]], updates: Sequence[Mapping[str, npt.NDArray[np.float64]]]
) -> None:
    """The published accumulation over aliased dictionaries; NaN marks rows that a mask took out."""
    clusters = len(gradients)
    memberships = np.full((len(updates), clusters), 1 / clusters)
    for name in updates[0]:
        sums = [np.zeros(updates[0][name].shape)] * clusters
        count = np.zeros(updates[0][name].shape)
        for i, update in enumerate(updates):
            kept = ~np.isnan(update[name][:, 0])
            for j in range(clusters):
                sums[j][kept] += update[name][kept] * memberships[i, j]
            count[kept] += 1
        count[count == 0] = 1
        means: list[dict[str, npt.NDArray[np.float64]]] = [{}] * clusters
        for j in range(clusters):
            sums[j] = sums[j] / count
            means[j][name] = sums[j]
        for j in range(clusters):
            if name in gradients[j]:
                gradients[j][name] += means[j][name]
            else:
                gradients[j][name] = means[j][name]


def make_line(name: LineName, encoder: Encoder, classes: int, seed: int) -> Line:
    """A fresh one."""
    match name:
        case "head":
            return Averaged(encoder, classes)
        case "fedavg":
            return FullFineTuning(encoder, classes)
        case "fedit":
            return Pairs(encoder, classes, seed)
        case "hetlora":
            return HeterogeneousPairs(encoder, classes, seed)
        case "fedhft":
            return Mixtures(encoder, classes, seed)
        case "fedhft-k2":
            two = fedhft.Settings(seed=seed, clusters=2, choose_clusters=False)
            return Mixtures(encoder, classes, seed, two)
        case "fedhft-published":
            return Published(encoder, classes, seed)


def cohorts(clients: Sequence[Client], rounds: int, seed: int) -> Iterator[tuple[int, list[Client]]]:
    """Who takes part in each round, counted from 1."""
    last = {client.key: 0 for client in clients}
    for round in range(1, rounds + 1):
        chosen = choose_cohort(last, fraction=COHORT, round=round, seed=seed)
        last |= dict.fromkeys(chosen, round)
        yield round, [client for client in clients if client.key in chosen]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Federation:
    """The materials of a run."""

    encoder: Encoder
    train: Texts
    test: Texts
    clients: Sequence[Client]
    anchor: Anchor

    @property
    def classes(self) -> int:
        """Of the head."""
        return int(self.train.labels.max()) + 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """A finished federation."""

    line: Line
    up_bytes: int
    """Of all clients over all rounds."""
    down_bytes: int
    trained_bytes: Mapping[str, int]
    """Device class -> values, gradients and moments while training, at most."""
    train_loss: float
    """Mean of the last round."""
    train_cpu_s: float
    server_cpu_s: float


def federate(federation: Federation, settings: Settings) -> Outcome:
    """All rounds of one run."""
    line = make_line(settings.line, federation.encoder, federation.classes, settings.seed)
    up = down = 0
    memory = dict.fromkeys(SHARES, 0)
    losses: list[float] = []
    train_s = server_s = 0.0
    for round, cohort in cohorts(federation.clients, settings.rounds, settings.seed):
        updates: list[Trained] = []
        losses = []
        for client in cohort:
            started = time.process_time()
            head = line.begin(client, round)
            server_s += time.process_time() - started
            started = time.process_time()
            found, loss = _train(federation, line, client, head, round, settings)
            train_s += time.process_time() - started
            updates.append(found)
            losses.append(loss)
            sent, received, held = line.costs(client)
            up, down = up + sent, down + received
            memory[client.device] = max(memory[client.device], held)
        started = time.process_time()
        line.fold(updates)
        server_s += time.process_time() - started
    return Outcome(
        line=line,
        up_bytes=up,
        down_bytes=down,
        trained_bytes=memory,
        train_loss=float(np.mean(losses)),
        train_cpu_s=train_s,
        server_cpu_s=server_s,
    )


def _train(
    federation: Federation, line: Line, client: Client, start: Arrays, round: int, settings: Settings
) -> tuple[Trained, float]:
    """One client's round: score rows where the line asks for it, then the steps; the mean loss of the task."""
    rng = np.random.default_rng(draw(settings.seed, client.key, round))
    head = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in start.items()}
    names = client.name_of(federation.train.labels)

    def task_loss() -> Tensor:
        rows = rng.choice(client.train, size=min(settings.batch_size, len(client.train)), replace=False)
        embedded = federation.encoder.embed(*federation.train.batch(rows.tolist()))
        logits = functional.linear(embedded, head["head.weight"], head["head.bias"])
        return functional.cross_entropy(logits, torch.from_numpy(names[rows]))

    if line.needs_scores(client):
        for _ in range(SCORING_BATCHES):
            task_loss().backward()
            line.scored(client)
    tensors = line.trained(client, round)
    groups = [{"params": list(head.values()), "lr": HEAD_RATE}]
    if tensors:
        groups.append({"params": tensors, "lr": settings.learning_rate})
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)
    losses: list[float] = []
    for _ in range(settings.steps):
        optimizer.zero_grad()
        loss = task_loss()
        losses.append(loss.item())
        if settings.anchor:
            rows = rng.choice(len(federation.anchor.texts.ids), size=ANCHOR_BATCH, replace=False).tolist()
            loss = loss + federation.anchor.drift(federation.encoder, rows)
        loss.backward()
        nn.utils.clip_grad_norm_([*tensors, *head.values()], CLIP_NORM)
        optimizer.step()
    arrays = {name: value.detach().numpy().copy() for name, value in head.items()}
    return Trained(client=client, head=arrays, encoder=line.taken(client)), float(np.mean(losses))


def correct(
    head: Arrays, texts: Texts, client: Client, index: npt.NDArray[np.int64], embedded: Tensor
) -> npt.NDArray[np.bool_]:
    """Which of the client's rows the model in the encoder gets right, as this client names the classes."""
    logits = functional.linear(embedded, torch.from_numpy(head["head.weight"]), torch.from_numpy(head["head.bias"]))
    return (logits.argmax(dim=1).numpy() == client.name_of(texts.labels)[index]).astype(np.bool_)
