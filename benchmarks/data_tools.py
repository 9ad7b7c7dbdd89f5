"""Arrow → JSON Lines and nested subsets, against what users do today: seconds, MB/s and peak memory of each process.

Run from the repository root: python -m benchmarks.data_tools [--full]

94,000 Tulu-like rows for both arms; `--full` adds 939,343 rows (3.8 GB of JSON Lines) for ours. Peak memory is the
process's largest resident set, page cache of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.make_tulu_like import make

ROOT = Path(__file__).resolve().parents[1]
TO_JSON = """
import datasets, sys
datasets.disable_progress_bars()
datasets.Dataset.from_file(sys.argv[1]).to_json(sys.argv[2])
"""
LOAD_ARRAY = """
import json, random, sys
rows = json.load(open(sys.argv[1]))
for size in map(int, sys.argv[3:]):
    json.dump(random.Random(42).sample(rows, size), open(f"{sys.argv[2]}/{size}.json", "w"))
"""


def measure(words: list[str]) -> tuple[float, float]:
    """Run a command and return its seconds and peak MB."""
    started = time.perf_counter()
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)[:200]} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1e3


def floor(path: Path) -> dict[str, float]:
    """Return this machine's MB/s for what any tool must do: read a file, hash it, write it and flush it."""
    import hashlib

    size, rates = path.stat().st_size / 1e6, {}
    started = time.perf_counter()
    data = path.read_bytes()
    rates["read"] = size / (time.perf_counter() - started)
    started = time.perf_counter()
    hashlib.sha256(data)
    rates["sha256"] = size / (time.perf_counter() - started)
    copy = path.with_suffix(".copy")
    started = time.perf_counter()
    with copy.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    rates["write and flush"] = size / (time.perf_counter() - started)
    copy.unlink()
    return rates


def row(name: str, seconds: float, size: float, peak: float) -> None:
    """Print one row of the table."""
    print(f"| {name} | {seconds:.2f} | {size / seconds:,.0f} | {peak:,.0f} |", flush=True)


def compare(folder: Path) -> None:
    """Measure both arms at 94,000 rows, interleaved three times, and print medians."""
    (source,) = make(94_000, folder / "94k")
    lines, array = folder / "94k.jsonl", folder / "94k.json"
    python = sys.executable
    convert = [python, "arrow2json.py", str(source), "-o", str(lines), "--overwrite"]
    peer = [python, "-c", TO_JSON, str(source), str(folder / "peer.jsonl")]
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
    for _ in range(3):
        times["ours"].append(measure(convert))
        times["peer"].append(measure(peer))
    size = lines.stat().st_size / 1e6
    for arm, name in (("ours", "arrow2json.py"), ("peer", "datasets to_json, 1 process")):
        row(
            f"Arrow → JSON Lines, 94k: {name}",
            *[sorted(x[0] for x in times[arm])[1], size, max(x[1] for x in times[arm])],
        )
    medians = {arm: sorted(seconds for seconds, _ in runs)[1] for arm, runs in times.items()}
    print(f"ratio {medians['peer'] / medians['ours']:.1f} (complete processes, imports included)")
    measure([*convert[:4], str(array), "--format", "json", "--overwrite"])
    sample = [
        python,
        "sample_subsets.py",
        str(lines),
        "--sizes",
        "900",
        "9000",
        "-o",
        str(folder / "subsets"),
        "--overwrite",
    ]
    seconds, peak = measure(sample)
    row("900 and 9,000 of 94k JSON Lines rows: sample_subsets.py", seconds, size, peak)
    (folder / "peer").mkdir()
    seconds, peak = measure([python, "-c", LOAD_ARRAY, str(array), str(folder / "peer"), "900", "9000"])
    row("the same: json.load, random.sample, json.dump", seconds, size, peak)
    print(
        f"for 939,343 rows that is by scale {seconds * 939_343 / 94_000:.0f} s "
        f"and {peak * 939_343 / 94_000 / 1e3:.0f} GB"
    )
    print("floor, MB/s:", {name: round(rate) for name, rate in floor(lines).items()})


def full(folder: Path) -> None:
    """Measure our tools alone at the size of the complete mixture."""
    shards = make(939_343, folder / "940k")
    lines = folder / "940k.jsonl"
    python = sys.executable
    seconds, peak = measure([python, "arrow2json.py", *map(str, shards), "-o", str(lines)])
    size = lines.stat().st_size / 1e6
    row(f"Arrow → JSON Lines, 939,343 rows, {size:,.0f} MB", seconds, size, peak)
    seconds, peak = measure(
        [python, "sample_subsets.py", str(lines), "--sizes", "9000", "90000", "-o", str(folder / "subsets")]
    )
    row("9,000 and 90,000 of 939,343 rows, nested, one pass", seconds, size, peak)
    seconds, peak = measure(
        [
            python,
            "sample_subsets.py",
            str(lines),
            "--sizes",
            "9000",
            "90000",
            "-o",
            str(folder / "strata"),
            "--stratify",
            "source",
        ]
    )
    row("the same, stratified by source", seconds, size, peak)
    print(json.dumps({"disk used, MB": round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the complete mixture's size instead of a tenth")
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    arguments = parser.parse_args()
    working = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        print("| what | s | MB/s | peak MB |\n|---|---|---|---|")
        (full if arguments.full else compare)(working)
    finally:
        shutil.rmtree(working)
