"""See the package."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import tempfile
from pathlib import Path

from tests.hostile.forks import fork, preload
from tests.hostile.judge import report, try_draw, try_seeds
from tests.hostile.sandbox import build


def work(first: int, draws: int, root: Path) -> list[str]:
    """Build a sandbox and try a range of seeds, a few at a time, printing as they fail."""
    sandbox = build(root / f"sandbox-{first}", fork)
    gc.freeze()  # a child's collector would touch, and so copy, all that it shares with this process
    failures: list[str] = []
    costs: dict[str, list[float]] = {}
    for start in range(first, first + draws, 20):
        new = try_seeds(range(start, min(start + 20, first + draws)), sandbox, root / f"draws-{first}", costs)
        failures += new
        print(*new, f"{start + 20 - first} of {draws}: {len(failures)} wrong", sep="\n", file=sys.stderr, flush=True)
    for name, seconds in sorted(costs.items(), key=lambda item: -sum(item[1])):
        print(f"{name:28} {len(seconds):6} draws, {sum(seconds) / len(seconds):6.3f} s each", file=sys.stderr)
    return failures


def main() -> int:
    """Run draws by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, nargs="+", help="try these alone, and show what they print")
    args = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if args.seed is not None:
            sandbox = build(root / "sandbox", fork)
            num_wrong = 0
            for seed in args.seed:
                draw, outcome, problems = try_draw(seed, sandbox, root / "draws")
                print(outcome.out, outcome.err, report(seed, draw, outcome, problems or ["nothing wrong"]), sep="\n")
                num_wrong += bool(problems)
            return int(num_wrong > 0)
        share = args.draws // args.workers
        jobs = [(args.first + number * share, share, root) for number in range(args.workers)]
        if args.workers == 1:  # a pool has threads, and a process that forks should have none
            failures = work(*jobs[0])
        else:
            with multiprocessing.get_context("fork").Pool(args.workers) as pool:
                failures = [failure for found in pool.starmap(work, jobs) for failure in found]
        print(*failures, f"{len(failures)} of {args.draws} draws went wrong", sep="\n")
        return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
