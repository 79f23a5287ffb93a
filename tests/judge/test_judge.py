"""`vlmds judge` against a server of its own: answers, bad answers, limits, resuming, the key."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.evaluation.planted import plant
from tests.judge.server import chose, prefers_shorter, said, serving
from vlmds.cli import main
from vlmds.errors import InputError
from vlmds.evaluation.reviews import read_reviews
from vlmds.judge.endpoint import Endpoint, Failed, is_local, retry_after, shown_url

SECRET = "sk-planted-secret-0123456789"
PAIRS = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    return [str(plant(folder / exp, exp, clips=40)) for exp in ("e3", "e7")]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def judged(server, runs, folder: Path, *options: str) -> int:
    given = () if "--pairs" in options or "--reviews" in options else ("--pairs", str(PAIRS))
    where = () if "--reviews" in options else ("-o", str(folder))
    return main(["judge", *runs, "--endpoint", server.url, "--model", "tiny", *where, *given, *options])


def test_each_pair_in_both_orders_and_then_in_compare(runs, tmp_path, capsys):
    folder = tmp_path / "reviews"
    with serving() as server:
        assert judged(server, runs, folder, "--price-in", "2", "--price-out", "8") == 0
    printed = capsys.readouterr()
    assert "24 requests (12 pairs in both orders)" in printed.err and "at the given prices" in printed.err
    assert "24 new (0 cached), 0 before, 0 without an answer" in printed.out
    assert "tokens: 2,400 in, 240 out, 0.01 at the given prices" in printed.out
    found = read_reviews(folder)
    assert len(found.judged) == 24 and not found.people and {a.order for a in found.judged} == {1, 2}
    assert len({(a.pair, a.preferred) for a in found.judged}) == PAIRS  # the same in both orders
    assert "same answer in both orders: 12 of 12 pairs" in printed.out
    request = server.requests[0]
    assert request["response_format"]["type"] == "json_schema" and request["temperature"] == 0
    report = str(tmp_path / "r.html")
    assert main(["compare", *runs, "--reviews", str(folder), "-o", report]) == 0
    assert "judge tiny" in (out := capsys.readouterr().out) and "uncalibrated" in out


def test_a_judge_that_always_takes_the_first_is_reported(runs, tmp_path, capsys):
    with serving(lambda request, number: chose("first")) as server:
        assert judged(server, runs, tmp_path, "--pairs", "25") == 0
    printed = capsys.readouterr()
    assert "0 of 25 pairs; twice the first place 25" in printed.out and "prefers a position" in printed.err
    assert main(["compare", *runs, "--reviews", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 0
    assert "not used" in capsys.readouterr().out


def test_the_same_command_asks_only_what_is_missing(runs, tmp_path, capsys):
    """Every third question is refused at first."""

    def refuses(request, number):
        return said(None, refusal="no") if number % 3 == 0 else prefers_shorter(request, number)

    with serving(refuses) as server:
        assert judged(server, runs, tmp_path) == 0
        assert len(server.requests) == 24
    assert "8 without an answer (8 refused)" in capsys.readouterr().out
    record = json.loads((tmp_path / "judge-tiny.json").read_text())
    assert record["last"]["refused"] == 8 and record["settings"]["rubric"] == 1
    with serving() as server:
        assert judged(server, runs, tmp_path) == 0
        assert len(server.requests) == 8
        assert judged(server, runs, tmp_path) == 0
        assert len(server.requests) == 8
    assert len(read_reviews(tmp_path).judged) == 24


def test_answers_are_cached_by_content(runs, tmp_path, capsys):
    """The file of answers is lost; the cache has what was said about these captions."""
    with serving() as server:
        assert judged(server, runs, tmp_path) == 0
        before = [(a.pair, a.order, a.choice) for a in read_reviews(tmp_path).judged]
        (tmp_path / "judge-tiny.jsonl").unlink()
        with (tmp_path / "judge-cache" / "judge-tiny.jsonl").open("a") as file:
            file.write('{"key": "cut')  # by a kill
        assert judged(server, runs, tmp_path) == 0
        assert len(server.requests) == 24
        assert sorted(before) == sorted((a.pair, a.order, a.choice) for a in read_reviews(tmp_path).judged)
    assert "24 new (24 cached)" in capsys.readouterr().out


def test_other_settings_need_another_name(runs, tmp_path, capsys):
    with serving() as server:
        assert judged(server, runs, tmp_path) == 0
        assert judged(server, runs, tmp_path, "--rubric", "en") == 2
        assert "were given with language ko; give these another name with --as" in capsys.readouterr().err
        assert judged(server, runs, tmp_path, "--rubric", "en", "--as", "tiny-en") == 0
        assert "You evaluate" in server.requests[-1]["messages"][0]["content"]
    assert {a.reviewer for a in read_reviews(tmp_path).judged} == {"judge:tiny", "judge:tiny-en"}


def test_more_pairs_are_drawn_at_random(runs, tmp_path, capsys):
    with serving() as server:
        assert judged(server, runs, tmp_path) == 0
        assert judged(server, runs, tmp_path, "--pairs", "20") == 0
        assert len(server.requests) == 40
        assert judged(server, [], tmp_path, "--reviews", str(tmp_path)) == 0
        assert len(server.requests) == 40
    found = read_reviews(tmp_path).judged
    assert len({a.pair for a in found}) == 20 and {a.chosen for a in found} == {"random"}


@pytest.mark.parametrize(("lacks", "kept"), [("json_schema", {"type": "json_object"}), ("response_format", None)])
def test_servers_without_json_schema(runs, tmp_path, lacks, kept):
    def answer(request, number):
        given = request.get("response_format") or {}
        if lacks == "response_format" and given or given.get("type") == lacks:
            return 400, {}, {"error": {"message": f"{lacks} is not supported", "type": "invalid_request_error"}}
        return said(f"```json\n{json.dumps({'choice': 'first'})}\n```")

    with serving(answer) as server:
        assert judged(server, runs, tmp_path, "--parallel", "1") == 0
        assert server.requests[-1].get("response_format") == kept
        refused = 24 + (1 if kept else 2)
        assert len(server.requests) == refused  # what it lacks is asked once
    assert len(read_reviews(tmp_path).judged) == 24


def test_servers_that_want_other_names(tmp_path):
    def answer(request, number):
        for name, better in (("max_tokens", "use max_completion_tokens"), ("temperature", "only the default")):
            if name in request:
                return 400, {}, {"error": {"message": f"'{name}' is not supported: {better}"}}
        return prefers_shorter(request, number)

    with serving(answer) as server:
        endpoint = Endpoint(server.url, "tiny")
        text = 'x: []\n첫째: "가"\n둘째: "나나"'
        reply = endpoint.ask([{"role": "system", "content": ""}, {"role": "user", "content": text}])
        assert "first" in reply.text and "max_completion_tokens" in server.requests[-1]


def test_rate_limits_are_waited_for(tmp_path):
    times = []

    def answer(request, number):
        times.append(time.monotonic())
        if number == 1:
            return 429, {"retry-after": "1"}, {"error": {"message": "slow down"}}
        if number == 2:
            return 503, {"retry-after-ms": "10"}, "busy"
        return said("ok")

    with serving(answer) as server:
        assert Endpoint(server.url, "tiny").ask([]).text == "ok"
    assert times[1] - times[0] >= 1


def test_a_server_that_is_too_slow_is_asked_again_and_then_left(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmds.judge.endpoint.TRIES", 2)
    release = threading.Event()

    def answer(request, number):
        release.wait(20)
        return said("late")

    with serving(answer) as server:
        with pytest.raises(Failed):
            Endpoint(server.url, "tiny", seconds=0.2).ask([])
        assert len(server.requests) == 2
        release.set()


@pytest.mark.parametrize(
    "reply",
    [
        said("둘 다 좋네요"), said(""), said(None), said('{"choice": "left"}'), (200, {}, {"choices": []}),
        (200, {}, {"unexpected": 1}), (200, {}, "[]"),
    ],
)  # fmt: skip
def test_malformed_answers_are_counted_and_too_many_are_one_line(runs, tmp_path, capsys, reply):
    with serving(lambda request, number: reply) as server:
        assert judged(server, runs, tmp_path) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("vlmds: --model tiny: ") and "malformed" in line and "requests gave no answer" in line


def test_content_filters_are_refusals(runs, tmp_path, capsys):
    def answer(request, number):
        if number == 2:
            return 400, {}, {"error": {"message": "blocked by content_filter", "code": "content_filter"}}
        if number == 3:
            return said("", finish_reason="content_filter")
        return prefers_shorter(request, number)

    with serving(answer) as server:
        assert judged(server, runs, tmp_path, "--parallel", "1") == 0
        assert server.requests[-1]["response_format"]["type"] == "json_schema"
    assert "2 without an answer (2 refused)" in capsys.readouterr().out


def test_the_key_is_sent_and_written_nowhere(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving() as server:
        assert judged(server, runs, tmp_path) == 0
        assert set(server.keys) == {f"Bearer {SECRET}"}
    with serving(lambda request, number: (401, {}, {"error": {"message": f"Incorrect API key: {SECRET}"}})) as server:
        assert judged(server, runs, tmp_path / "other") == 2
    with serving(lambda request, number: (404, {}, {"error": {"message": f"no {SECRET}"}})) as server:
        assert judged(server, runs, tmp_path / "other") == 2
    printed = capsys.readouterr()
    assert "does not accept the key (401); set OPENAI_API_KEY" in printed.err
    assert "404 (" in printed.err and "it has tiny" in printed.err
    assert SECRET not in printed.out + printed.err
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert SECRET.encode() not in file.read_bytes(), file


def test_secrets_in_the_address_are_not_shown():
    assert shown_url("https://user:pass@host:1/v1?key=x#y") == "https://host:1/v1"
    assert is_local("http://localhost:8000/v1") and is_local("http://10.0.0.3/v1") and is_local("http://gpu1:8000/v1")
    assert not is_local("https://api.openai.com/v1")


def test_waits_that_servers_ask_for():
    assert retry_after({"retry-after": "7"}) == 7 and retry_after({"retry-after-ms": "1500"}) == 1.5
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, now=lambda: 40.0) == 20
    assert retry_after({}) is None and retry_after({"retry-after": "soon"}) is None


def test_what_costs_much_needs_yes(runs, tmp_path, capsys):
    with serving() as server:
        assert judged(server, runs, tmp_path, "--price-in", "9000") == 2
        assert not server.requests
        (_, line) = capsys.readouterr().err.splitlines()
        assert line.startswith("vlmds: --yes: about ") and "repeat the command with --yes" in line
        assert judged(server, runs, tmp_path, "--price-in", "9000", "--yes") == 0


def test_bad_input_is_one_line(runs, tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert main(["judge", *arguments, "--model", "tiny"]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    out = ("-o", str(tmp_path / "reviews"))
    assert "not an address" in refused(*runs, "--endpoint", "localhost:8000", *out)
    assert "cannot be reached" in refused(*runs, "--endpoint", "http://127.0.0.1:9/v1", *out)
    url = ("--endpoint", "http://127.0.0.1:9/v1")
    assert "RUN: give evaluated runs" in refused(*url, "-o", str(tmp_path / "none"))
    assert "has no reviews" in refused(*runs, *url, "--reviews", str(tmp_path / "none"))
    assert "--frames -1: must be at least 0" in refused(*runs, *url, *out, "--frames", "-1")
    assert f"{tmp_path}" in refused(*runs, *url, *out, "--frames", "2", "--data", str(tmp_path))
    with serving() as server:
        server.models = (401, {"error": {"message": "key"}})
        assert "wants a key (401); set OPENAI_API_KEY" in refused(*runs, "--endpoint", server.url, *out)


def test_without_the_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr("vlmds.judge.endpoint.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"\.\[judge\]"):
        Endpoint("http://127.0.0.1:9/v1", "m")


def test_a_killed_judge_goes_on(runs, tmp_path):
    """kill -9 in the middle: what was answered stays, and is not asked again."""
    seen = threading.Event()
    hold = threading.Event()

    def answer(request, number):
        if number > 6:
            seen.set()
            hold.wait(60)
        return prefers_shorter(request, number)

    with serving(answer) as server:
        command = [sys.executable, "-m", "vlmds.cli", "judge", *runs, "--endpoint", server.url, "--model", "tiny"]
        process = subprocess.Popen([*command, "-o", str(tmp_path), "--pairs", str(PAIRS), "--parallel", "1"])
        assert seen.wait(120)
        process.kill()
        process.wait()
        hold.set()
        assert len(read_reviews(tmp_path).judged) == 6
        before = len(server.requests)
        assert judged(server, runs, tmp_path) == 0
        assert len(server.requests) - before == 24 - 6
