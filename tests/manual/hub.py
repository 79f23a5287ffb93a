"""The first start on a machine without models, against a hub on this machine, as a user sees it.

    python -m tests.manual.hub DIR

Tiny models are published on a hub that runs here, an empty HF_HOME is made in DIR, and the commands
of a first hour are run: plan, a start on two ranks, the same without a network, fetch over a
connection that is cut, and what cannot work (no such repository, gated, offline, no room). Each
command is printed with its output, its exit code, and the weight files that the hub sent for it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import hub as hubs
from tests import tiny
from tests.models.test_fetch import CLIP, QWEN, publish
from tests.training.fixtures import make_shards
from tests.training.forked import ROOT, environment
from tests.training.launch import command

PROGRAM = [sys.executable, "-m", "vlmds.cli"]


def show(title: str, hub: hubs.Hub, words: list[str], **env: str) -> None:
    hub.downloads.clear()
    print(f"\n=== {title}\n$ {' '.join(words)}", flush=True)
    done = subprocess.run(
        words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(**env)
    )
    sent = {name: count for name, count in hub.downloads.items() if name.endswith(hubs.LFS)}
    print(f"{done.stdout.rstrip()}\n--- exit code {done.returncode}; weight files sent: {sent or 'none'}")


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    shards = make_shards(folder / "packed")
    with hubs.running() as hub:
        publish(hub, folder / "published")
        hub.commit("team/gated", hub.find(QWEN, "main")[1])
        hub.gated.add("team/gated")
        home = hub.environment(folder / "home")
        own = [s for s in tiny.settings(folder) if not s.startswith(("vision.model", "llm.model"))]
        models = [f"vision.model={CLIP}", f"llm.model={QWEN}"]

        def start(run: str, *changes: str) -> list[str]:
            return command(
                2,
                "--exp",
                "e3",
                "--output",
                str(folder / run),
                "--data",
                str(shards),
                "--set",
                *own,
                *models,
                "stages.0.steps=2",
                "stages.1.steps=2",
                *changes,
            )

        plan = [*PROGRAM, "plan", "--exp", "e3", "--data", str(shards), "--set", *own, *models]
        fetch = [*PROGRAM, "fetch", "--exp", "e3", "--set", *models]
        show("plan, before anything is downloaded", hub, plan, **home)
        show("two ranks, an empty HF_HOME", hub, start("run"), **home)
        show("another run without a network", hub, start("offline"), **home | {"HF_HUB_OFFLINE": "1"})
        hub.broken = 3
        show("fetch; the hub fails three times", hub, fetch, **home | {"HF_HOME": str(folder / "broken")})
        show("no such repository", hub, start("none", "llm.model=team/qwen9"), **home)
        show("a gated one", hub, [*fetch, "llm.model=team/gated"], **home)
        show(
            "offline, and nothing there", hub, fetch, **home | {"HF_HOME": str(folder / "empty"), "HF_HUB_OFFLINE": "1"}
        )
        hub.claimed["model-00002-of-00002.safetensors"] = 10**16
        show("no room", hub, fetch, **home | {"HF_HOME": str(folder / "full")})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
