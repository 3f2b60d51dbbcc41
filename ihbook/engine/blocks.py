"""How runs are grouped into blocks, and which core trains each block."""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ihbook.clamps import Ablate, Clamp
from ihbook.engine.compiled import BLOCK, PLAIN_BLOCK, pays
from ihbook.engine.prepared import Prepared, clamp_signature, family_digest, shape_of
from ihbook.files import writing

COMPILING = 60_000  # run-steps that a core trains in the time that it takes to compile a program
SHARE_FROM = 6_000  # total run-steps from which processes pay: each takes some seconds to start


@dataclass(frozen=True, eq=False)
class Block:
    """A family, its places (indices) among the runs asked for, whether it is compiled, and the clamps that its program serves."""

    family: list[Prepared]
    places: list[int]
    compile: bool
    compile_with: tuple[tuple[Clamp, ...], ...] = ()

    @property
    def run_steps(self) -> int:
        return sum(prepared.run.n_steps for prepared in self.family)

    @property
    def work(self) -> int:
        """The cost of training the block, in run-steps of the paper's network: a step's cost grows with tokens and layers."""
        run = self.family[0].run
        return round(self.run_steps * (2 * run.task.n_pairs + 1) / 5 * run.model.n_layers / 2)

    @property
    def program_key(self) -> tuple | None:
        """Blocks with the same key use one compiled program; None where nothing is compiled."""
        return (self.family[0].family_key, *self.family[0].compile_key) if self.compile else None

    def folder(self, directory: Path) -> Path:
        return directory / family_digest(self.family)

    def announce(self, directory: Path) -> None:
        """Record the family before it trains, so that a resumed call trains the same one. Raises OSError where it can't."""
        with writing(self.folder(directory) / "family.json") as partial:
            partial.write_text(json.dumps({"runs": [prepared.digest for prepared in self.family], "compile": self.compile}))


def plan_blocks(wanted: Sequence[Prepared], directory: Path, device: str | torch.device = "cpu",
                compile: bool | None = None, asked: Sequence[Prepared] = ()) -> list[Block]:
    """Group runs into blocks: first the families that a stopped call left in `directory`, unchanged, then new ones.

    A new family has runs with one `family_key` and similar lengths, the longest first. It is compiled where that pays, or as
    `compile` says. On a CPU, families are small, and long work is split so that every core gets a block. There, one compiled
    program serves all clamps that runs with one `family_key` have among `asked` (default: `wanted`), and heads of the last layer
    that are off; runs that need an extra pass share it only with runs of the same `extra_pass_key`. New blocks with the same
    `program_key` are neighbours.
    """
    kind = torch.device(device).type
    signatures: dict[tuple, dict[frozenset, tuple]] = defaultdict(dict)
    for prepared in asked or wanted:
        served = signatures[prepared.family_key, prepared.extra_pass_key]
        served |= prepared.clamp_signatures
        if not prepared.extra_pass_key:  # heads of the last layer off cost nothing, so that most calls share one program
            off = (Ablate((prepared.run.model.n_layers - 1, 0)),)
            served.setdefault(clamp_signature(off, shape_of(prepared.run)), off)
    waiting = dict(enumerate(wanted))
    stopped = list(_stopped(waiting, directory, compile))
    def program_of(prepared: Prepared) -> tuple:
        return prepared.family_key, *(prepared.compile_key if kind == "cpu" else (prepared.extra_pass_key,))

    steps: dict[tuple, list[int]] = defaultdict(list)  # of each run, by program
    for prepared in waiting.values():
        steps[program_of(prepared)].append(prepared.run.n_steps)
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, prepared in waiting.items():
        compiles = pays(steps[program_of(prepared)], kind) if compile is None else compile
        groups[(compiles, *program_of(prepared)) if compiles else (compiles, prepared.family_key)].append(i)
    most = {True: BLOCK[kind], False: PLAIN_BLOCK if kind == "cpu" else BLOCK[kind]}  # runs per block, by whether it is compiled
    n_blocks = len(stopped) + sum(-(-len(members) // most[compiles]) for (compiles, *_), members in groups.items())
    planned = []
    for (compiles, *_), members in groups.items():
        members.sort(key=lambda i: -wanted[i].run.n_steps)
        n = -(-len(members) // most[compiles])
        enough = sum(wanted[i].run.n_steps for i in members) >= SHARE_FROM
        if kind == "cpu" and enough and (n_blocks < n_cores() or not compiles):
            cores = min(len(members), n_cores())  # every core gets an equal share
            n = -(-n // cores) * cores
        even = -(-len(members) // n)
        planned += [(members[start:start + even], compiles) for start in range(0, len(members), even)]
    blocks = [Block([wanted[i] for i in places], places, compile) for places, compile in [*stopped, *planned]]
    if kind != "cpu":
        return blocks
    return [replace(block, compile_with=tuple(signatures[block.family[0].family_key, block.family[0].extra_pass_key].values()))
            if block.compile else block for block in blocks]


def _stopped(waiting: dict[int, Prepared], directory: Path, compile: bool | None) -> Iterator[tuple[list[int], bool]]:
    """Yield the places of each family that a stopped call announced in `directory`, and whether it is compiled. A family counts
    only if `waiting` holds all of its runs; they are then removed from `waiting`."""
    for path in sorted(directory.glob("*/family.json")):
        try:
            book = json.loads(path.read_text())
            digests, was_compiled = list(book["runs"]), bool(book["compile"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged file: its runs are planned and trained from the start
        places: list[int] = []
        for digest in digests:
            places += [i for i, prepared in waiting.items() if prepared.digest == digest and i not in places][:1]
        block = Block([waiting[i] for i in places], places, was_compiled)
        if places and len(places) == len(digests) and block.folder(directory) == path.parent:
            for i in places:
                del waiting[i]
            yield places, was_compiled if compile is None else compile


def n_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def n_processes(blocks: Sequence[Block], device: str | torch.device) -> int:
    """The number of processes that should train the blocks; 1 means this process alone."""
    share = torch.device(device).type == "cpu" and sum(block.run_steps for block in blocks) >= SHARE_FROM
    return min(len(blocks), n_cores()) if share else 1


def shares(blocks: Sequence[Block], n: int) -> list[list[int]]:
    """Split the indices of `blocks` into at most `n` shares of neighbours, so that the longest share is as short as possible. A
    share's length counts the work of its blocks, and `COMPILING` once for each compiled program that it needs."""

    def stretches(limit: int) -> list[list[int]]:
        found, work, keys = [[]], 0, set()
        for i, block in enumerate(blocks):
            cost = block.work + COMPILING * (block.program_key not in {None, *keys})
            if found[-1] and work + cost > limit:
                found.append([])
                work, keys, cost = 0, set(), block.work + COMPILING * block.compile
            found[-1].append(i)
            work += cost
            keys.add(block.program_key)
        return found

    longest = sum(block.work + COMPILING for block in blocks)
    return stretches(bisect_left(range(longest), True, key=lambda limit: len(stretches(limit)) <= n))
