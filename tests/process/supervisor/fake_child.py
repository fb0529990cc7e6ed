"""A child of the supervisor that does as it is told: `fake_child.py WORD…`, each word one behaviour.

(none)               start, announce an instance if it is a worker, be ready, obey Drain, Stop and Set
serve                answer HTTP on the inherited listener (`no-model`: with a 400)
log:TEXT             write a line first
fail:KIND            say Failed (`permanent` or `passing`) and exit
fail-in:NAME         say Failed and exit, if that is its name
exit:N               exit with N before being ready
exit-once:N          the same, but only in the first life
exit-when-ready:N    be ready, then exit
silent               never be ready
steps:N:SECONDS      N steps of progress, so far apart, before being ready
until:NAME           wait before being ready until there is a file of that name in the run dir
running:N            report that N requests run
blocks:N             report that N blocks lie in the host tier of KV
offers:N             report that N blocks were given to it
busy                 have three requests in flight that no drain sees the end of
no-legs              refuse another role
dies-of:ROLE         exit when it is to serve as that
stubborn             ignore TERM, Drain and Stop
daemon               leave a double-forked grandchild in a session of its own that ignores TERM
bare-daemon          the same, with an empty environment
flood                write without end
garbage              break the status protocol
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec

from dynamo_box.discovery.instances import Instance, announce, process_start_time, withdraw
from dynamo_box.protocol import status
from dynamo_box.protocol.figures import KvStoreFigures, TierFigures, WorkerFigures, WorkerTiers
from dynamo_box.protocol.framing import BlockingChannel, status_socket_from_environment
from dynamo_box.protocol.spec import ChildSpec, WorkerSpec

RUN_DIR = Path(os.environ["DYNBOX_RUN_DIR"])
NAME = os.environ["DYNBOX_PROCESS"]


def main(words: list[str]) -> int:
    sock = status_socket_from_environment()
    channel = BlockingChannel(sock, status.parent_decoder)
    start = channel.receive()
    assert isinstance(start, status.Start)
    for word in words:
        name, _, rest = word.partition(":")
        if (code := before_ready(name, rest, channel, sock)) is not None:
            return code
    if isinstance(start.spec, WorkerSpec):
        announce(RUN_DIR / "instances", instance(start.spec))
    channel.send(status.Ready({"version": "fake", "cores": ",".join(map(str, sorted(os.sched_getaffinity(0))))}))
    for word in words:
        if word.startswith("running:"):
            channel.send(status.Report(WorkerFigures(running=int(word.partition(":")[2]))))
        if word.startswith("blocks:"):
            host = TierFigures("on", blocks=int(word.partition(":")[2]))
            channel.send(status.Report(KvStoreFigures(host, TierFigures("off"))))
        if word.startswith("offers:"):
            offered = WorkerTiers(connected="", offloaded=int(word.partition(":")[2]))
            channel.send(status.Report(WorkerFigures(tiers=offered)))
        if word.startswith("exit-when-ready:"):
            return int(word.partition(":")[2])
    return obey(channel, words, start.spec)


def before_ready(
    name: str, rest: str, channel: BlockingChannel[status.ParentMessage], sock: socket.socket
) -> int | None:
    match name:
        case "log":
            print(rest, flush=True)
        case "fail":
            channel.send(status.Failed("it was told to fail", "tell it otherwise", rest == "permanent"))
            return 1
        case "fail-in" if rest == NAME:
            channel.send(status.Failed("it was told to fail", permanent=True))
            return 1
        case "exit":
            return int(rest)
        case "exit-once":
            marker = RUN_DIR / f"{NAME}.lived"
            if not marker.exists():
                marker.touch()
                return int(rest)
        case "silent":
            signal.pause()
        case "steps":
            count, _, pause = rest.partition(":")
            for step in range(int(count)):
                channel.send(status.Starting("weights", step, int(count), "bytes"))
                time.sleep(float(pause))
        case "until":
            while not (RUN_DIR / rest).exists():
                time.sleep(0.01)
        case "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case "daemon" | "bare-daemon":
            start_daemon(bare=name == "bare-daemon")
        case "flood":
            threading.Thread(target=flood, daemon=True).start()
        case "garbage":
            sock.sendall(b"\xff" * 64)
            signal.pause()
        case "serve" | "no-model":
            threading.Thread(target=serve, args=(name == "serve",), daemon=True).start()
    return None


def obey(channel: BlockingChannel[status.ParentMessage], words: list[str], spec: ChildSpec) -> int:
    stubborn, in_flight = "stubborn" in words, 3 if "busy" in words else 0
    while True:
        match channel.receive():
            case status.Set(id=number, key=key, value=value):
                known = key in ("mode", "clear")
                if known:
                    with (RUN_DIR / f"{NAME}.settings").open("a") as file:
                        file.write(f"{key} {value}\n")
                channel.send(status.Answer(number, "" if known else f"no setting {key}", value))
            case status.Tiers() as told:
                with (RUN_DIR / f"{NAME}.told").open("ab") as file:
                    file.write(msgspec.json.encode(told) + b"\n")
            case status.SetRole(id=number, role=role):
                assert isinstance(spec, WorkerSpec)
                if f"dies-of:{role}" in words:
                    return 1
                if "busy" in words:
                    channel.send(status.Draining(in_flight))
                    continue
                if "no-legs" not in words:
                    announce(RUN_DIR / "instances", instance(msgspec.structs.replace(spec, role=role)))
                channel.send(status.Answer(number, "its engine has no legs" if "no-legs" in words else ""))
            case status.Sleep(id=number):
                withdraw(RUN_DIR / "instances", NAME)
                channel.send(status.Slept(number))
            case status.CancelRequest(id=number, request_id=request_id):
                channel.send(status.Answer(number, text=f"cancelled {request_id}"))
            case status.Drain():
                with (RUN_DIR / "drained").open("a") as file:
                    file.write(f"{NAME}\n")
                if not stubborn:
                    withdraw(RUN_DIR / "instances", NAME)
                    channel.send(status.Draining(in_flight))
                    if not in_flight:
                        return 0
            case status.Stop() if not stubborn:
                return 0
            case None:
                if stubborn:
                    signal.pause()
                return 0


def instance(spec: WorkerSpec) -> Instance:
    start_time = process_start_time(os.getpid()) or 0
    socket_path = str(RUN_DIR / f"{NAME}.sock")
    return Instance(
        NAME, spec.model.name, spec.role, spec.engine, socket_path, os.getpid(), start_time, "f", 16, 8, "f32", 64
    )


def start_daemon(*, bare: bool) -> None:
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork(): os._exit(0)\n"
        "os.setsid()\n"
        "if os.fork(): os._exit(0)\n"
        "os.write(1, str(os.getpid()).encode()); os.close(1)\n"
        "signal.pause()\n"
    )
    environment = {} if bare else dict(os.environ)
    output = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE, env=environment, check=True
    )
    (RUN_DIR / f"{NAME}.daemon").write_bytes(output.stdout)


def flood() -> None:
    line = b"x" * 1000 + b"\n"
    while True:
        os.write(1, line * 100)


def serve(has_model: bool) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            answer = {"choices": [{"text": "!"}]} if has_model else {"error": {"message": "no such thing"}}
            body = json.dumps(answer).encode()
            self.send_response(200 if has_model else 400)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_request(self, *_: object) -> None:
            print(
                json.dumps({"ts": "2026-01-01T00:00:00Z", "level": "info", "process": NAME, "event": "request"}),
                flush=True,
            )

    server = http.server.ThreadingHTTPServer(("", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=int(os.environ["DYNBOX_LISTEN_FD"]))
    server.socket.setblocking(True)
    server.server_name, server.server_port = "fake", 0
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
