"""Where a server runs: alone, or as one of several ranks behind a front door.

Knows ranks, sockets and the door's process; knows nothing of models or learning. Every rank listens on a port of its
own. The first opens the door, a child process that ends with it, and tells it where all the others are.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2

from dvi.distributed import Peers, join
from dvi.serving.server import FLUSH_S, Server
from dvi.serving.sockets import open_socket, url, url_of
from dvi.settings import Port, ServeConfig

LOOPBACK = "127.0.0.1"
MAX_PORT = 65535
POLL_S = 0.1  # between two looks at a door that is not open yet


class ServerLaunch:
    """A server among its ranks. A context manager.

    config     the settings with this rank's device.
    peers      the ranks; alone where nobody else was started.
    listener   the socket of this rank's server.
    url        where clients find it: on the first of several ranks the door.
    Raises ValueError for a port in use, for a dedicated learner, for a latency bound on several ranks, and when the
    ranks' settings differ; PeerLostError when they do not find each other.
    """

    def __init__(self, config: ServeConfig) -> None:
        if config.train.learner == "dedicated":
            raise ValueError(
                "train.learner must be 'shared' in a server, got 'dedicated': such a learner cannot yet be told to "
                "rest while a version is pinned"
            )
        self.config, serve = config, config.serve
        self.peers = join(timeout_s=config.train.peer_timeout_s)
        self._door: DoorProcess | None = None
        self._door_listener: socket.socket | None = None
        if self.peers.is_alone:
            self.listener = open_socket(serve.host, serve.port)
            self.url = url_of(self.listener)
            return
        if serve.has_bound:
            raise ValueError(
                f"a latency bound must be kept by one process, got {self.peers.num_ranks} ranks, whose servers cannot "
                "plan together yet; leave out serve.max_token_latency_ms and serve.max_first_token_ms, and take the "
                "plan of dvi tune"
            )
        self.peers.check_alike("the settings", _shared_settings(config))
        device = self.peers.device(config.model.device)
        self.config = dataclasses.replace(config, model=dataclasses.replace(config.model, device=device))
        if self.peers.is_first:
            self._door_listener = open_socket(serve.host, serve.port)
        # Behind a door on the same machine nobody else need reach a replica.
        is_one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == self.peers.num_ranks
        self.listener = open_socket(LOOPBACK if is_one_machine else serve.host, _replica_port(serve.port, self.peers))
        self.url = url_of(self._door_listener or self.listener)

    def __enter__(self) -> ServerLaunch:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        exit_code = None if self._door is None else self._door.close()
        if self._door_listener is not None:
            self._door_listener.close()
        self.listener.close()
        self.peers.leave()
        if exit_code is not None and error_type is None:
            raise ChildProcessError(f"the front door ended by itself, with exit code {exit_code}; its log says why")

    def announce(self, server: Server, on_open: Callable[[], None]) -> None:
        """Has on_open called, on the first rank only, once the server can be reached, through the door if there is one.

        To be called before the engine starts, for it waits for all ranks, and what an engine's learner tells the others
        must not come between. A door that ends by itself ends the server, and leaving this raises OSError.
        """
        if self.peers.is_alone:
            server.on_listening = on_open
            return
        urls = self.peers.exchange(_reachable_url(self.listener))
        if self.peers.is_first:
            door = self._door = DoorProcess(self._door_listener, urls, self.config)
            self._door_listener.close()  # it is the child's: were it open here, clients of a dead door would wait
            server.on_listening = lambda: door.watch(on_open=on_open, on_lost=server.begin_end)


class DoorProcess:
    """`dvi route` before these replicas, as a child of this process. However this process ends, it ends."""

    def __init__(self, listener: socket.socket, urls: list[str], config: ServeConfig) -> None:
        serve = config.serve
        listener.listen()  # clients that come before the door is there wait for it
        self._url, self._drain_s, self._is_closing = url_of(listener), serve.drain_s, False
        command = [
            sys.executable, "-m", "dvi", "route", *urls, "--host", serve.host, "--drain-s", str(serve.drain_s),
            "--socket", str(listener.fileno()),
        ]  # fmt: skip
        if serve.keys_file is not None:
            command += ["--keys-file", serve.keys_file]
        if config.train.enabled:
            command.append("--learn-together")
        # In a session of its own: a signal to this one's group must not close it before the replicas have drained.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[listener.fileno()],
            start_new_session=True,
        )  # fmt: skip

    def watch(self, *, on_open: Callable[[], None], on_lost: Callable[[], None]) -> None:
        """Has on_open called, by a thread, when the door first lets somebody in, and on_lost when it ends by itself."""

        def look() -> None:
            while self._process.poll() is None and not self._is_open():
                time.sleep(POLL_S)
            if self._process.poll() is None:
                on_open()
            self._process.wait()
            if not self._is_closing:
                on_lost()

        threading.Thread(target=look, name="door", daemon=True).start()

    def _is_open(self) -> bool:
        try:
            # No proxies of the environment. 503: no replica is up yet.
            return httpx2.get(f"{self._url}/health", trust_env=False).is_success
        except httpx2.RequestError:
            return False

    def close(self) -> int | None:
        """Lets it answer what is under way, and ends it. Its exit code when it had ended by itself."""
        exit_code, self._is_closing = self._process.poll(), True
        self._process.stdin.close()
        try:
            self._process.wait(self._drain_s + FLUSH_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        return exit_code


def _replica_port(port: Port, peers: Peers) -> Port:
    """The port of a rank's own server; all ports are free ones where the door's is."""
    own_port = port and port + 1 + peers.local_rank
    if own_port > MAX_PORT:
        raise ValueError(
            f"serve.port must leave a port above it for each process of a machine, got {port} and local rank "
            f"{peers.local_rank}; try 8000"
        )
    return own_port


def _reachable_url(listener: socket.socket) -> str:
    """The server's address for the other ranks: where it listens on all of the machine's, the one that faces them."""
    host, port = listener.getsockname()[:2]
    if host not in ("0.0.0.0", "::"):
        return url_of(listener)
    with socket.socket(listener.family, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))  # sends nothing
        own_host = probe.getsockname()[0]
    return url(own_host, port)


def _shared_settings(config: ServeConfig) -> dict[str, Any]:
    """What must be alike on all ranks: all but each machine's own."""
    settings = dataclasses.asdict(config)
    for section, key in (("model", "device"), ("model", "num_threads"), ("serve", "host"), ("output", "folder")):
        del settings[section][key]
    return json.loads(json.dumps(settings))
