"""Does anything but our own error leave a decoder? ``make fuzz``: a million hostile inputs and more, for each decoder.

Every target takes one string of bytes, as a peer might send it, and lets pass the one error that it documents; any
other exception is a bug, and its input is written to ``tests/fuzz/found/``, which the test suite tries for ever after.
Where atheris is installed its coverage guides the inputs (``--atheris``); else they are mutations of ``corpus.json``,
which holds what earlier guided runs found worth keeping.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import hashlib
import json
import random
import subprocess
import sys
import time
import types
import typing
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

FOLDER = Path(__file__).parent
CORPUS, FOUND = FOLDER / "corpus.json", FOLDER / "found"
KEPT_PER_TARGET, KEPT_BYTES = 60, 2000


#: Their counters come into the decoders only where atheris guides the inputs.
GUIDED = "--atheris" in sys.argv and "--target" in sys.argv
if GUIDED:
    import atheris
with atheris.instrument_imports(include=["fedblocks"]) if GUIDED else contextlib.nullcontext():
    from fedblocks.aggregator import admission
    from fedblocks.profiles.model_shape import ModelShape
    from fedblocks.protocol import codec, errors, expansion, messages, payloads, state, tensors, transfer

LIMITS = admission.Limits(max_payload_bytes=10**6, max_num_examples=10**4, max_learning_rate=1e-3)


def shape() -> ModelShape:
    return ModelShape(
        family="llama", num_layers=2, hidden_size=8, intermediate_size=12, num_heads=2, num_kv_heads=1, head_dim=4,
        vocab_size=16, tied_embeddings=True,
    )  # fmt: skip


def assigned() -> messages.Assignment:
    """The task that an update answers, in the announcement's target."""
    task = example(messages.Assignment)
    start = dataclasses.replace(task.state, to_version=3)
    return dataclasses.replace(
        task, state=start, active_blocks=(), blocks=(0, 1), width=1.0, delta_format="int8", delta_density=0.25
    )


# One function per decoder. Each may raise what it documents, and nothing else.


def frames(data: bytes) -> None:
    """A message of two frames, the first one byte longer than the first byte says."""
    cut = 1 + (data[0] if data else 0)
    codec.decode(data[1:cut], data[cut:])


def body(data: bytes) -> None:
    """A body of the kind that the first byte names."""
    kinds = sorted(messages.KINDS)
    codec.decode_body(kinds[data[0] % len(kinds)] if data else "", data[1:])


def announcement(data: bytes) -> None:
    """The body of an update, and all that is asked before its payload may come."""
    delta = codec.decode_body("delta", data)
    issued = assigned()
    refused = admission.check_announcement(
        delta, assignment=issued, shape=shape(), limits=LIMITS, quota_bytes=10**6, declared_num_examples=10, version=3,
        accepted_sha256=None,
    )  # fmt: skip
    if refused is None:
        admission.check_payload(delta, issued, memoryview(bytes(delta.payload_bytes)), shape=shape(), limits=LIMITS)


def connection(data: bytes) -> None:
    """Multipart messages to both sides of a connection with a transfer under way, each part after its length."""
    server = transfer.Connection(receives=transfer.FROM_CLIENT, max_incoming=2, chunk_bytes=8, window=3)
    client = transfer.Connection(receives=transfer.FROM_AGGREGATOR, max_incoming=2, chunk_bytes=8, window=3)
    content = b"0123456789" * 3
    server.send(
        messages.Resource(name="x", payload_bytes=30, payload_sha256=hashlib.sha256(content).hexdigest()),
        payloads.open_source(content),
    )
    for event in client.receive(server.next_outbound().frames):
        client.accept(event.transfer, payloads.MemorySink())
    at = 0
    while at < len(data):
        parts = []
        for _ in range(1 + data[at] % 3):
            at += 1
            length = data[at] if at < len(data) else 0
            parts.append(data[at + 1 : at + 1 + length])
            at += length
        at += 1
        for side in (server, client):
            with contextlib.suppress(errors.RemoteProtocolError):
                side.receive(parts)
            with contextlib.suppress(errors.RemoteProtocolError):
                side.grant(2)
            while side.next_outbound() is not None:
                pass


def tensor(data: bytes) -> None:
    """One tensor of an update: format, density, tensor and number of rows in the first bytes."""
    head, payload = data[:4].ljust(4, b"\0"), memoryview(data[4:])
    format = ("int8", "bf16", "fp32")[head[0] % 3]
    density = (0.25, 1.0, 0.5)[head[1] % 3]
    specs = shape().block_tensors()
    spec = specs[head[2] % len(specs)]
    tensors.check_tensor(spec, head[3], payload, format=format, density=density, limit=1.0)


def state_update(data: bytes) -> None:
    """The way to a newer version: encoding and versions in the first bytes."""
    head = data[:3].ljust(3, b"\0")
    encoding = ("none", "replay", "difference", "snapshot")[head[0] % 4]
    update = messages.StateUpdate(
        encoding=encoding, from_version=head[1], to_version=head[1] + head[2], state_sha256="0" * 64
    )
    state.apply_update({}, update, data[3:], shape=shape(), blocks=(0, 1))


def plan(data: bytes) -> None:
    """plan.json, which a client fetches from its aggregator."""
    expansion.ExpansionPlan.from_json(data)


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function for function in (frames, body, announcement, connection, tensor, state_update, plan)
}


def allowed(target: str) -> type[Exception]:
    """The error that this decoder documents."""
    return expansion.ExpansionError if target == "plan" else errors.RemoteProtocolError


def attempt(target: str, data: bytes) -> None:
    """One input; whatever else it raises is a bug."""
    with contextlib.suppress(allowed(target)):
        TARGETS[target](data)


def example(cls: Any) -> Any:
    """A message of this type."""

    def value(hint: Any) -> Any:
        while hasattr(hint, "__supertype__"):
            hint = hint.__supertype__
        origin, options = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            return value(options[0])
        if origin is typing.Literal:
            return options[0]
        if origin is tuple:
            return (value(options[0]),)
        return example(hint) if dataclasses.is_dataclass(hint) else {int: 3, float: 0.5, str: "text", bool: True}[hint]

    hints = typing.get_type_hints(cls)
    own = {"candidates": (0, 1), "strengths": (0.0, 0.5)} if cls is messages.Probe else {}
    return cls(**{**{f.name: value(hints[f.name]) for f in dataclasses.fields(cls)}, **own})


def seeds(target: str) -> list[bytes]:
    """Honest inputs, and what earlier runs kept."""
    rng = np.random.default_rng(1)
    made: list[bytes] = []
    kinds = sorted(messages.KINDS)
    encoded = {kind: codec.encode(example(messages.KINDS[kind])) for kind in kinds}
    deltas = {
        b: {s.name: (rng.standard_normal(s.shape) * 1e-3).astype(np.float32) for s in shape().block_tensors()}
        for b in (0, 1)
    }
    match target:
        case "frames":
            made = [bytes([len(head)]) + head + rest for head, rest in encoded.values()]
        case "body":
            made = [bytes([i]) + encoded[kind][1] for i, kind in enumerate(kinds)]
        case "announcement":
            update = tensors.encode_delta(shape(), (0, 1), deltas, {}, format="int8", density=0.25)
            honest = example(messages.Delta)
            message = dataclasses.replace(
                honest, tensors=update.headers, format="int8", density=0.25, width=1.0,
                payload_bytes=sum(map(len, update.parts)),
                train=dataclasses.replace(honest.train, gradient_energy=(1.0, 1.0)),
            )  # fmt: skip
            assert admission.check_announcement(
                message, assignment=assigned(), shape=shape(), limits=LIMITS, quota_bytes=10**6,
                declared_num_examples=10, version=3, accepted_sha256=None,
            ) is None  # fmt: skip
            made = [encoded["delta"][1], codec.encode(message)[1]]
        case "connection":
            chunk = transfer.Chunk(transfer=1, index=0, crc32=zlib.crc32(b"01234567"))
            lists = [
                [codec.encode_header(codec.Header(kind="chunk")), codec.pack(codec.to_plain(chunk)), b"01234567"],
                [
                    codec.encode_header(codec.Header(kind="credit")),
                    codec.pack(codec.to_plain(transfer.Credit(transfer=1, chunks=2))),
                ],
                *([head, rest] for head, rest in encoded.values() if len(rest) < 256),
            ]
            one = [bytes([len(parts) - 1]) + b"".join(bytes([len(part)]) + part for part in parts) for parts in lists]
            made = [*one, b"".join(one[:2]), b"".join(one)]
        case "tensor":
            for i, format in enumerate(("int8", "bf16", "fp32")):
                for j, spec in enumerate(shape().block_tensors()):
                    found = tensors.encode_tensor(deltas[0][spec.name], None, format=format, density=0.25)
                    made.append(bytes([i, 0, j, found.rows_sent]) + found.payload)
        case "state_update":
            for format in ("int8", "bf16"):
                found = state.publish({}, deltas, {}, shape=shape(), format=format, density=0.5)
                made += [bytes([kind, 0, 1]) + found.step for kind in range(4)]
        case _:
            config = {
                "model_type": "llama", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16,
                "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_act": "silu",
                "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
            }  # fmt: skip
            found = expansion.plan_expansion(base_hash="ab" * 32, config=config, placement="thirds", num_blocks=2)
            made = [found.to_json().encode()]
    return [*made, *kept(target)]


def kept(target: str) -> list[bytes]:
    """What guided runs found worth keeping, and what once was a bug."""
    corpus = json.loads(CORPUS.read_text()) if CORPUS.exists() else {}
    bugs = [path.read_bytes() for path in sorted(FOUND.glob(f"{target}-*.bin"))]
    return [*(base64.b64decode(text) for text in corpus.get(target, [])), *bugs]


def mutations(corpus: Sequence[bytes], rng: random.Random) -> Iterator[bytes]:
    """Endless inputs: changed, cut, spliced, repeated, announcing more than there is, or random."""
    loud = [
        b"\xff",
        b"\xff" * 4,
        b"\x00" * 4,
        b"\xc6\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xcb\x7f\xf0" + bytes(6),
    ]
    while True:
        data = bytearray(rng.choice(corpus))
        for _ in range(rng.choice((1, 1, 2, 4, 8))):
            at = rng.randrange(len(data) + 1)
            match rng.randrange(7):
                case 0 if data:
                    data[at % len(data)] = rng.randrange(256)
                case 1 if data:
                    data[at % len(data)] ^= 1 << rng.randrange(8)
                case 2:
                    del data[at:]
                case 3:
                    other = rng.choice(corpus)
                    data = data[:at] + other[rng.randrange(len(other) + 1) :]
                case 4:
                    data[at:at] = rng.choice(loud)
                case 5:
                    data[at:at] = data[at : at + rng.randrange(1, 64)]
                case _:
                    data[at : at + rng.randrange(1, 16)] = rng.randbytes(rng.randrange(16))
        yield bytes(data[:4096])


def run(target: str, cases: int, *, seed: int = 1) -> dict[str, Any]:
    """So many mutated inputs; the figures. An exception of another kind is written down and raised."""
    corpus = seeds(target)
    for data in corpus:
        attempt(target, data)
    inputs = mutations(corpus, random.Random(seed))
    process = psutil.Process()
    before_bytes, began_s, slowest_s = process.memory_info().rss, time.monotonic(), 0.0
    for _ in range(cases):
        data = next(inputs)
        one_s = time.thread_time()
        try:
            attempt(target, data)
        except Exception:
            write_down(target, data)
            raise
        slowest_s = max(slowest_s, time.thread_time() - one_s)
    return {
        "target": target,
        "cases": cases,
        "seconds": time.monotonic() - began_s,
        "slowest_ms": 1000 * slowest_s,
        "rss_growth_bytes": process.memory_info().rss - before_bytes,
    }


def write_down(target: str, data: bytes) -> Path:
    """The input of a bug, for the suite."""
    FOUND.mkdir(exist_ok=True)
    path = FOUND / f"{target}-{hashlib.sha256(data).hexdigest()[:16]}.bin"
    path.write_bytes(data)
    print(f"{target}: a bug: {path}", file=sys.stderr)
    return path


def guided(target: str, cases: int, folder: Path) -> None:
    """atheris never returns, so each target is a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(target)):
        (folder / f"seed-{number:04d}").write_bytes(data)

    def one(data: bytes) -> None:
        try:
            attempt(target, data)
        except Exception:
            write_down(target, data)
            raise

    atheris.Setup([target, str(folder), f"-runs={cases}", "-max_len=4096", "-timeout=2", "-print_final_stats=1"], one)
    atheris.Fuzz()


def keep(folder: Path) -> None:
    """The smallest inputs of a guided run into corpus.json."""
    corpus = {}
    for target in TARGETS:
        found = [path.read_bytes() for path in (folder / target).glob("*") if not path.name.startswith("seed-")]
        small = sorted((data for data in found if len(data) <= KEPT_BYTES), key=lambda data: (len(data), data))
        step = max(1, len(small) // KEPT_PER_TARGET)
        corpus[target] = [base64.b64encode(data).decode() for data in small[::step][:KEPT_PER_TARGET]]
    CORPUS.write_text(json.dumps(corpus, indent=0) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000, help="over all decoders together")
    parser.add_argument("--target", choices=TARGETS, help="this one only")
    parser.add_argument("--atheris", action="store_true", help="let coverage guide the inputs")
    parser.add_argument("--folder", type=Path, default=Path("runs/fuzz"), help="corpus of the guided runs")
    parser.add_argument("--keep", action="store_true", help="then write what they found into corpus.json")
    options = parser.parse_args()
    wanted = [options.target] if options.target else list(TARGETS)
    each = -(-options.cases // len(wanted))
    if options.atheris and options.target:
        guided(options.target, each, options.folder / options.target)
    for target in wanted:
        if options.atheris:
            command = [sys.executable, __file__, "--atheris", "--target", target, "--cases", str(each)]
            subprocess.run([*command, "--folder", str(options.folder)], check=True)
        else:
            figures = run(target, each)
            print(
                f"{target}: {each} inputs in {figures['seconds']:.0f} s, the slowest {figures['slowest_ms']:.1f} ms, "
                f"{figures['rss_growth_bytes'] / 1e6:+.1f} MB"
            )
    if options.keep:
        keep(options.folder)


if __name__ == "__main__":
    main()
