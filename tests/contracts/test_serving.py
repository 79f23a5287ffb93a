"""Gradio, Starlette: what the page and its limits rely on."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("gradio")

import gradio as gr  # noqa: E402
from gradio import processing_utils  # noqa: E402
from gradio.data_classes import FileData  # noqa: E402
from starlette.applications import Starlette  # noqa: E402
from starlette.middleware.body_limit import RequestBodyLimitMiddleware  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from vlmds.serve.page import _take_uploads_only  # noqa: E402


def test_every_file_that_a_request_names_goes_through_one_method(tmp_path):
    """serve/page._take_uploads_only replaces async_move_resource_to_block_cache, by block.GRADIO_CACHE."""
    with gr.Blocks() as blocks:
        video = gr.Video()
    assert video in blocks.blocks.values() and Path(video.GRADIO_CACHE).is_absolute()
    (tmp_path / "a.mp4").write_bytes(b"x")
    asked = []

    async def move(path):
        asked.append(str(path))
        return str(path)

    video.async_move_resource_to_block_cache = move
    file = FileData(path=str(tmp_path / "a.mp4"), meta={"_type": "gradio.FileData"})
    found = asyncio.run(processing_utils.async_move_files_to_cache(file.model_dump(), video))
    assert asked == [found["path"]] == [str(tmp_path / "a.mp4")]

    del video.async_move_resource_to_block_cache
    _take_uploads_only(video)
    with pytest.raises(gr.Error, match="uploads only"):
        asyncio.run(processing_utils.async_move_files_to_cache(file.model_dump(), video))


def test_private_events_are_no_part_of_the_api():
    """serve/page._Page: api_visibility="private"."""
    with gr.Blocks() as blocks:
        gr.Button().click(lambda: None, api_visibility="private")
    assert blocks.get_api_info()["named_endpoints"] == {}


def test_an_error_of_the_page_may_be_kept_off_the_log():
    assert gr.Error("no", print_exception=False).print_exception is False


def test_a_body_above_the_limit_is_refused():
    """serve/app.PageLimit: starlette.middleware.body_limit."""

    async def length(request):
        return PlainTextResponse(str(len(await request.body())))

    app = Starlette(routes=[Route("/", length, methods=["POST"])])
    client = TestClient(RequestBodyLimitMiddleware(app, max_body_size=10))
    assert client.post("/", content=b"x" * 10).text == "10"
    assert client.post("/", content=b"x" * 11).status_code == 413
