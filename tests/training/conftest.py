"""A run small enough to train in a blink, shared by all tests so that its step is compiled once."""

import asyncio
import dataclasses
import random
import socket
import struct
import threading
import urllib.parse

import jax
import numpy as np
import pytest

from jaxmoe.config import (
    DataConfig,
    EvaluationConfig,
    KnowledgeSource,
    ModelConfig,
    MoEConfig,
    ReasoningSource,
    RunConfig,
    TrainConfig,
)
from jaxmoe.data import Mixture

TINY = RunConfig(
    name="tiny",
    seed=3,
    model=ModelConfig(
        vocab_size=288, width=16, num_layers=2, num_heads=2, max_sequence_length=16, init_std=0.1,
        moe=MoEConfig(num_experts=4, experts_per_token=2, expert_hidden=16),
    ),
    data=DataConfig(
        tokenizer="symbols",
        sources={
            "knowledge": KnowledgeSource(entities=40, test_entities=8),
            "reasoning": ReasoningSource(problems=40, test_problems=8),
        },
    ),
    train=TrainConfig(
        steps=24, batch_size=8, sequence_length=16, learning_rate=1e-2, warmup_steps=4, log_every=2,
        checkpoint_every=6, max_nonfinite_steps=3,
    ),
    evaluation=EvaluationConfig(points=3),
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_run() -> RunConfig:
    """2 MoE layers of width 16, two sources, 24 steps; checkpoints after 6, 12, ..., evaluations after 8, 16, 24."""
    return TINY


@pytest.fixture(scope="session")
def tiny_batches(tiny_run) -> list[dict[str, np.ndarray]]:
    """Its first batches."""
    train = tiny_run.train
    mixture = Mixture(
        tiny_run.data, batch_size=train.batch_size, sequence_length=train.sequence_length, steps=train.steps, seed=0
    )
    return [mixture.batch(step) for step in range(8)]


@pytest.fixture(scope="session")
def copied():
    """Copies a tree to NumPy arrays of their own; random keys become their numbers."""

    def copy(tree):
        def leaf(x):
            return np.array(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

        return jax.tree.map(leaf, tree)

    return copy


@pytest.fixture(scope="session")
def replace_train():
    """A run with other values in its `train` section."""

    def replace(run: RunConfig, **changes) -> RunConfig:
        return dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))

    return replace


class FaultyStorage:
    """A proxy on loopback in front of a storage server, one request a connection, whose faults can be changed.

    Attributes:
      faults: what happens to requests, in turn: `503`, `reset` (the connection breaks), `delay` (it waits, then is
        passed on).
      rate: share of the requests that meet one.
      delay: seconds.
      requests: their first lines, in order, with whether each was passed on.
      body_bytes: bytes of the answers to passed requests, by the path that was asked for.
    """

    def __init__(self, url: str):
        server = urllib.parse.urlsplit(url)
        self._server = server.hostname, server.port
        self.faults, self.rate, self.delay = ["503"], 0.0, 1.0
        self.requests: list[tuple[str, bool]] = []
        self.body_bytes: dict[str, int] = {}
        self._random = random.Random(0)
        self._loop = asyncio.new_event_loop()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._listening.wait()

    def _run(self):
        asyncio.set_event_loop(self._loop)
        listener = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**26))
        self.url = "http://{}:{}".format(*listener.sockets[0].getsockname())
        self._listening.set()
        self._loop.run_forever()
        listener.close()

    def stop(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _serve(self, reader, writer):
        try:
            await self._request(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _request(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        if headers.get("expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        while headers.get("transfer-encoding") == "chunked":
            size = await reader.readuntil(b"\r\n")
            body += size + await reader.readexactly(int(size, 16) + 2)
            if int(size, 16) == 0:
                break
        fault = None
        if self._random.random() < self.rate:
            fault, *rest = self.faults
            self.faults = [*rest, fault]
        self.requests.append((first, fault in (None, "delay")))
        if fault == "503":
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
            return
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            return
        if fault == "delay":
            await asyncio.sleep(self.delay)
        kept = [line for line in lines if line and not line.lower().startswith(("connection:", "expect:"))]
        answers, asks = await asyncio.open_connection(*self._server)
        try:
            asks.write("\r\n".join([first, *kept, "Connection: close", "", ""]).encode() + body)
            answer = await answers.read()
        finally:
            asks.close()
        path = urllib.parse.unquote(urllib.parse.urlsplit(first.split(" ")[1]).path)
        self.body_bytes[path] = self.body_bytes.get(path, 0) + len(answer.partition(b"\r\n\r\n")[2])
        writer.write(answer)
        await writer.drain()


@pytest.fixture
def faulty_storage(storage_server, bucket):
    """A `FaultyStorage` in front of the server of `storage_server`, on which there is gs://bucket."""
    proxy = FaultyStorage(storage_server["STORAGE_EMULATOR_HOST"])
    yield proxy
    proxy.stop()
