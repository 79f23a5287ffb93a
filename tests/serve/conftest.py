"""Fixtures: a server in a thread, with two tiny runs whose captions are known."""

import threading
from dataclasses import dataclass

import pytest

from tests import tiny
from tests.clips import write_video
from vlmds.video.pool import decode_videos

LIMIT = 8.0  # megabytes


@dataclass
class Served:
    url: str
    models: "object"
    folder: "object"
    page: "object"


SAYINGS = {"e3": "빨간 원이 왼쪽으로 움직입니다", "e7": "파란 별이 오른쪽으로 움직입니다"}
"""What the runs say to the clip, and then go on for ever."""


@pytest.fixture(scope="session")
def served_runs(clip, tmp_path_factory):
    """Folders of two runs."""
    root = tmp_path_factory.mktemp("serve")
    models = tiny.make_models(root / "models", speaking=True)
    (frames,) = decode_videos([str(clip)], tiny.FRAMES, tiny.SIDE, workers=1)
    for exp, text in SAYINGS.items():
        tiny.make_speaker(models, root / exp, exp, [(frames, None, text)])
    return root / "e3", root / "e7"


@pytest.fixture(scope="session")
def server(served_runs, tmp_path_factory):
    import uvicorn

    from vlmds.serve.app import make_app
    from vlmds.serve.limits import Limits
    from vlmds.serve.listening import listen
    from vlmds.serve.loaded import Models

    models = Models.load(
        served_runs, Limits(megabytes=LIMIT, seconds=60.0, tokens=100_000, decode_seconds=120.0), device="cpu"
    )
    folder = tmp_path_factory.mktemp("uploads")
    listening = listen("127.0.0.1", 0)
    app = make_app(models, folder)
    page = app.routes[-1].app.get_blocks()
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", models, folder, page)
    server.should_exit = True
    thread.join()
    listening.close()


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=20)
