"""`python -m ihbook store …` manages the store of finished runs; `… sweep …` runs a chapter over a grid; `… evidence …` measures
every claim on a bank, over many seeds."""

import argparse
import signal
import sys
import time
from pathlib import Path

from ihbook import checks
from ihbook.config import BANKS, EMBEDDINGS
from ihbook.engine import archive
from ihbook.engine.store import Store, default_root


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status. Raises SystemExit (status 2) for bad arguments or a sweep that can't run."""
    parser = argparse.ArgumentParser(prog="python -m ihbook", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    store = commands.add_parser("store", help="look after the store of finished runs")
    store.add_argument("action", choices=["list", "verify", "prune", "export", "import"])
    store.add_argument("file", nargs="?", help="export, import: the file with all runs")
    store.add_argument("--root", help="the store's folder (default: IHBOOK_STORE, or the platform's place for user data)")
    store.add_argument("--days", type=float, help="prune: also remove runs not written in so many days")
    store.add_argument("--all", action="store_true", help="prune: remove every run and, of the default store, what the cache keeps")
    swept = commands.add_parser("sweep", help="run a chapter at every point of a grid of parameters, and gather its numbers")
    swept.add_argument("notebook", help="such as book/08_data_properties.ipynb")
    swept.add_argument("-p", "--parameter", nargs="+", action="append", default=[], metavar=("NAME", "VALUE"),
                       help="a parameter and its values; 0:8 stands for 0 1 … 7")
    swept.add_argument("--out", required=True, help="the folder for notebooks, numbers.parquet and index.html")
    column = commands.add_parser("evidence", help="measure every claim on one bank over many seeds, as a column")
    column.add_argument("--bank", default="glyphs", choices=BANKS)
    column.add_argument("--bank-path", help="your own file or folder, for omniglot and authors")
    column.add_argument("--embedding", default="auto", choices=EMBEDDINGS)
    column.add_argument("--dim", type=int, default=512, help="features of a character")
    column.add_argument("--seeds", nargs="+", default=["5:13"], help="such as 5 6 7, or 5:13 for 5 6 … 12 (the default)")
    column.add_argument("--profile", default="paper", choices=["paper", "quick"])
    column.add_argument("--n-sequences", type=int, help="length of the main run (default: the profile's)")
    column.add_argument("--device", default="cpu")
    column.add_argument("--chapters", nargs="+", default=[], metavar="NAME",
                        help="only these, such as 03_many_heads; the file keeps what it has of others, and of other seeds")
    column.add_argument("--book", default="book", help="the folder of the book's notebooks")
    column.add_argument("--name", help="of the column (default: the bank, and its embedding where that is not auto)")
    column.add_argument("--out", help="the file (default: evidence/NAME.json in the book's folder)")
    for command in (swept, column):
        where = command.add_mutually_exclusive_group()
        where.add_argument("--processes", type=int, help="run so many points at a time, each in a process of its own")
        where.add_argument("--scheduler", metavar="ADDRESS", help="run them on the Dask cluster of this scheduler, such as "
                                                                  "tcp://…:8786")
    options = parser.parse_args(arguments)
    return {"store": _store, "sweep": _sweep, "evidence": _evidence}[options.command](parser, options)


def _sweep(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    try:
        from ihbook.chapters import sweep  # its imports are slow, and the store does not need them

        grid = sweep.grid(options.parameter)
        with sweep.executor_for(options.processes, options.scheduler) as executor:
            done = sweep.sweep(options.notebook, grid, options.out, executor=executor)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"{error}\n")
    for point, why in done.failed.items():
        print(f"failed: {point}: {why.strip().splitlines()[-1]}\n  {point.folder / 'out.ipynb'}")
    print(f"{len(done.table)} numbers, {len(done.failed)} points failed: {done.page}")
    return 1 if done.failed else 0


def _evidence(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    try:
        from ihbook.chapters import evidence, sweep
        from ihbook.chapters.experiments import Settings

        settings = Settings(options.profile, bank=options.bank, bank_path=options.bank_path, embedding=options.embedding,
                            dim=options.dim, n_sequences=options.n_sequences, device=options.device)
        seeds = sweep.grid([["seed", *options.seeds]])["seed"]
        for seed in seeds:
            checks.whole("seed", seed, 0)
        name = options.name or evidence.column_name(settings)
        out = Path(options.out or Path(options.book) / "evidence" / f"{name}.json")
        there = evidence.read(out) if out.exists() else None
        if there:  # before anything is measured that could not stand in it
            evidence.check_same(there, evidence.stamp(settings, seeds, ""))
        with sweep.executor_for(options.processes, options.scheduler) as executor:
            column = evidence.measure(options.book, settings, seeds, default_root() / "evidence" / name, name=name,
                                      chapters=options.chapters, executor=executor)
        whole = evidence.merged(there, column) if there else column
        evidence.write(whole, out)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        parser.exit(2, f"{error}\n")
    print(f"{out}: " + ", ".join(f"{n} {word}" for word, n in evidence.counts(whole).items()))
    return 0


def _store(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    where = Store(options.root)
    print(where.root)
    try:
        return _act(options, where)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")


def _act(options: argparse.Namespace, where: Store) -> int:
    if options.action == "list":
        return _list(where)
    if options.action == "verify":
        wrong = where.verify()
        for folder, why in wrong.items():
            print(f"damaged: {folder.name}: {why}")
        print(f"{sum(1 for _ in where.entries()) - len(wrong)} runs are whole, {len(wrong)} damaged")
        return bool(wrong)
    if options.action in ("export", "import"):
        return _archive(options, where)
    for folder in where.prune(days=options.days, everything=options.all):
        print(f"removed {folder.name}")
    return 0


def _archive(options: argparse.Namespace, where: Store) -> int:
    if not options.file:
        raise ValueError(f"store {options.action} needs a file; give its name, such as runs.zip")
    if options.action == "import":
        stored, there = archive.import_runs(where, options.file)
        print(f"{len(stored)} runs are imported, {len(there)} were there already")
        return 0
    names, wrong = archive.export_runs(where, options.file)
    for name, why in wrong.items():
        print(f"damaged, and left out: {name}: {why}")
    print(f"{len(names)} runs, {Path(options.file).stat().st_size / 1e6:.1f} MB: {options.file}")
    return bool(wrong)


def _list(where: Store) -> int:
    total = 0
    for entry in where.entries():
        run = entry.config.get("run", {})
        clamps = " + ".join(clamp.get("type", "?") for clamp in run.get("clamps", [])) or "no clamp"
        task, bank = run.get("task", {}), entry.config.get("bank", {})
        print(f"{entry.folder.name:36} {time.strftime('%Y-%m-%d %H:%M', time.localtime(entry.written))} "
              f"{entry.size / 1e6:8.1f} MB  {bank.get('name', 'damaged')}, C={task.get('n_classes')}, L={task.get('n_labels')}, "
              f"seed {run.get('init_seed')}, {clamps}")
        total += entry.size
    print(f"{total / 1e6:.1f} MB in all")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the processes of a sweep end with it
    sys.exit(main())
