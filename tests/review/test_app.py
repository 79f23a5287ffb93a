"""The server of `vlmds review` over HTTP: what is shown, byte ranges, the token, and a real process that is killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import av
import pytest

pytest.importorskip("uvicorn")

import httpx  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from tests.clips import decode_all  # noqa: E402
from tests.review.conftest import CLIPS, RUNS, captions_of, plant  # noqa: E402
from tests.review.server import Server  # noqa: E402
from vlmds.errors import InputError  # noqa: E402
from vlmds.evaluation.reviews import read_plan, read_reviews  # noqa: E402
from vlmds.evaluation.saved import read_captions, read_evaluation  # noqa: E402
from vlmds.packing.convert import convert  # noqa: E402
from vlmds.packing.pack import pack  # noqa: E402
from vlmds.review import sessions as sessions_module  # noqa: E402
from vlmds.review.app import make_app  # noqa: E402
from vlmds.review.choose import Choice  # noqa: E402
from vlmds.review.evaluations import blind_score  # noqa: E402
from vlmds.review.folder import open_reviews  # noqa: E402
from vlmds.review.sessions import Sessions  # noqa: E402

ALL = Choice(pairs=CLIPS * 3, shares={"random": 1.0}, overlap=0)


class Page:
    """What a browser sends, and all that it got back."""

    def __init__(self, client, reviewer="민수"):
        self.client, self.reviewer, self.got = client, reviewer, []

    def post(self, action, code=200, **body):
        reply = self.client.post(f"/api/{action}", json={"reviewer": self.reviewer, **body})
        self.got.append(reply.text + str(reply.headers) + str(reply.url))
        assert reply.status_code == code, reply.text
        return reply.json()

    def get(self, path, **headers):
        reply = self.client.get(path, headers=headers)
        self.got.append(str(reply.headers) + str(reply.url))
        return reply


def client_of(opened, **options) -> TestClient:
    return TestClient(make_app(Sessions(opened), **options), base_url="http://127.0.0.1")


@pytest.fixture
def opened(runs, tmp_path):
    return open_reviews(tmp_path / "reviews", runs, choice=ALL)


@pytest.fixture
def client(opened):
    return client_of(opened)


def clip_of(opened, page, clip: str) -> str:
    """The id of some pair of the clip."""
    return next(pair.pair for pair in opened.plan.pairs if pair.clip == clip)


def test_a_review_of_all_pairs_is_blind_and_complete(opened, client):
    page = Page(client)
    found = page.post("next")
    assert found["progress"] == {"answered": 0, "left": CLIPS * 3, "seconds": None}
    for number in range(CLIPS * 3):
        pair = found["pair"]
        if number == 5:
            assert page.post("references", pair=pair["id"])["references"][0].endswith("번 영상입니다.")
            page.get(f"/clip/{pair['id']}", Range="bytes=0-99")
        following = found["upcoming"] and found["upcoming"]["id"]
        found = page.post("answer", pair=pair["id"], choice=("left", "right", "both_good", "both_bad")[number % 4],
                          seconds=2.0)  # fmt: skip
        assert (found["pair"] and found["pair"]["id"]) == following
    assert found["pair"] is None and found["progress"]["left"] == 0
    page.get("/")
    everything = "\n".join(page.got) + client.get("/").text + client.get("/page.js").text
    for name in (*RUNS, *(run.id for run in opened.plan.runs), "evaluation/val", "predictions"):
        assert name not in everything
    answers = read_reviews(opened.folder).answers
    assert {a.pair for a in answers} == {p.pair for p in opened.plan.pairs} and len(answers) == CLIPS * 3
    assert [a.reference for a in answers].count(True) == 1 and all(a.seconds == 2 for a in answers)
    by_pair = {p.pair: p for p in opened.plan.pairs}
    assert all({a.left, a.right} == {by_pair[a.pair].a, by_pair[a.pair].b} for a in answers)


def test_the_captions_are_those_of_the_sides_that_are_written(opened, client):
    page = Page(client)
    first = page.post("next")["pair"]
    marks = {"left": ["wrong_action"], "right": ["invented_object", "wrong_number"]}
    page.post("answer", pair=first["id"], choice="right", marks=marks, corrected={"text": "고친 캡션", "side": "right"})
    [answer] = read_reviews(opened.folder).answers
    captions = opened.evaluations.captions
    assert captions[answer.left][answer.clip] == first["captions"]["left"]
    assert captions[answer.preferred][answer.clip] == first["captions"]["right"]
    assert answer.marks.model_dump(mode="json") == marks
    assert answer.corrected.text == "고친 캡션" and answer.corrected.run == answer.right


def test_sides_are_drawn_evenly_and_the_same_after_a_new_start(opened):
    one, other = Sessions(opened), Sessions(opened)
    sides = [one.sides("민수", pair)["left"] == pair.a for pair in opened.plan.pairs]
    assert 8 <= sum(sides) <= 28  # of 36
    assert [other.sides("민수", pair)["left"] == pair.a for pair in opened.plan.pairs] == sides
    assert [one.sides("지영", pair)["left"] == pair.a for pair in opened.plan.pairs] != sides


def test_references_come_only_when_asked_for(client):
    page = Page(client)
    found = page.post("next")
    assert "references" not in found["pair"] and "정답" not in "".join(page.got)
    assert page.post("references", pair=found["pair"]["id"])["references"]
    assert page.post("next")["pair"]["references"]


def test_undo_gives_the_pair_back_with_its_answer(opened, client):
    page = Page(client)
    first = page.post("next")["pair"]
    page.post("answer", pair=first["id"], choice="left", marks={"left": ["wrong_action"]},
              corrected={"text": "고침", "side": "left"})  # fmt: skip
    found = page.post("undo")
    assert found["undone"] and found["pair"]["id"] == first["id"] and found["progress"]["answered"] == 0
    assert found["pair"]["answer"] == {
        "choice": "left",
        "marks": {"left": ["wrong_action"], "right": []},
        "corrected": {"text": "고침", "side": "left"},
    }
    assert found["upcoming"]["id"] != first["id"] and not read_reviews(opened.folder).answers
    page.post("answer", pair=first["id"], choice="right")
    assert [a.choice for a in read_reviews(opened.folder).answers] == ["right"]
    page.post("undo")
    assert page.post("undo")["undone"] is False


def test_skipped_pairs_come_at_the_end(client):
    page = Page(client)
    first = page.post("next")["pair"]["id"]
    found = page.post("skip", pair=first)
    seen = []
    while found["pair"]:
        seen.append(found["pair"]["id"])
        found = page.post("answer", pair=seen[-1], choice="both_bad")
    assert seen[-1] == first and len(seen) == CLIPS * 3


def test_two_tabs_of_one_reviewer(opened, client):
    """The second answer of a pair replaces the first, with a notice."""
    one, other = Page(client), Page(client)
    pair = one.post("next")["pair"]["id"]
    assert other.post("next")["pair"]["id"] == pair
    assert not one.post("answer", pair=pair, choice="left")["replaced"]
    assert not one.post("answer", pair=pair, choice="left")["replaced"]  # sent again: the reply was lost
    assert other.post("answer", pair=pair, choice="both_bad")["replaced"]
    assert [a.choice for a in read_reviews(opened.folder).answers] == ["both_bad"]


def test_reviewers_share_the_pairs_and_all_get_the_overlap(runs, tmp_path, monkeypatch):
    opened = open_reviews(tmp_path / "r", runs, choice=Choice(30, {"random": 1.0}, overlap=6))
    shared = {pair.pair for pair in opened.plan.pairs[:6]}
    pages = [Page(client_of(opened), name) for name in ("민수", "지영", "현우")]
    for page in pages[1:]:
        page.client = pages[0].client
    found = [page.post("next") for page in pages]
    seen = [[] for _ in pages]
    while any(reply["pair"] for reply in found):
        for number, page in enumerate(pages):
            if pair := found[number]["pair"]:
                seen[number].append(pair["id"])
                found[number] = page.post("answer", pair=pair["id"], choice="left")
            else:
                found[number] = page.post("next")
    assert all({*each} >= shared for each in seen)
    others = [pair for each in seen for pair in each if pair not in shared]
    assert sorted(others) == sorted({p.pair for p in opened.plan.pairs} - shared)  # each once
    assert all(shared <= {*each[: len(each) * 3 // 4 + 3]} for each in seen)


def test_a_pair_that_was_shown_long_ago_is_given_to_another_reviewer(runs, tmp_path, monkeypatch):
    opened = open_reviews(tmp_path / "r", runs, choice=Choice(2, {"random": 1.0}, overlap=0))
    client = client_of(opened)
    one, other = Page(client), Page(client, "지영")
    assert one.post("next")["upcoming"] and other.post("next")["pair"] is None
    monkeypatch.setattr(sessions_module.time, "monotonic", lambda now=time.monotonic: now() + sessions_module.LEASE + 1)
    assert other.post("next")["upcoming"]


def test_progress_estimates_the_time_left(client):
    page = Page(client)
    found = page.post("next")
    for _ in range(4):
        found = page.post("answer", pair=found["pair"]["id"], choice="left", seconds=3.0)
    assert found["progress"] == {"answered": 4, "left": CLIPS * 3 - 4, "seconds": 3 * (CLIPS * 3 - 4)}


def test_videos_are_sent_by_byte_ranges(opened, client, videos):
    page = Page(client)
    name = f"/clip/{clip_of(opened, page, 'c001')}"
    data = (videos.parent / "v1.mp4").read_bytes()
    whole = page.get(name)
    assert whole.content == data and whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["content-type"] == "video/mp4" and int(whole.headers["content-length"]) == len(data)
    for asked, want in (("0-", data), ("0-0", data[:1]), ("100-199", data[100:200]), ("-50", data[-50:]),
                        ("500-99999999", data[500:])):  # fmt: skip
        part = page.get(name, Range=f"bytes={asked}")
        begin = len(data) - 50 if asked == "-50" else int(asked.partition("-")[0])
        assert part.status_code == 206 and part.content == want
        assert part.headers["content-range"] == f"bytes {begin}-{begin + len(want) - 1}/{len(data)}"
    assert page.get(name, Range=f"bytes={len(data)}-").status_code == 416
    for odd in ("bytes=0-1,5-6", "lines=1-2", "bytes=-"):
        assert page.get(name, Range=odd).content == data
    webm = page.get(f"/clip/{clip_of(opened, page, 'c005')}")
    assert webm.headers["content-type"] == "video/webm" and webm.content == (videos.parent / "v5.webm").read_bytes()
    assert page.get("/clip/unknown").status_code == 404


def test_a_clip_has_its_span(opened):
    # Packing may cut the file to the span, or keep it.
    media = opened.clips.media("c003")
    assert media.end - media.start == pytest.approx(1.0, abs=0.11) and not media.encode
    assert opened.clips.media("c001").end == 3.0


def test_what_browsers_cannot_play_is_encoded_once(opened, client, videos, tmp_path):
    media = opened.clips.media("c004")
    assert media.encode and media.kind == "video"
    url = f"/clip/{clip_of(opened, None, 'c004')}/encoded"
    reply = client.get(url)
    assert reply.headers["content-type"] == "video/mp4"
    [kept] = (opened.folder / ".clips").iterdir()
    made = kept.stat().st_mtime_ns
    (tmp_path / "e.mp4").write_bytes(reply.content)
    with av.open(str(tmp_path / "e.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        assert float(container.duration / av.time_base) == pytest.approx(3.0, abs=0.15)
    want, have = decode_all(videos.parent / "v4.avi"), decode_all(tmp_path / "e.mp4")
    assert len(want) == len(have)
    assert max(abs(a.astype(int) - b).mean() for a, b in zip(want, have)) < 12
    assert client.get(url, headers={"Range": "bytes=0-9"}).content == reply.content[:10]
    assert kept.stat().st_mtime_ns == made


def test_a_frames_store_shows_its_frames_and_a_features_store_says_so(shards, runs, tmp_path):
    convert(shards, tmp_path / "frames", store="frames", num_frames=4, image_size=32, workers=1, progress=False)
    opened = open_reviews(tmp_path / "r", runs, data=str(tmp_path / "frames"), choice=ALL)
    client = client_of(opened)
    pair = Page(client).post("next")["pair"]
    assert pair["media"]["kind"] == "frames" and pair["media"]["count"] == 4
    assert client.get(f"/clip/{pair['id']}/3.jpg").content[:3] == b"\xff\xd8\xff"
    assert client.get(f"/clip/{pair['id']}/4.jpg").status_code == 404
    opened.clips.index.store = "features"
    assert Page(client).post("next")["pair"]["media"]["kind"] == "none"


def test_a_shard_that_moved_is_named_and_the_other_clips_are_shown(shards, runs, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    tar = data / "val" / "000001.tar"
    tar.rename(tmp_path / "moved.tar")
    opened = open_reviews(tmp_path / "r", runs, data=str(data), choice=ALL)
    assert len(opened.notes) == 1 and str(tar) in opened.notes[0] and "missing" in opened.notes[0]
    client = client_of(opened)
    gone = client.get(f"/clip/{clip_of(opened, None, 'c005')}")
    assert gone.status_code == 410 and "val/000001.tar" in gone.json()["error"]["en"]
    assert client.get(f"/clip/{clip_of(opened, None, 'c001')}").status_code == 200
    found = Page(client).post("next")
    while found["pair"]["media"]["kind"] != "unreadable":
        found = Page(client).post("answer", pair=found["pair"]["id"], choice="left")
    assert "val/000001.tar" in found["pair"]["media"]["why"]
    assert Page(client).post("skip", pair=found["pair"]["id"])["pair"]


def test_a_token_is_needed_and_becomes_a_cookie(opened):
    client = client_of(opened, host="10.0.0.1", token="secret-token")
    assert client.post("/api/next", json={"reviewer": "민수"}).status_code == 403
    for url in ("/", "/?token=wrong", "/page.js", f"/clip/{opened.plan.pairs[0].pair}"):
        assert client.get(url).status_code == 403
    first = client.get("/?token=secret-token&a=1", follow_redirects=False)
    assert first.status_code == 303 and first.headers["location"] == "/?a=1"
    cookie = first.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert client.get("/").status_code == 200
    assert client.post("/api/next", json={"reviewer": "민수"}).status_code == 200


def test_other_sites_cannot_use_a_local_server(opened):
    client = client_of(opened)
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert (
        client.post("/api/next", content=b'{"reviewer": "a"}', headers={"content-type": "text/plain"}).status_code
        == 415
    )
    page = client.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert page.headers["referrer-policy"] == "no-referrer" and not re.search(r"(?:src|href)=.https?:", page.text)


def test_bad_requests(client):
    for name in ("", "../x", "judge-a", "judge:a"):
        assert Page(client, name).post("next", 422)["error"]["ko"].startswith("이름은")
    page = Page(client)
    pair = page.post("next")["pair"]["id"]
    page.post("answer", 404, pair="unknown", choice="left")
    for bad in ({"choice": "best"}, {"marks": {"left": ["ugly"]}}, {"corrected": {"text": "a", "side": "middle"}},
                {"corrected": {"text": "", "side": "left"}}, {"seconds": -1}):  # fmt: skip
        page.post("answer", 422, **({"pair": pair, "choice": "left"} | bad))
    assert (
        client.post("/api/next", content=b"x" * 200_000, headers={"content-type": "application/json"}).status_code
        == 413
    )


def test_an_answer_that_cannot_be_written_is_refused_and_does_not_count(opened, client, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    page = Page(client)
    pair = page.post("next")["pair"]["id"]
    monkeypatch.setattr(sessions_module, "append_answer", full)
    assert "No space left" in page.post("answer", 507, pair=pair, choice="left")["error"]["en"]
    found = page.post("next")
    assert found["pair"]["id"] == pair and found["progress"]["answered"] == 0


def test_reviews_are_continued_and_other_runs_refused(opened, runs, tmp_path, shards):
    page = Page(client_of(opened))
    page.post("answer", pair=opened.plan.pairs[0].pair, choice="left")
    again = open_reviews(opened.folder)
    assert again.plan == opened.plan == read_plan(opened.folder)
    assert Page(client_of(again)).post("next")["progress"]["answered"] == 1
    assert open_reviews(opened.folder, runs[::-1], choice=ALL).plan == opened.plan
    folders = [run / "evaluation" / "val" for run in runs]  # of evaluations
    assert [run.name for run in open_reviews(tmp_path / "folders", folders).plan.runs] == [*RUNS]
    with pytest.raises(InputError, match="has reviews of other runs"):
        open_reviews(opened.folder, runs[:2])
    with pytest.raises(InputError, match=r"other options \(--pairs 36 --choose random=100% --overlap 0 --seed 0\)"):
        open_reviews(opened.folder, runs, choice=Choice(pairs=5))
    shutil.rmtree(runs[0])
    with pytest.raises(InputError, match="alpha-linear/evaluation/val: missing"):
        open_reviews(opened.folder)
    plant(runs[0], captions_of(9), shards)
    with pytest.raises(InputError, match="was made again after these reviews were planned"):
        open_reviews(opened.folder)


def test_a_file_that_is_cut_in_the_middle_of_a_line_is_continued(opened):
    page = Page(client_of(opened))
    found = page.post("next")
    for _ in range(3):
        found = page.post("answer", pair=found["pair"]["id"], choice="left")
    path = opened.folder / "민수.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    sessions = Sessions(opened)
    assert "last line is cut off" in sessions.warnings[0]
    page = Page(TestClient(make_app(sessions), base_url="http://127.0.0.1"))
    found = page.post("next")
    assert found["progress"]["answered"] == 2
    page.post("answer", pair=found["pair"]["id"], choice="right")
    reviews = read_reviews(opened.folder)
    assert [a.choice for a in reviews.answers] == ["left", "left", "right"] and not reviews.warnings


def test_bad_input(runs, shards, tmp_path):
    out = tmp_path / "r"

    def refused(match, runs, **options):
        with pytest.raises(InputError, match=match):
            open_reviews(out, runs, **options)
        assert not (out / "review.json").exists()

    refused("two evaluated runs or more", runs[:1])
    refused("no such folder", [runs[0], tmp_path / "nowhere"])
    (tmp_path / "trained").mkdir()
    refused("trained: no evaluation; run vlmds evaluate --run", [runs[0], tmp_path / "trained"])
    refused("alpha-linear, .*: have the same captions", [runs[0], runs[0]])
    few = plant(tmp_path / "few", captions_of(5, range(4)), shards)
    other = plant(tmp_path / "other", captions_of(6, range(4, 8)), shards)
    refused(r"no clip was evaluated in all of the runs \(few: 4, other: 4\)", [few, other])
    opened = open_reviews(tmp_path / "some", [runs[0], few])
    assert "not evaluated on the same clips (alpha-linear: 12, few: 4); only the 4 clips" in opened.notes[0]
    text = plant(tmp_path / "text", captions_of(7), shards, references=lambda clip: ["다른 정답"])
    refused("12 of their clips have other references, such as c000", [runs[0], text])
    train = plant(tmp_path / "train", captions_of(8), shards)
    metrics = train / "evaluation" / "val" / "metrics.json"
    metrics.write_text(metrics.read_text().replace('"split": "val"', '"split": "train"'))
    refused("different splits .*train: train", [runs[0], train])
    refused("--stratify colour: no such column .*; it has kind", runs, choice=Choice(stratify="colour"))
    refused("dataset.json", runs, data=str(tmp_path))
    moved = [plant(tmp_path / f"s{i}", captions_of(i), shards, source=lambda clip: "other.mp4") for i in (11, 12)]
    refused("is of v.*, but the runs captioned other.mp4", moved)


def test_captions_are_read_as_by_the_slow_reader_and_damage_is_named(runs, shards, tmp_path):
    folder = plant(tmp_path / "odd", captions_of(3) | {"c001": "줄\u2028바꿈 \"따옴표\" \\n"}, shards, scores=lambda clip: {
        "cider_d@char": float(clip[1:]) / 7}, reference_log_probability=lambda clip: {"real": -1.5, "shuffled": None, "frames_reversed": -2.0}
    ) / "evaluation" / "val"  # fmt: skip
    (metrics, quick), (same, slow) = read_captions(folder), read_evaluation(folder)
    assert metrics == same and len(quick) == len(slow) == CLIPS
    for one, other in zip(quick, slow, strict=True):
        assert all(one[name] == other[name] for name in ("key", "source", "references", "caption"))
        assert blind_score(one) is None is blind_score(other)
    path = folder / "predictions.jsonl"
    data = path.read_bytes()
    for damaged, why in ((data[:-20], "damaged"), (data[: data.index(b"\n") + 1], "has 1 line for 12 clips")):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=why):
            open_reviews(tmp_path / "r", [runs[0], folder])


def test_stratified_and_clips_of_another_dataset(runs, tmp_path, videos, shards):
    opened = open_reviews(tmp_path / "r", runs, choice=Choice(6, {"random": 1.0}, stratify="kind"))
    kinds = [int(pair.clip[1:]) % 2 for pair in opened.plan.pairs]
    assert sorted(kinds) == [0, 0, 0, 1, 1, 1] and opened.plan.choose["stratify"] == "kind"
    rows = videos.read_text("utf-8").splitlines()[:3]
    (videos.parent / "small.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    pack(videos.parent / "small.jsonl", tmp_path / "small", progress=False, workers=1)
    with pytest.raises(InputError, match=r"are not in it, such as c0\d\d; give the dataset that the runs"):
        open_reviews(tmp_path / "other", runs, data=str(tmp_path / "small"))


def test_a_killed_server_loses_nothing(runs, tmp_path):
    """Three reviewers answer as fast as they can; SIGKILL in the middle; all acknowledged answers are there, and the
    next server continues."""
    folder = tmp_path / "reviews"
    server = Server(folder, *map(str, runs), "--pairs", "36", "--overlap", "12", "--choose", "random")
    acknowledged: dict[str, dict[str, str]] = {name: {} for name in ("민수", "지영", "현우")}

    def work(name):
        with httpx.Client(base_url=server.url) as client:
            try:
                found = client.post("/api/next", json={"reviewer": name}).json()
                while found["pair"]:
                    pair, choice = found["pair"]["id"], ("left", "right")[len(acknowledged[name]) % 2]
                    found = client.post("/api/answer", json={"reviewer": name, "pair": pair, "choice": choice}).json()
                    acknowledged[name][pair] = choice
                    if sum(map(len, acknowledged.values())) == 25:
                        os.kill(server.process.pid, signal.SIGKILL)
            except httpx.HTTPError:
                pass

    threads = [threading.Thread(target=work, args=(name,)) for name in acknowledged]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert server.process.wait(30) == -signal.SIGKILL
    server.process.stdout.close()
    reviews = read_reviews(folder)
    written = {name: {a.pair: a.choice for a in reviews.answers if a.reviewer == name} for name in acknowledged}
    for name, answers in acknowledged.items():
        assert answers.items() <= written[name].items()
        assert len(written[name]) <= len(answers) + 1  # one may have been written and not acknowledged
    again = Server(folder)
    try:
        found = httpx.post(f"{again.url}/api/next", json={"reviewer": "민수"}).json()
        assert found["progress"]["answered"] == len(written["민수"]) and found["pair"]
    finally:
        assert again.end() == 0


def test_the_address_has_a_token_where_others_can_reach_it(runs, tmp_path):
    server = Server(tmp_path / "r", *map(str, runs), "--host", "0.0.0.0")
    try:
        port = re.search(r":(\d+)/", server.url)[1]
        token = re.search(r"token=([\w-]{30,})", server.url)[1]
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 403
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", follow_redirects=True) as client:
            assert client.get("/", params={"token": token}).status_code == 200
            assert client.post("/api/next", json={"reviewer": "a"}).json()["pair"]
    finally:
        server.end()


def test_no_model_and_no_pytorch_is_loaded(runs, tmp_path):
    code = (
        "import sys, vlmds.review.app\nfrom pathlib import Path\nfrom vlmds.review.folder import open_reviews\n"
        "open_reviews(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]])\n"
        "print(json.dumps([name for name in ('torch', 'transformers', 'gradio') if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import json\n" + code, str(tmp_path / "r"), *map(str, runs)],
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout) == [], done.stderr
