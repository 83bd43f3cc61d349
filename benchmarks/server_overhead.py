"""CPU time that the API process spends on a streamed token, measured on a live server with a real engine.

    python benchmarks/server_overhead.py --streams 64 --tokens 200

The server is started here, its API process's CPU time is read from /proc before and after, and the clients run in this
process over plain sockets, so that their cost is not counted. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROUTES = {
    "completions": ("/v1/completions", {"prompt": "Once upon a time"}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Tell me a story."}]}),
}


def cpu_seconds(pid: int) -> float:
    """User and system time of a process's threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def stream(host: str, port: int, path: str, body: dict) -> tuple[int, int]:
    """(tokens, events) of one streamed answer."""
    reader, writer = await asyncio.open_connection(host, port)
    data = json.dumps(body).encode()
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    received = await reader.read(-1)
    writer.close()
    if b" 200 OK" not in received[:20]:
        raise RuntimeError(received[:500].decode())
    usage = re.search(rb'"completion_tokens":(\d+)', received)
    return int(usage[1]) if usage else 0, received.count(b"data: ") - 1


async def crowd(host: str, port: int, path: str, body: dict, streams: int) -> tuple[int, int]:
    counts = await asyncio.gather(*(stream(host, port, path, body) for _ in range(streams)))
    return sum(tokens for tokens, _ in counts), sum(events for _, events in counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pid", type=int, help="API process of a running server, instead of starting one.")
    parser.add_argument("--port", type=int, help="Its port.")
    args, options = parser.parse_known_args()
    server = None
    if args.pid is None:
        command = [
            sys.executable,
            "-m",
            "jaxserve",
            "serve",
            "--port",
            "0",
            "--max-num-seqs",
            str(args.streams),
            *options,
        ]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        address = next(found for line in server.stdout if (found := re.search(r"http://([\d.]+):(\d+)", line)))
        host, port, pid = address[1], int(address[2]), server.pid
    else:
        host, port, pid = "127.0.0.1", args.port, args.pid
    try:
        for name, (path, prompt) in ROUTES.items():
            body = {
                **prompt,
                "max_tokens": args.tokens,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            asyncio.run(crowd(host, port, path, {**body, "max_tokens": 5}, args.streams))
            for _ in range(args.rounds):
                cpu, started = cpu_seconds(pid), time.perf_counter()
                tokens, events = asyncio.run(crowd(host, port, path, body, args.streams))
                cpu, elapsed = cpu_seconds(pid) - cpu, time.perf_counter() - started
                print(
                    f"{name}: {args.streams} streams, {tokens} tokens in {events} events, {tokens / elapsed:.0f} "
                    f"tokens/s; API process {cpu / tokens * 1e6:.1f} us per token, {cpu / elapsed:.0%} of a core",
                    flush=True,
                )
    finally:
        if server is not None:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
