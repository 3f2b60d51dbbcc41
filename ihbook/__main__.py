"""`python -m ihbook store list | verify | prune`: look after the store of finished runs."""

import argparse
import sys
import time

from ihbook.store import Store


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m ihbook", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    store = commands.add_parser("store", help="look after the store of finished runs")
    store.add_argument("action", choices=["list", "verify", "prune"])
    store.add_argument("--root", help="the store's folder (default: IHBOOK_STORE, or the platform's place for user data)")
    store.add_argument("--days", type=float, help="prune: also remove runs not written in so many days")
    store.add_argument("--all", action="store_true", help="prune: remove every run")
    options = parser.parse_args(arguments)
    where = Store(options.root)
    print(where.root)
    if options.action == "list":
        return _list(where)
    if options.action == "verify":
        wrong = where.verify()
        for folder, why in wrong.items():
            print(f"damaged: {folder.name}: {why}")
        print(f"{sum(1 for _ in where.entries()) - len(wrong)} runs are whole, {len(wrong)} damaged")
        return bool(wrong)
    for folder in where.prune(days=options.days, everything=options.all):
        print(f"removed {folder.name}")
    return 0


def _list(where: Store) -> int:
    total = 0
    for entry in where.entries():
        run = entry.config.get("run", {})
        clamps = " + ".join(clamp.get("type", "?") for clamp in run.get("clamps", [])) or "no clamp"
        task, bank = run.get("task", {}), run.get("bank", {})
        print(f"{entry.folder.name:36} {time.strftime('%Y-%m-%d %H:%M', time.localtime(entry.written))} "
              f"{entry.size / 1e6:8.1f} MB  {bank.get('name', 'damaged')}, C={task.get('n_classes')}, L={task.get('n_labels')}, "
              f"seed {run.get('init_seed')}, {clamps}")
        total += entry.size
    print(f"{total / 1e6:.1f} MB in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
