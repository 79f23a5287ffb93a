"""Training from models of the hub, as a user starts it on a machine that has none of them."""

import json
from pathlib import Path

import pytest

from tests import hub as hubs
from tests.models.test_fetch import CLIP, ONCE, QWEN, publish, weights
from tests.training.launch import TIMEOUT, arguments, fork, kill_tree, train
from vlmds.experiments.reading import load_experiment, to_yaml
from vlmds.runs.lineage import recorded_revisions

START, WORKER = (Path(__file__).with_name(name) for name in ("hub_start.py", "cache_worker.py"))
pytestmark = pytest.mark.distributed


@pytest.fixture
def hub(tmp_path):
    with hubs.running() as server:
        publish(server, tmp_path / "published")
        yield server


def test_two_ranks_from_an_empty_cache_then_without_a_network(hub, models, shards, tmp_path):
    env = hub.environment(tmp_path / "home")
    short = ["stages.0.steps=2", "stages.1.steps=2", f"vision.model={CLIP}", f"llm.model={QWEN}"]
    run = tmp_path / "run"
    train(2, *arguments(models, shards, run, *short), fresh=True, **env)
    assert weights(hub) == ONCE  # of two ranks on one machine, one downloads
    commits = {"vision": hub.find(CLIP, "main")[0], "llm": hub.find(QWEN, "main")[0]}
    assert json.loads((run / "run.json").read_text())["revisions"] == commits
    artifact = run / "artifacts" / "finetune"
    assert f"revision: {commits['llm']}" in (artifact / "experiment.yaml").read_text()
    adapter = json.loads((artifact / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == QWEN
    # The hub moves on; a new run without a network takes what is in the cache.
    hub.commit(QWEN, {"config.json": b"{}"})
    hub.asked.clear()
    again = tmp_path / "again"
    train(2, *arguments(models, shards, again, *short), script=START, **env | {"HF_HUB_OFFLINE": "1"})
    assert not hub.asked
    assert json.loads((again / "run.json").read_text())["revisions"] == commits


def test_a_model_that_is_not_there_ends_all_ranks_with_one_line(hub, models, shards, tmp_path):
    done = train(
        2,
        *arguments(models, shards, tmp_path / "run", f"vision.model={CLIP}", "llm.model=team/qwen9"),
        expect=2,
        script=START,
        **hub.environment(tmp_path / "home"),
    )
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("vlmds: ")]
    assert f"llm.model: {hub.url} has no repository team/qwen9" in line
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_download_may_take_longer_than_the_timeout(tmp_path):
    """Into a cache that two machines share, and into one on each: two jobs at once, since both wait."""
    wanted = {"shared": ["worked-0"], "separate": ["worked-0", "worked-1"]}
    jobs = {}
    try:
        for kind in wanted:
            (tmp_path / kind).mkdir()
            jobs[kind] = fork(2, str(WORKER), str(tmp_path / kind), kind, log=tmp_path / f"log-{kind}")
        for kind, job in jobs.items():
            assert job.wait(TIMEOUT) == 0, (tmp_path / f"log-{kind}.err").read_text()[-5000:]
    finally:
        for job in jobs.values():
            kill_tree(job)
    assert {kind: sorted(path.name for path in (tmp_path / kind).glob("worked-*")) for kind in wanted} == wanted


def test_a_commit_is_kept_for_the_model_that_it_is_of(tmp_path):
    """Of an earlier start, or of the run that --from names."""
    commits = {"vision": "a" * 40, "llm": "b" * 40}
    names = [f"vision.model={CLIP}", f"llm.model={QWEN}"]
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"revisions": commits}))
    (run / "experiment.yaml").write_text(to_yaml(load_experiment("e3", names)))
    assert recorded_revisions(load_experiment("e3", names), None, run) == commits
    other = load_experiment("e3", [*names, "llm.model=team/other"])
    assert recorded_revisions(other, tmp_path / "none", run) == {"vision": commits["vision"]}
    (run / "run.json").write_text("{}")  # of a time when none was recorded
    (run / "experiment.yaml").unlink()
    assert recorded_revisions(other, run) == recorded_revisions(other, None) == {}
