"""Seconds and peak memory of `vlmds compare` on planted evaluations, and seconds until its page is open in Chromium.

python -m tests.manual.compare_scale FOLDER [CLIPS [EXPERIMENTS [SEEDS]]]     (default 10000 8 3)
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

from tests.browser import CHROMIUM, DRIVER, open_browser
from tests.evaluation.planted import plant

TIMES = 3


def opening(page: Path) -> list[float]:
    """Seconds from the start of loading until the page is painted with its first clips, each time in a new browser."""
    found = []
    for _ in range(TIMES):
        with open_browser("1280,1000") as browser:
            browser.get(page.as_uri())
            found.append(
                browser.execute_async_script(
                    "const done = arguments[0], shown = () => document.querySelector('.clip') ? requestAnimationFrame(() =>"
                    " requestAnimationFrame(() => done(performance.now() / 1000))) : setTimeout(shown, 20); shown()"
                )
            )
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    given = [int(number) for number in sys.argv[2:5]]
    clips, experiments, seeds = [*given, *(10_000, 8, 3)[len(given) :]]
    runs = [folder / f"e{number}-seed{seed}" for number in range(1, experiments + 1) for seed in range(seeds)]
    for run in runs:
        if not run.is_dir():
            plant(run, run.name[:2], int(run.name[-1]), clips=clips, spread=30.0)
    page = folder / "report.html"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "vlmds.cli", "compare", *map(str, runs), "-o", str(page)], check=True)
    seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"{clips:,} clips × {experiments} experiments × {seeds} seeds: {seconds:.1f} s, {memory:.2f} GiB, "
        f"page {page.stat().st_size / 1e6:.1f} MB"
    )
    if CHROMIUM and DRIVER:
        print("page open after " + ", ".join(f"{seconds:.2f}" for seconds in opening(page)) + " s")


if __name__ == "__main__":
    main()
