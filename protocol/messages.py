"""Which messages exist, and what is in each of them?

Every message is a frozen dataclass of plain values; ``codec.py`` turns it into bytes and back.
A message may announce a payload (raw bytes that follow in chunks, never inside msgpack); the fields ``payload_bytes``
and ``payload_sha256`` say what will come before anything is allocated for it.
Changing a field changes ``PROTOCOL_VERSION``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, NewType

from fedblocks.profiles.cost import ExecutionMode, OptimizerMode
from fedblocks.profiles.device import DeviceProfile
from fedblocks.profiles.model_shape import WIDTHS
from fedblocks.profiles.units import block_units
from fedblocks.protocol.errors import RefusalCode

PROTOCOL_VERSION: Final = 5

#: Lines about kernels in one update, and the length of each.
MAX_KERNEL_FALLS: Final = 8
MAX_FALL_CHARACTERS: Final = 200

ClientKey = NewType("ClientKey", str)
"""A client's identity: its CURVE public key in Z85 text (40 characters)."""
AttemptId = NewType("AttemptId", str)
"""Issued by the aggregator with each task; (client key, round, attempt id) makes an update idempotent."""

DeltaFormat = Literal["int8", "bf16", "fp32"]
Measure = Literal["validation", "anchor", "general"]
"""validation: the site's own held-out part; anchor: KL to the base on kl_val; general: the general validation file."""
FailureReason = Literal[
    "oom", "over_memory_budget", "non_finite", "deadline", "data", "disk", "interrupted", "internal"
]
#: Labels of an encoder's run, and the length of each.
MAX_LABELS: Final = 1024
MAX_LABEL_CHARACTERS: Final = 100
#: Bins of a topic histogram.
MAX_TOPICS: Final = 64
#: Strengths at which a finished run is measured (methods.md 9), and the most of one evaluation.
STRENGTHS: Final = tuple(step / 10 for step in range(11))
MAX_STRENGTHS: Final = len(STRENGTHS)
#: One-sided 95 %: a forgetting budget is kept if the estimate keeps it by so many standard errors (methods.md 9).
BUDGET_ERRORS: Final = 1.64
StateEncoding = Literal["none", "replay", "difference", "snapshot"]


def _require_not_negative(message: object, *names: str) -> None:
    for name in names:
        if getattr(message, name) < 0:
            raise ValueError(f"{type(message).__name__}: {name} is {getattr(message, name)}, expected 0 or more")


def _require_active(what: str, blocks: tuple[int, ...]) -> None:
    if list(blocks) != sorted(set(blocks)) or any(block < 0 for block in blocks):
        raise ValueError(f"{what}: active_blocks are {blocks}, expected ascending ids without repeats")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataStatistics:
    """What a site tells about its data: a few numbers, nothing of the data itself."""

    num_examples: int
    num_target_tokens: int
    mean_tokens: float
    """Tokens per training example after truncation."""
    max_tokens: int
    topics: tuple[int, ...] = ()
    """Training examples by topic (or label), at most 64 bins; empty unless the site allows it."""

    def __post_init__(self) -> None:
        _require_not_negative(self, "num_examples", "num_target_tokens", "mean_tokens", "max_tokens")
        if len(self.topics) > MAX_TOPICS or any(count < 0 for count in self.topics):
            raise ValueError(
                f"data statistics: {len(self.topics)} topics, the smallest of {min(self.topics)} examples, expected at "
                f"most {MAX_TOPICS} of 0 or more"
            )
        if sum(self.topics) > self.num_examples:
            raise ValueError(
                f"data statistics: {sum(self.topics)} examples by topic, expected at most num_examples "
                f"({self.num_examples})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Sums, not means, so that reports can be pooled. Unused sums are 0."""

    measure: Measure
    version: int
    """The published state that was measured."""
    num_items: int = 0
    num_correct: int = 0
    nll_sum: float = 0.0
    """Negative log-likelihood over ``num_tokens`` target tokens, nats."""
    num_tokens: int = 0
    kl_sum: float = 0.0
    """KL to the base over ``num_tokens`` anchor tokens, nats; rounding may leave it a little below 0."""
    kl_square_sum: float = 0.0
    """Sum over the ``num_items`` anchor sequences of the square of each one's KL sum, nats²."""
    strength: float = 1.0
    """Factor on the out-tensors of the blocks with which it was measured."""

    def __post_init__(self) -> None:
        _require_not_negative(self, "version", "num_items", "num_correct", "nll_sum", "num_tokens", "kl_square_sum")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"measurement: strength is {self.strength}, expected a number from 0 to 1")
        if self.num_correct > self.num_items:
            raise ValueError(f"measurement: {self.num_correct} correct of {self.num_items} items")


@dataclass(frozen=True, slots=True, kw_only=True)
class StateUpdate:
    """How a client gets from the published version it holds to the one that the task starts from.

    The payload of the carrying message is this update's bytes (``protocol/state.py``).
    """

    encoding: StateEncoding
    from_version: int
    to_version: int
    state_sha256: str
    """Hash of the accumulated deltas of all expanded blocks after the update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Client to aggregator: who I am, what I hold, what I can do."""

    protocol_version: int
    run_id: str
    base_hash: str
    client_name: str
    software: str
    """Versions for the books, e.g. ``fedblocks 0.1.0, torch 2.13.0``."""
    profile: DeviceProfile
    statistics: DataStatistics
    held_version: int
    """Published version that the client has on disk, 0 if none."""
    can_evaluate_general: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceInfo:
    """One file of the run folder that clients need: opaque bytes with a hash."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFormat:
    """How every site turns its rows into tokens: the ``[data]`` section of run.toml."""

    max_tokens: int
    """Training examples are cut to this many tokens."""
    append_eos: bool
    """True if the end-of-sequence token is a target at the end of each completion."""
    join: str
    """Stands between prompt and completion where neither brings white space of its own."""
    labels: tuple[str, ...] = ()
    """Of an encoder's run: every label that a row may have, in the order of the head's rows; empty for decoders."""

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise ValueError(f"data format: max_tokens is {self.max_tokens}, expected at least 2")
        if len(set(self.labels)) != len(self.labels) or "" in self.labels:
            raise ValueError(
                f"data format: {len(self.labels)} labels, {len(set(self.labels))} of them different, expected each "
                "once and none empty"
            )
        if len(self.labels) > MAX_LABELS or any(len(label) > MAX_LABEL_CHARACTERS for label in self.labels):
            raise ValueError(
                f"data format: {len(self.labels)} labels of up to {max(map(len, self.labels))} characters, expected at "
                f"most {MAX_LABELS} of {MAX_LABEL_CHARACTERS}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Aggregator to client: you are in; this is the run."""

    protocol_version: int
    run_id: str
    method: str
    round: int
    version: int
    heartbeat_interval_s: float
    data: DataFormat
    resources: tuple[ResourceInfo, ...]
    least_width: float = 1.0
    """The smallest share of a block that an assignment of this run may ask for, one of ``model_shape.WIDTHS``."""
    active_blocks: tuple[int, ...] = ()
    """Ids of the plan's blocks that the model has now; empty: all of them. Those of a task take their place."""

    def __post_init__(self) -> None:
        _require_active("welcome", self.active_blocks)
        if self.least_width not in WIDTHS:
            raise ValueError(
                f"welcome: least_width is {self.least_width}, expected one of {', '.join(map(str, WIDTHS))}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Client to aggregator: send me this resource."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """Aggregator to client: the resource's bytes follow as payload."""

    name: str
    payload_bytes: int
    payload_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Client to aggregator: the run's files are here and the model is loaded; tasks may come.

    Until then the client is not planned for, so that no round waits for a model to load.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Aggregator to client: train these blocks from this state; the state update follows as payload.

    The client half of the method travels in here; the client knows no method by name.
    """

    attempt_id: AttemptId
    round: int
    state: StateUpdate
    payload_bytes: int
    payload_sha256: str
    active_blocks: tuple[int, ...] = ()
    """Ids of the plan's blocks that the model has, ascending; the others are the identity and left out. Empty: all."""
    blocks: tuple[int, ...]
    """Numbers of the units to train, ascending: ids of expanded blocks, or what the plan trains in their place
    (``profiles/units.py``), all of them active."""
    width: float = 1.0
    """Share of each block that trains, one of ``model_shape.WIDTHS``; the rest of the block is there, and frozen."""
    steps: int
    """tau: optimizer steps."""
    batch_size: int
    anchor_batch_size: int
    anchor_every: int
    anchor_weight: float
    """lambda of methods.md 5.1; 0 means no anchor batches."""
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    """On the out-tensors only."""
    clip_norm: float
    proximal_weight: float = 0.0
    """mu of FedProx (Li et al., 1812.06127): mu/2 times the squared distance from the start joins the loss."""
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    optimizer_mode: OptimizerMode
    micro_batch_size: int
    """Sequences per forward pass; divides neither loss nor gradient (methods.md L2)."""
    checkpoint_activations: bool
    delta_format: DeltaFormat
    delta_density: float
    """rho of methods.md 7.1: share of rows sent."""
    seed: int
    deadline_s: float
    """Seconds from receipt to the end of the upload."""
    memory_budget_bytes: int
    """Peak above the imports that the client must not pass; 0 means its own limit only."""
    predicted_peak_bytes: int
    predicted_seconds: float
    measure: tuple[Measure, ...]

    def __post_init__(self) -> None:
        if not self.blocks or list(self.blocks) != sorted(set(self.blocks)) or self.blocks[0] < 0:
            raise ValueError(
                f"assignment: blocks are {self.blocks}, expected ascending ids without repeats, at least one"
            )
        _require_active("assignment", self.active_blocks)
        if self.active_blocks and not set(block_units(self.blocks)) <= set(self.active_blocks):
            raise ValueError(f"assignment: blocks are {self.blocks}, expected some of the active {self.active_blocks}")
        if self.width not in WIDTHS:
            raise ValueError(f"assignment: width is {self.width}, expected one of {', '.join(map(str, WIDTHS))}")
        for name in ("steps", "batch_size", "anchor_every", "micro_batch_size", "warmup_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"assignment: {name} is {getattr(self, name)}, expected at least 1")
        for name in ("anchor_batch_size", "payload_bytes", "memory_budget_bytes", "predicted_peak_bytes", "round"):
            if getattr(self, name) < 0:
                raise ValueError(f"assignment: {name} is {getattr(self, name)}, expected 0 or more")
        for name in ("learning_rate", "deadline_s", "adam_eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"assignment: {name} is {getattr(self, name)}, expected a positive number")
        for name in ("anchor_weight", "weight_decay", "proximal_weight", "predicted_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"assignment: {name} is {getattr(self, name)}, expected 0 or more")
        if not 0 < self.delta_density <= 1:
            raise ValueError(f"assignment: delta_density is {self.delta_density}, expected a number in (0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Aggregator to client: measure this state and report; the state update follows as payload."""

    attempt_id: AttemptId
    round: int
    state: StateUpdate
    payload_bytes: int
    payload_sha256: str
    active_blocks: tuple[int, ...] = ()
    """As in an assignment."""
    measure: tuple[Measure, ...]
    deadline_s: float
    strengths: tuple[float, ...] = (1.0,)
    """The factors on the out-tensors of the blocks with which each is measured, ascending, at most 11."""

    def __post_init__(self) -> None:
        _require_active("evaluate", self.active_blocks)
        found = self.strengths
        if (
            not 0 < len(found) <= MAX_STRENGTHS
            or list(found) != sorted(set(found))
            or not 0 <= found[0] <= found[-1] <= 1
        ):
            raise ValueError(
                f"evaluate: strengths are {found}, expected 1 to {MAX_STRENGTHS} ascending numbers from 0 to 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Aggregator to client: try these blocks, one at a time, and report; nothing of it is uploaded (methods.md 4).

    Each candidate is added to the active blocks, trained alone for a few steps from the identity, in the same order of
    the same data, and measured at each strength of that block alone.
    """

    attempt_id: AttemptId
    round: int
    state: StateUpdate
    payload_bytes: int
    payload_sha256: str
    active_blocks: tuple[int, ...] = ()
    """There and frozen while a candidate is tried; empty: none."""
    candidates: tuple[int, ...]
    """Ids of blocks of the plan that are not active."""
    strengths: tuple[float, ...]
    """Ascending, from 0: the model without the candidate."""
    num_examples: int
    """Held-out examples to measure on, at most."""
    num_anchor_sequences: int
    """Held-out anchor sequences to measure on, at most."""
    steps: int
    batch_size: int
    anchor_batch_size: int
    anchor_weight: float
    """0 means no anchor batches."""
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    seed: int
    deadline_s: float
    memory_budget_bytes: int
    """As in an assignment."""

    def __post_init__(self) -> None:
        _require_active("probe", self.active_blocks)
        if not self.candidates or len({*self.candidates, *self.active_blocks}) != len(self.candidates) + len(
            self.active_blocks
        ):
            raise ValueError(
                f"probe: candidates are {self.candidates}, expected ids without repeats, at least one, none of them "
                f"active ({self.active_blocks})"
            )
        if not 1 < len(self.strengths) <= MAX_STRENGTHS or self.strengths[0] != 0 or self.strengths[-1] > 1:
            raise ValueError(f"probe: strengths are {self.strengths}, expected 0 and more up to 1, ascending")
        if list(self.strengths) != sorted(set(self.strengths)):
            raise ValueError(f"probe: strengths are {self.strengths}, expected 0 and more up to 1, ascending")
        for name in ("num_examples", "num_anchor_sequences", "steps", "batch_size", "warmup_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"probe: {name} is {getattr(self, name)}, expected at least 1")
        for name in ("learning_rate", "deadline_s", "adam_eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"probe: {name} is {getattr(self, name)}, expected a positive number")
        _require_not_negative(self, "anchor_batch_size", "anchor_weight", "weight_decay", "memory_budget_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRow:
    """What a tried block gave at one strength: sums. A row that is not finite is not sent."""

    block: int
    strength: float
    nll_sum: float
    """nats over ``num_tokens`` target tokens of held-out examples."""
    num_tokens: int
    kl_sum: float
    """KL to the base over ``num_anchor_tokens`` held-out anchor tokens, nats."""
    num_anchor_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """What the payload holds of one tensor: all its rows, or those named by its row bitmap."""

    block: int
    name: str
    rows_sent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What happened while training (methods.md 5.5)."""

    num_target_tokens: int
    loss_first: float
    """Mean cross-entropy of the first quarter of the steps, nats per target token."""
    loss_last: float
    anchor_kl: float
    """Mean KL_K over the last quarter of the steps; 0 without an anchor."""
    prefix_s: float
    train_s: float
    measure_s: float
    encode_s: float
    step_s: float
    """Median seconds of one step."""
    peak_memory_bytes: int
    """Measured peak above the imports."""
    predicted_peak_bytes: int
    mode: ExecutionMode
    """How the client carried it out (runtime.md 4.2): its own choice within the assignment's memory."""
    gradient_energy: tuple[float, ...]
    """u_raw per trained block, in the order of the assignment's ``blocks``."""
    kernel_falls: tuple[str, ...] = ()
    """Where a faster kernel was passed over on a GPU, and why: at most eight lines of at most 200 characters."""

    def __post_init__(self) -> None:
        if len(self.kernel_falls) > MAX_KERNEL_FALLS or any(len(t) > MAX_FALL_CHARACTERS for t in self.kernel_falls):
            raise ValueError(
                f"train report: {len(self.kernel_falls)} kernel falls of up to "
                f"{max(map(len, self.kernel_falls))} characters, expected at most {MAX_KERNEL_FALLS} of "
                f"{MAX_FALL_CHARACTERS}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """Client to aggregator: my update; the encoded tensors follow as payload."""

    attempt_id: AttemptId
    round: int
    version: int
    num_examples: int = field(metadata={"refusal": "bad_weight"})
    """Examples of the site, as declared in Hello (the weight n_k)."""
    steps: int = field(metadata={"refusal": "bad_steps"})
    format: DeltaFormat
    density: float
    width: float = 1.0
    """That of the assignment: rows and columns of the tensors are those of the slim block."""
    tensors: tuple[TensorHeader, ...]
    payload_bytes: int
    payload_sha256: str
    train: TrainReport
    measurements: tuple[Measurement, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Client to aggregator: the answer to Evaluate or Probe, or a typed failure of a task; nothing is uploaded."""

    attempt_id: AttemptId
    round: int
    measurements: tuple[Measurement, ...] = ()
    probed: tuple[ProbeRow, ...] = ()
    """The answer to Probe."""
    failure: FailureReason | None = None
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """Aggregator to client: this update is durable and counted."""

    attempt_id: AttemptId
    payload_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Client to aggregator, from a thread that training cannot block."""

    attempt_id: AttemptId | None
    phase: str
    steps_done: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatReply:
    """Aggregator to client: I am here, and this is where the run stands."""

    round: int
    version: int
    waiting_for: str
    """What the run waits for, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Either side: this was not accepted, and why."""

    code: RefusalCode
    text: str
    attempt_id: AttemptId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    """Either side: I am leaving (``reason``), or the run is over (``finished``)."""

    reason: str
    finished: bool = False


Message = (
    Hello
    | Welcome
    | Fetch
    | Resource
    | Ready
    | Assignment
    | Evaluate
    | Probe
    | Delta
    | Report
    | Ack
    | Heartbeat
    | HeartbeatReply
    | Refused
    | Goodbye
)

#: Wire name of each message type. The order is of no importance; the names are part of the protocol.
KINDS: Final[dict[str, type]] = {
    "hello": Hello,
    "welcome": Welcome,
    "fetch": Fetch,
    "resource": Resource,
    "ready": Ready,
    "assignment": Assignment,
    "evaluate": Evaluate,
    "probe": Probe,
    "delta": Delta,
    "report": Report,
    "ack": Ack,
    "heartbeat": Heartbeat,
    "heartbeat_reply": HeartbeatReply,
    "refused": Refused,
    "goodbye": Goodbye,
}

KIND_OF: Final[dict[type, str]] = {cls: kind for kind, cls in KINDS.items()}
