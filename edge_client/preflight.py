"""Can this device take part in this run? One question after the other, each answered yes or no with what to do.

Nothing is trained. What leaves the machine is what ``join`` says first (``join --dry-run`` shows it), a few heartbeats
and a request for one of the run's files, by which the line is timed. A question that cannot be asked, because an
earlier one failed, says so.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from fedblocks.edge_client.client import JoinOptions, device_profile, greeting, is_running, open_sent, sent_line
from fedblocks.edge_client.data import DataError, SiteData, TextEncoder, load_site_data
from fedblocks.edge_client.identity import KEY_FILE, load_or_create_identity
from fedblocks.edge_client.link import read_record, write_record
from fedblocks.edge_client.store import ClientStore
from fedblocks.edge_client.transport import Connected, Disconnected, Problem, Received, Transport
from fedblocks.profiles.cost import (
    MEMORY_SAFETY,
    NF4_BYTES_PER_WEIGHT,
    NoFit,
    Workload,
    choose_mode,
)
from fedblocks.profiles.device import DeviceProfile
from fedblocks.profiles.link import ENOUGH_BYTES, LinkRecord
from fedblocks.profiles.model_shape import WIDTHS
from fedblocks.protocol.expansion import ExpansionError, plan_expansion
from fedblocks.protocol.keys import KeyFileError, KeyPair
from fedblocks.protocol.messages import (
    Fetch,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Message,
    Refused,
    Resource,
    Welcome,
)
from fedblocks.protocol.site_file import SiteFile

if TYPE_CHECKING:
    from fedblocks.edge_client.checkpoint import Checkpoint

Answer = Literal["yes", "no", "unknown"]

CONNECT_TIMEOUT_S: Final = 5.0
HANDSHAKE_TIMEOUT_S: Final = 10.0
#: For greeting, heartbeats and one file of the run, together.
LINE_TIMEOUT_S: Final = 20.0
ROUND_TRIPS: Final = 5
BLOCKS: Final = 3
"""Expanded blocks of the plan that is looked at: the default placement, grown once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question."""

    name: str
    answer: Answer
    text: str
    """What was found, in numbers."""
    remedy: str = ""
    """What to do about a no."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """All of them, in the order in which they were asked."""

    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        """0 if every answer is yes; 5 if the device is too small; 3 or 4 for the connection; 6 for the data; else 2."""
        codes = {"reach": 3, "authenticate": 4, "line": 4, "data": 6, "fit": 5, "disk": 5}
        failed = [codes.get(check.name.split()[0], 2) for check in self.checks if check.answer == "no"]
        return failed[0] if failed else 0

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ready": self.exit_code == 0}

    def text(self) -> str:
        """For a terminal: a line each, and under a no what to do."""
        lines: list[str] = []
        for check in self.checks:
            lines.append(f"{check.answer:<8} {check.name:<14} {check.text}")
            if check.remedy:
                lines.append(f"{'':<23} -> {check.remedy}")
        lines.append("ready to join" if self.exit_code == 0 else "not ready")
        return "\n".join(lines)


def preflight(options: JoinOptions, *, say: Callable[[str], None]) -> Preflight:
    """Asks everything; takes as long as the probe (20 s where this device was not measured in the last day).

    Args:
        options: those of ``join``.
        say: for what happens meanwhile.
    """
    found: list[Check] = []
    data = _asked(found, _data(options))
    checkpoint = _asked(found, _model(options))
    profile = device_profile(options, say)
    found += _four_bit(profile)
    found += _fits(options, profile, checkpoint, data)
    found += _disk(options, checkpoint, data)
    reached = _asked(found, _reach(options.site, options.socks_proxy))
    same_base = any(check.name == "base model" and check.answer == "yes" for check in found)
    hello = partial(greeting, options, data, profile) if data is not None and same_base else None
    found += _authenticate(options, hello, reached=bool(reached))
    return Preflight(checks=tuple(found))


def _asked(found: list[Check], answer: tuple[Check, Any]) -> Any:
    found.append(answer[0])
    return answer[1]


def _data(options: JoinOptions) -> tuple[Check, SiteData | None]:
    try:
        encoder = TextEncoder(options.model, options.site.data)
        data = load_site_data(options.data, encoder)
    except (DataError, ExpansionError, OSError, ValueError) as error:
        remedy = "mend the file or the path; see the forms of rows in README.md"
        return Check(name="data", answer="no", text=str(error), remedy=remedy), None
    return Check(name="data", answer="yes", text=data.summary.line()), data


def _model(options: JoinOptions) -> tuple[Check, Checkpoint | None]:
    from fedblocks.edge_client.checkpoint import Checkpoint, CheckpointError, base_hash

    try:
        checkpoint = Checkpoint.open(options.model)
        found = base_hash(options.model, options.home)
    except (CheckpointError, ExpansionError, OSError) as error:
        remedy = "give --model the folder of the base that the operator names"
        return Check(name="base model", answer="no", text=str(error), remedy=remedy), None
    shape = checkpoint.shape
    text = f"{shape.family}, {shape.num_layers} layers, {shape.total_parameters / 1e6:.1f} M parameters"
    if found != options.site.base_hash:
        text = (
            f"{options.model} has hash {found[:16]}…, the run's {options.site.base_name} {options.site.base_hash[:16]}…"
        )
        remedy = "get the same checkpoint as the operator: same tensors, same tokenizer.json"
        return Check(name="base model", answer="no", text=text, remedy=remedy), checkpoint
    return Check(name="base model", answer="yes", text=f"{text}; the run's"), checkpoint


def _four_bit(profile: DeviceProfile) -> list[Check]:
    """Quantises and decodes a matrix where this device trains, and multiplies by it."""
    import torch

    from fedblocks.kernels.ops import DISPATCHER, frozen_nf4_linear, nf4_dequant, quantize_nf4

    device = torch.device("cuda" if profile.accelerator == "cuda" else "cpu")
    dtype = torch.float32 if profile.compute_dtype == "float32" else torch.bfloat16
    began = time.monotonic()
    try:
        dense = torch.randn(192, 128, generator=torch.Generator().manual_seed(0))
        weight = quantize_nf4(dense)
        exact = nf4_dequant(weight, torch.float32)
        on_device = weight.to(device)
        decoded = nf4_dequant(on_device, dtype).float().cpu()
        x = torch.eye(128, device=device, dtype=dtype)
        product = frozen_nf4_linear(x, (on_device,)).float().cpu().T
    except RuntimeError as error:
        remedy = 'see `fedblocks kernels`; [kernels] backend = "torch" in the site file does without own kernels'
        return [Check(name="4-bit kernel", answer="no", text=str(error)[:300], remedy=remedy)]
    error = max((found - exact).abs().max().item() for found in (decoded, product))
    who, why = DISPATCHER.explain("nf4_dequant", "uint8", "small", device)
    text = f"decoded on {device.type} by {who} ({why}) in {dtype}, {1e3 * (time.monotonic() - began):.0f} ms"
    if error > 0.02 * exact.abs().max().item():
        remedy = "do not train with this; report it with the output of `fedblocks kernels --json`"
        return [Check(name="4-bit kernel", answer="no", text=f"{text}: wrong by {error:.3g}", remedy=remedy)]
    return [Check(name="4-bit kernel", answer="yes", text=text)]


def _fits(
    options: JoinOptions, profile: DeviceProfile, checkpoint: Checkpoint | None, data: SiteData | None
) -> Iterator[Check]:
    """The top block, then more of them, at one sequence at a time: what the aggregator may assign at least."""
    if checkpoint is None or data is None or not data.train:
        yield Check(name="fit", answer="unknown", text="needs the base model and the data")
        return
    blocks = min(BLOCKS, checkpoint.shape.num_layers)
    try:
        plan = plan_expansion(
            base_hash=options.site.base_hash, config=checkpoint.config, placement="thirds", num_blocks=blocks
        )
    except ExpansionError as error:
        yield Check(name="fit", answer="no", text=str(error), remedy="this base cannot be expanded; ask the operator")
        return
    layout = plan.layout
    by_height = sorted(layout.positions, key=lambda block: -layout.positions[block])
    limit = options.runtime.memory_bytes
    usable = MEMORY_SAFETY * max(0, profile.memory_usable_bytes - profile.runtime_memory_bytes)
    budget = limit or int(usable)
    statistics = data.statistics()
    work = Workload(
        batch_size=1,
        micro_batch_size=1,
        mean_tokens=statistics.mean_tokens,
        max_tokens=statistics.max_tokens,
        label_share=statistics.num_target_tokens / (statistics.num_examples * statistics.mean_tokens),
        steps=1,
        anchor_batch_size=1,
        anchor_tokens=256,
        anchor_every=1,
        dtype_bytes=4 if profile.compute_dtype == "float32" else 2,
    )
    for count in range(1, blocks + 1):
        chosen = choose_mode(profile, plan.shape, layout, by_height[:count], work, budget_bytes=budget)
        what = "the top block" if count == 1 else f"the top {count} blocks"
        name = f"fit {count} block{'s' if count > 1 else ''}"
        if isinstance(chosen, NoFit):
            least = choose_mode(profile, plan.shape, layout, by_height[:1], work, budget_bytes=budget, width=WIDTHS[0])
            if count == 1 and not isinstance(least, NoFit):
                part, peak = f"1/{round(1 / WIDTHS[0])} of it", least.memory.peak / 2**20
                enough = f"{part} takes {peak:.0f} MiB: enough for a run with slim blocks (allocation.slim)"
                yield Check(name=name, answer="unknown", text=f"{what}: {chosen.text}; {enough}")
                return
            # One block is all that a run asks of a device; that more do not fit is no obstacle.
            answer: Answer = "no" if count == 1 else "unknown"
            remedy = "free memory, raise runtime.memory_gb, or shorten the texts (max_tokens)" if count == 1 else ""
            yield Check(name=name, answer=answer, text=f"{what}: {chosen.text}", remedy=remedy)
            return
        peak = chosen.memory.peak / 2**20
        text = f"{what}: {peak:.0f} MiB of {budget / 2**20:.0f} MiB, {chosen.mode.text()}"
        yield Check(name=name, answer="yes", text=text)


def _disk(options: JoinOptions, checkpoint: Checkpoint | None, data: SiteData | None) -> Iterator[Check]:
    """The 4-bit layers, the hidden states of all rows, and the state of the blocks with its residual."""
    if checkpoint is None or data is None:
        yield Check(name="disk", answer="unknown", text="needs the base model and the data")
        return
    home = options.home
    while not home.exists():
        home = home.parent
    shape = checkpoint.shape
    tokens = sum(len(sample.ids) for sample in (*data.train, *data.validation))
    backbone = NF4_BYTES_PER_WEIGHT * shape.num_layers * shape.linear_parameters
    prefix = 4 * shape.hidden_size * tokens
    state = 3 * 4 * BLOCKS * shape.block_parameters
    free = shutil.disk_usage(home).free
    must, wanted = backbone + state, backbone + state + prefix
    text = (
        f"{free / 1e9:.1f} GB free in {home}; 4-bit layers {backbone / 1e9:.2f}, block state {state / 1e9:.2f}, "
        f"hidden states up to {prefix / 1e9:.2f} GB"
    )
    if free < must:
        yield Check(name="disk", answer="no", text=text, remedy=f"free {(must - free) / 1e9:.1f} GB, or another --home")
    elif free < wanted:
        yield Check(name="disk", answer="yes", text=f"{text}: part of the hidden states will be computed again")
    else:
        yield Check(name="disk", answer="yes", text=text)


def _reach(site: SiteFile, socks_proxy: str | None) -> tuple[Check, bool]:
    target = socks_proxy or site.address.removeprefix("tcp://")
    host, _, port = target.rpartition(":")
    what = f"the SOCKS proxy {target}" if socks_proxy else site.address
    began = time.monotonic()
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S):
            took_s = time.monotonic() - began
    except (OSError, ValueError) as error:
        remedy = "is `fedblocks serve` running, is the name right, does a firewall let this port through?"
        return Check(name="reach", answer="no", text=f"{what}: {error}", remedy=remedy), False
    return Check(name="reach", answer="yes", text=f"{what} answers in {1e3 * took_s:.0f} ms"), True


def _authenticate(options: JoinOptions, hello: Callable[[], Hello] | None, *, reached: bool) -> list[Check]:
    """Whether our key is let in; and where it is, what the line is like."""
    if not reached:
        return [Check(name="authenticate", answer="unknown", text="the aggregator cannot be reached"), _unknown_line()]
    if not (options.home / KEY_FILE).exists():  # made here, it would not be new to the join that comes after
        text = "no key yet: the first join makes one, prints the line for the operator and waits"
        return [Check(name="authenticate", answer="unknown", text=text), _unknown_line()]
    try:
        identity = load_or_create_identity(options.home)
        with contextlib.ExitStack() as stack:
            return _connected(options, identity, hello, stack)
    except (KeyFileError, ValueError) as error:
        remedy = "restore the key file from a backup, or take another --home and have the new key enrolled"
        return [Check(name="authenticate", answer="no", text=str(error), remedy=remedy), _unknown_line()]


def _connected(
    options: JoinOptions, identity: KeyPair, hello: Callable[[], Hello] | None, stack: contextlib.ExitStack
) -> list[Check]:
    site = options.site
    store = ClientStore(options.home / site.run_id)
    sent = stack.enter_context(open_sent(store.folder))
    transport = Transport(
        site.address,
        server_key=site.server_key,
        key_pair=identity,
        connect_timeout_s=HANDSHAKE_TIMEOUT_S,
        socks_proxy=options.socks_proxy,
        on_sent=lambda kind, num_bytes, what: sent.write(sent_line(kind, num_bytes, what)),
    )
    stack.callback(transport.close)
    text = "no answer to the handshake"
    until_s = time.monotonic() + HANDSHAKE_TIMEOUT_S
    while time.monotonic() < until_s:
        event = transport.get(0.2)
        if isinstance(event, Connected):
            yes = f"enrolled: the aggregator knows {identity.public}"
            return [Check(name="authenticate", answer="yes", text=yes), _line(options, transport, store, hello)]
        if isinstance(event, (Problem, Disconnected)):
            text = event.text
        if isinstance(event, Problem) and event.fatal:
            break
    remedy = f"send the operator: fedblocks keys enrol RUN {site.client_name} --key='{identity.public}'"
    return [Check(name="authenticate", answer="no", text=text, remedy=remedy), _unknown_line()]


def _unknown_line() -> Check:
    return Check(name="line", answer="unknown", text="needs an enrolled key and the aggregator")


class _LineError(Exception):
    """The aggregator does not answer as it should; the text says how."""


def _line(options: JoinOptions, transport: Transport, store: ClientStore, hello: Callable[[], Hello] | None) -> Check:
    """Greets, times a few round trips and the largest file of the run, and takes leave."""
    address = options.site.address
    known = read_record(options.home, address)
    if hello is None:
        return Check(name="line", answer="unknown", text=f"needs data and base model; {known.text()}")
    if is_running(store.folder):  # a greeting of ours would end its connection
        return Check(name="line", answer="unknown", text=f"a client of this site is running; {known.text()}")
    try:
        file = _traffic(transport, hello(), until_s=time.monotonic() + LINE_TIMEOUT_S)
    except _LineError as error:
        remedy = "is this site file of this run? does the operator's log say more?"
        return Check(name="line", answer="no", text=str(error), remedy=remedy)
    transport.send(Goodbye(reason="preflight: it has only looked"))
    found = transport.meter.record
    write_record(options.home, address, _merged(known, found))
    text = f"{found.text()} ({file})"
    if known.uplink_bytes_per_s is None:
        return Check(name="line", answer="yes", text=f"{text}; up: 5 Mbit/s are assumed until the first update")
    return Check(name="line", answer="yes", text=f"{text}; before: {known.text()}")


def _traffic(transport: Transport, hello: Hello, *, until_s: float) -> str:
    """Greeting, heartbeats, one file; which file.

    Raises:
        _LineError: a refusal, a lost connection, or no answer in time.
    """

    def answer_to(message: Message, kind: type[Message]) -> Message:
        transport.send(message)
        while (left_s := until_s - time.monotonic()) > 0:
            match transport.get(min(0.2, left_s)):
                case Received(message=Refused(code=code, text=text)):
                    raise _LineError(f"refused ({code}): {text}")
                case Received(message=received) if isinstance(received, kind):
                    return received
                case Problem(text=text) | Disconnected(text=text):
                    raise _LineError(text)
                case _:
                    pass
        raise _LineError(f"no answer to {type(message).__name__} within {LINE_TIMEOUT_S:.0f} s")

    welcome = answer_to(hello, Welcome)
    assert isinstance(welcome, Welcome)
    for _ in range(ROUND_TRIPS):
        answer_to(Heartbeat(attempt_id=None, phase="starting", steps_done=0), HeartbeatReply)
    largest = max(welcome.resources, key=lambda resource: resource.num_bytes, default=None)
    if largest is None or largest.num_bytes < ENOUGH_BYTES:
        size = 0 if largest is None else largest.num_bytes
        return f"down: the run's largest file has {size / 1024:.0f} KiB, {ENOUGH_BYTES // 1024} say something"
    answer_to(Fetch(name=largest.name), Resource)
    return f"by {largest.name}, {largest.num_bytes / 1e6:.2f} MB"


def _merged(known: LinkRecord, found: LinkRecord) -> LinkRecord:
    for name, figure in (("round_trip_s", found.round_trip_s), ("downlink_bytes_per_s", found.downlink_bytes_per_s)):
        if figure is not None:
            known = known.with_figure(name, figure.value)
    return known
