"""What does the wire itself cost? A round of bare ZeroMQ, CURVE on or off: bytes to every client, and as many back.

No sessions, checksums, credit, acknowledgements or disk; who may connect is not asked. The clients of one process share
a loop, as the light clients do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import zmq

FRAME_BYTES: Final = 4 << 20


def _frames(num_bytes: int) -> list[bytes]:
    data = os.urandom(num_bytes)
    return [data[start : start + FRAME_BYTES] for start in range(0, num_bytes, FRAME_BYTES)]


def rounds(num_clients: int, num_bytes: int, count: int, *, processes: int, encrypted: bool = True) -> list[float]:
    """Seconds of each round, first frame out to last one in; the first round, in which all connect, is left out."""
    public, secret = zmq.curve_keypair()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    if encrypted:
        router.curve_server, router.curve_secretkey = True, secret
    router.set(zmq.SNDHWM, 0)
    router.set(zmq.RCVHWM, 0)
    router.set(zmq.LINGER, 1000)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    workers: list[subprocess.Popen[str]] = []
    for number in range(processes):
        worker = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTHONSAFEPATH": "1"},
            text=True,
        )
        assert worker.stdin is not None
        clients = len(range(number, num_clients, processes))
        spec = {"port": port, "key": public.decode() if encrypted else None, "clients": clients, "bytes": num_bytes}
        worker.stdin.write(json.dumps(spec) + "\n")
        worker.stdin.flush()
        workers.append(worker)
    peers: list[bytes] = []
    while len(peers) < num_clients:
        peers.append(router.recv_multipart()[0])
    frames = _frames(num_bytes)
    taken: list[float] = []
    for _ in range(count + 1):
        began = time.perf_counter()
        for peer in peers:
            for frame in frames:
                router.send_multipart([peer, frame], copy=False)
        left = num_clients * num_bytes
        while left:
            left -= len(router.recv_multipart(copy=False)[1].buffer)
        taken.append(time.perf_counter() - began)
    for peer in peers:
        router.send_multipart([peer, b""])
    for worker in workers:
        worker.wait()
    context.destroy()
    return taken[1:]


def main(sockets: Sequence[zmq.Socket[bytes]], num_bytes: int) -> None:
    """Sends as many bytes back as have come, until an empty frame comes."""
    frames, poller = _frames(num_bytes), zmq.Poller()
    got = dict.fromkeys(sockets, 0)
    for socket in sockets:
        poller.register(socket, zmq.POLLIN)
        socket.send(b"here")
    while got:
        for socket, _ in poller.poll():
            frame = socket.recv(copy=False)
            size = len(frame.buffer)
            if size == 0:
                poller.unregister(socket)
                del got[socket]
                continue
            got[socket] += size
            if got[socket] == num_bytes:
                got[socket] = 0
                for part in frames:
                    socket.send(part, copy=False)


def _connected(context: zmq.Context[zmq.Socket[bytes]], port: int, key: str | None) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    if key is not None:
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.curve_serverkey = key.encode()
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, 0)
    socket.connect(f"tcp://127.0.0.1:{port}")
    return socket


if __name__ == "__main__":
    spec = json.loads(sys.stdin.readline())
    shared: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    main([_connected(shared, spec["port"], spec["key"]) for _ in range(spec["clients"])], spec["bytes"])
    shared.destroy(linger=1000)
