"""Compare the speed of two commits of this repository in one run. Their measurements alternate, so that a machine that slows down
meanwhile does so for both.

    python benchmarks/compare.py f41682b                      that commit against the working tree
    python benchmarks/compare.py f41682b HEAD "8 runs" Copy   two commits, and only the rows whose names contain one of these words

The commits must share the names that rows.py uses; each has a folder for its data and compiled programs of its own.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import ROWS

HERE = Path(__file__).resolve().parent
DEFAULT = ("1 run", "8 runs", "8 runs, no evaluation", "8 runs, Copy", "8 runs, Preserve")


def checkout(commit: str, folder: Path) -> Path:
    """The files of a commit, in a folder of their own."""
    folder.mkdir()
    archive = subprocess.run(["git", "-C", HERE.parent, "archive", commit], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return folder


def measured(package: Path, cache: Path, row: str) -> float:
    """A row's rate in a new process that imports the package from that folder."""
    env = os.environ | {"PYTHONPATH": str(package), "IHBOOK_CACHE": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    return float(subprocess.check_output([sys.executable, HERE / "rows.py", row], env=env, cwd=cache, text=True))


def is_commit(word: str) -> bool:
    command = ["git", "-C", HERE, "rev-parse", "-q", "--verify", word + "^{commit}"]
    return subprocess.run(command, capture_output=True).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("rest", nargs="*", help="the other commit (default: the working tree), then words")
    parser.add_argument("--times", type=int, default=5, help="how often each commit is measured")
    chosen = parser.parse_args()
    known = [word for word in chosen.rest[:1] if is_commit(word)]
    words = chosen.rest[len(known):]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        packages = [checkout(chosen.old, root / "old"), checkout(known[0], root / "new") if known else HERE.parent]
        caches = [root / name for name in ("cache-old", "cache-new")]
        for cache in caches:
            cache.mkdir()
        print(f"| run-steps/s | {chosen.old} | {known[0] if known else 'working tree'} | ratio | from … to |")
        print("|---|---|---|---|---|")
        for row in ROWS:
            if not any(word in row for word in words) if words else row not in DEFAULT:
                continue
            rates = [[measured(package, cache, row) for package, cache in zip(packages, caches, strict=True)]
                     for _ in range(chosen.times)]
            ratios = [new / old for old, new in rates]
            old, new = (statistics.median(each) for each in zip(*rates, strict=True))
            print(f"| {row} | {old:,.0f} | {new:,.0f} | {statistics.median(ratios):.2f} | {min(ratios):.2f} … {max(ratios):.2f} |",
                  flush=True)


if __name__ == "__main__":
    main()
