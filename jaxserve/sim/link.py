"""How pages are copied between device and host memory, for the simulator. Knows no scheduler and no clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """Copies of up to `pages` pages each, or each page in `pieces` copies; `issue_s` of the link's time before the
    first byte of each. `overlaps`: steps go on meanwhile; otherwise the next step waits until all is copied."""

    pages: int
    overlaps: bool
    pieces: int = 1
    issue_s: float = 2e-5

    def copies(self, pages: int) -> int:
        return -(-pages // self.pages) * self.pieces

    def seconds(self, pages: int, page_bytes: int, bytes_s: float) -> float:
        return self.copies(pages) * self.issue_s + pages * page_bytes / bytes_s


LINKS = {
    "gathered": Link(pages=16, overlaps=True),
    "per-page": Link(pages=1, overlaps=False),
    "per-block": Link(pages=1, overlaps=False, pieces=320, issue_s=8e-6),
}
"""By name: what the engine does (engine/mover.py); one call per page that the loop waits for; and one for each block of
16 tokens of one layer's keys or values, as FastSwitch (arXiv:2411.18424) found it in vLLM: OPT-13B has 40 layers."""
