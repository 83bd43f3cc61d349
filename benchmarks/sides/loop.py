"""What every library under test does: load once, then run a workload whenever it is told to. Standard library only,
because each side runs under the Python of its own environment.

A line of JSON `{"prompts": [[ids]], "max_tokens"}` on stdin asks for a run; a line `RESULT {...}` on stdout answers it.
Everything else on stdout is noise of the library.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""(prompts, max_tokens) -> the new tokens of each prompt."""


def serve(generate: Generate) -> None:
    say({"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        outputs = generate(job["prompts"], job["max_tokens"])
        seconds = time.perf_counter() - start
        say({"seconds": seconds, "lengths": [len(output) for output in outputs], "outputs": outputs})


def say(result: dict[str, Any]) -> None:
    print("RESULT", json.dumps(result), flush=True)
