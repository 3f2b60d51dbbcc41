"""Which runs train as one program, and which core trains them."""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ihbook.clamps import Clamp
from ihbook.engine.compiled import BLOCK, COMPILE_FROM, PLAIN_BLOCK
from ihbook.engine.prepared import Prepared, family_digest
from ihbook.files import writing

COMPILING = 40_000  # run-steps that a core trains in the time in which it compiles a program
SHARE_FROM = 6_000  # run-steps in all: a process takes some seconds to start


@dataclass(frozen=True, eq=False)
class Block:
    """A family with its places among the runs asked for, and whether and with which other clamps it is compiled."""

    family: list[Prepared]
    places: list[int]
    compile: bool
    compile_with: tuple[tuple[Clamp, ...], ...] = ()

    @property
    def run_steps(self) -> int:
        return sum(prepared.run.n_steps for prepared in self.family)

    @property
    def program_key(self) -> tuple | None:
        """Blocks of one key use one compiled program; None where nothing is compiled."""
        return (self.family[0].family_key, *self.family[0].compile_key) if self.compile else None

    def folder(self, directory: Path) -> Path:
        return directory / family_digest(self.family)

    def announce(self, directory: Path) -> None:
        """Write down, before it trains, what the family is, so that a call that goes on goes on with the same one."""
        with writing(self.folder(directory) / "family.json") as partial:
            partial.write_text(json.dumps({"runs": [prepared.digest for prepared in self.family], "compile": self.compile}))


def plan_blocks(wanted: Sequence[Prepared], directory: Path, device: str | torch.device = "cpu",
                compile: bool | None = None, asked: Sequence[Prepared] = ()) -> list[Block]:
    """Which runs train as one program: first the families that a stopped call left in `directory`, as they were; then families of
    runs that can, of like length, the longest first. They are compiled where it pays, or as `compile` says.

    On a CPU families are small, and no core is left without one. One compiled program serves all the clamps that runs with one
    `family_key` have among `asked` (default: `wanted`), but for clamps that need an extra pass. Blocks of one compiled program
    come one after the other.
    """
    kind = torch.device(device).type
    signatures: dict[tuple, dict[frozenset, tuple]] = defaultdict(dict)
    for prepared in asked or wanted:
        signatures[prepared.family_key, prepared.extra_pass_key] |= prepared.clamp_signatures
    waiting = dict(enumerate(wanted))
    stopped = list(_stopped(waiting, directory, compile))
    work: dict[tuple, int] = defaultdict(int)
    for prepared in waiting.values():
        work[prepared.family_key] += prepared.run.n_steps
    compiled = {key: n >= COMPILE_FROM[kind] if compile is None else compile for key, n in work.items()}
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, prepared in waiting.items():
        apart = (prepared.compile_key if kind == "cpu" else (prepared.extra_pass_key,)) if compiled[prepared.family_key] else ()
        groups[prepared.family_key, *apart].append(i)
    most = {key: PLAIN_BLOCK if kind == "cpu" and not compiled[key] else BLOCK[kind] for key in work}
    n_blocks = len(stopped) + sum(-(-len(members) // most[key]) for (key, *_), members in groups.items())
    planned = []
    for (key, *_), members in groups.items():
        members.sort(key=lambda i: -wanted[i].run.n_steps)
        n = -(-len(members) // most[key])
        if kind == "cpu" and work[key] >= SHARE_FROM and (n_blocks < n_cores() or not compiled[key]):
            cores = min(len(members), n_cores())  # an equal share each
            n = -(-n // cores) * cores
        even = -(-len(members) // n)
        planned += [(members[start:start + even], compiled[key]) for start in range(0, len(members), even)]
    blocks = [Block([wanted[i] for i in places], places, compile) for places, compile in [*stopped, *planned]]
    if kind != "cpu":
        return blocks
    return [replace(block, compile_with=tuple(signatures[block.family[0].family_key, block.family[0].extra_pass_key].values()))
            if block.compile else block for block in blocks]


def _stopped(waiting: dict[int, Prepared], directory: Path, compile: bool | None) -> Iterator[tuple[list[int], bool]]:
    """The places of the families that a stopped call announced in `directory`, and whether they are compiled. Their runs are taken
    out of `waiting`, where all of them must be."""
    for path in sorted(directory.glob("*/family.json")):
        try:
            book = json.loads(path.read_text())
            digests, was_compiled = list(book["runs"]), bool(book["compile"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged one: its runs are planned, and trained, anew
        places: list[int] = []
        for digest in digests:
            places += [i for i, prepared in waiting.items() if prepared.digest == digest and i not in places][:1]
        block = Block([waiting[i] for i in places], places, was_compiled)
        if places and len(places) == len(digests) and block.folder(directory) == path.parent:
            for i in places:
                del waiting[i]
            yield places, was_compiled if compile is None else compile


def n_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def n_processes(blocks: Sequence[Block], device: str | torch.device) -> int:
    """How many processes should train the blocks; 1 means that this one should."""
    share = torch.device(device).type == "cpu" and sum(block.run_steps for block in blocks) >= SHARE_FROM
    return min(len(blocks), n_cores()) if share else 1


def shares(blocks: Sequence[Block], n: int) -> list[list[int]]:
    """Indices of `blocks` in at most `n` stretches, the longest of them as short as can be. Neighbours may have a compiled program
    in common, which every stretch compiles once."""

    def stretches(limit: int) -> list[list[int]]:
        found, work, keys = [[]], 0, set()
        for i, block in enumerate(blocks):
            cost = block.run_steps + COMPILING * (block.program_key not in {None, *keys})
            if found[-1] and work + cost > limit:
                found.append([])
                work, keys, cost = 0, set(), block.run_steps + COMPILING * block.compile
            found[-1].append(i)
            work += cost
            keys.add(block.program_key)
        return found

    longest = sum(block.run_steps + COMPILING for block in blocks)
    return stretches(bisect_left(range(longest), True, key=lambda limit: len(stretches(limit)) <= n))
