"""Time to a server that answers, and the memory it holds: with an empty compile cache, then with a filled one.

    python benchmarks/startup.py [--options "--max-num-seqs 16"]

Memory is the sum of both processes' proportional set sizes (/proc/PID/smaps_rollup). Linux only. Run it where no other
process has jax loaded: that would bear its share of the libraries (some 150 MiB).
"""

from __future__ import annotations

import argparse
import math
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

MIB = 1 << 20


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(member for child in children for member in family(int(child)))]


def resident_bytes(pid: int) -> int:
    total = 0
    for member in family(pid):
        lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def pending(base: str) -> float:
    """Programs that still compile in the background; infinitely many while nobody answers."""
    try:
        text = urllib.request.urlopen(f"{base}/metrics", timeout=5).read().decode()
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return math.inf
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("jaxserve:programs_pending"))


def start(cache: str, options: list[str], limit_s: float) -> tuple[float, int, int]:
    """Seconds until /health answers, most bytes held until the last program was there, and bytes held after that."""
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jaxserve", "serve", "--port", str(port), "--compile-cache", cache, *options]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        peak, ready = 0, None
        while ready is None or pending(base):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}; run it to see why")
            if time.monotonic() - began > limit_s:
                raise SystemExit(f"{' '.join(command)} was not done after {limit_s:.0f} s")
            time.sleep(0.05)
            if ready is None and answers(f"{base}/health"):
                ready = time.monotonic() - began
            peak = max(peak, resident_bytes(process.pid))
        time.sleep(1.0)
        return ready, peak, resident_bytes(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", default="", help="more options of `jaxserve serve`, in quotes")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a start has failed")
    args = parser.parse_args()
    print("| compile cache | ready after s | most MiB | MiB when idle |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as cache:
        for name in ("empty", "filled"):
            ready, peak, idle = start(cache, args.options.split(), args.limit)
            print(f"| {name} | {ready:.1f} | {peak / MIB:.0f} | {idle / MIB:.0f} |", flush=True)


if __name__ == "__main__":
    main()
