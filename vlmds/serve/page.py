"""Web page of `vlmds serve`: upload a video, see the sampled frames and the captions of all models."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI

from vlmds.errors import SampleError
from vlmds.inference.options import GenerationOptions
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.serve.korean import in_korean
from vlmds.serve.loaded import Busy, Models, RequestError
from vlmds.video.jpeg import data_uri
from vlmds.video.sampling import sample_times

TEXTS = {
    "en": {
        "title": "# Caption a video",
        "video": "Video",
        "runs": "Models",
        "prompt": "Prompt",
        "options": "Options",
        "tokens": "Maximum tokens",
        "temperature": "Temperature (0: greedy decoding)",
        "go": "Generate captions",
        "stop": "Stop",
        "frames": "frames that the model gets",
        "none": "Choose a video first.",
        "no_run": "Choose at least one model.",
        "stopped": "Stopped.",
        "reading": "Reading the video…",
        "waiting": "{name}: waiting for the first token…",
        "writing": "{name}: generating…",
        "done": "Done in {seconds:.1f} s.",
        "bad": "This video cannot be captioned: {why}",
        "busy": "Too many requests are waiting. Try again in a moment.",
        "bug": "An error occurred on the server; its log has the details. Try again.",
    },
    "ko": {
        "title": "# 영상 캡션",
        "video": "영상",
        "runs": "모델",
        "prompt": "프롬프트",
        "options": "옵션",
        "tokens": "최대 토큰 수",
        "temperature": "온도 (0: 그리디 디코딩)",
        "go": "캡션 생성",
        "stop": "중지",
        "frames": "모델에 입력된 프레임",
        "none": "먼저 영상을 선택하세요.",
        "no_run": "모델을 하나 이상 선택하세요.",
        "stopped": "중지했습니다.",
        "reading": "영상 읽는 중…",
        "waiting": "{name}: 첫 토큰 대기 중…",
        "writing": "{name}: 생성 중…",
        "done": "완료 ({seconds:.1f}초)",
        "bad": "이 영상의 캡션을 생성할 수 없습니다: {why}",
        "busy": "대기 중인 요청이 너무 많습니다. 잠시 후 다시 시도하세요.",
        "bug": "서버에서 오류가 발생했습니다. 자세한 내용은 서버 로그에 있습니다. 다시 시도하세요.",
    },
}

# The video's trimming tool is hidden, because it loads code from elsewhere.
CSS = """
.vlmds-title h1 { font-size: 22px; font-weight: 600; }
#video [aria-label="Trim video to selection"], #video [aria-label="Reset video to initial value"] {
  display: none; }
.vlmds-frames { display: grid; gap: 8px;
                grid-template-columns: repeat(var(--row), minmax(0, 160px)); }
@media (max-width: 700px) { .vlmds-frames { grid-template-columns: repeat(4, minmax(0, 1fr)); } }
.vlmds-frames figure { margin: 0; }
.vlmds-frames img { width: 100%; display: block; border-radius: 6px; }
.vlmds-frames figcaption, .vlmds-about { font-size: 12px; opacity: .75; margin-top: 2px; }
.vlmds-about { margin: 8px 0 6px; }
.vlmds-state.bad { border-left: 4px solid #dc2626; padding: 8px 12px; border-radius: 4px;
                   background: rgba(220, 38, 38, .12); }
"""


# The prefix avoids the names of Gradio's own texts.
TRANSLATIONS = gr.I18n(
    **{language: {f"vlmds_{name}": text for name, text in texts.items()} for language, texts in TEXTS.items()}
)


def add_page(app: FastAPI, models: Models) -> FastAPI:
    """Mount the page at the root."""
    page = _Page(models)
    return gr.mount_gradio_app(
        app,
        page.blocks,
        "/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=models.limits.bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        i18n=TRANSLATIONS,
        css=CSS,
        theme=_theme(),
    )


def _theme() -> gr.themes.Base:
    """Installed fonts only: the page loads nothing from elsewhere. The default orange of the primary
    button has a contrast of 2.8 with its white text; these have at least 5."""
    fill = {
        f"button_primary_background_fill{state}{mode}": shade
        for mode in ("", "_dark")
        for state, shade in (("", "*primary_700"), ("_hover", "*primary_800"))
    }
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(**fill)


class _Page:
    def __init__(self, models: Models):
        self.models = models
        default = models.get(None)
        several = len(models.names) > 1
        # Files that were uploaded are deleted when they are ten minutes old.
        with gr.Blocks(title="vlmds", analytics_enabled=False, delete_cache=(60, 600)) as blocks:
            gr.Markdown(_text("title"), elem_classes="vlmds-title")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    video = gr.Video(label=_text("video"), sources=["upload"], height=280, elem_id="video", buttons=[])
                    runs = gr.CheckboxGroup(
                        models.names, value=models.names, label=_text("runs"), elem_id="runs", visible=several
                    )
                    prompt = gr.Textbox(
                        label=_text("prompt"),
                        placeholder=default.builder.prompt,
                        lines=2,
                        max_length=models.limits.prompt,
                        elem_id="prompt",
                    )
                    with gr.Accordion(_text("options"), open=False):
                        tokens = gr.Slider(
                            1,
                            models.limits.tokens,
                            value=GenerationOptions.max_new_tokens,
                            step=1,
                            label=_text("tokens"),
                            elem_id="tokens",
                        )
                        temperature = gr.Slider(0, 2, value=0, step=0.1, label=_text("temperature"))
                    with gr.Row():
                        go = gr.Button(_text("go"), variant="primary", elem_id="go")
                        stop = gr.Button(_text("stop"), elem_id="stop")
                with gr.Column(scale=5, min_width=300):
                    self.state = gr.HTML(elem_id="state", padding=False)
                    self.frames = gr.HTML(elem_id="frames", padding=False)
                    with gr.Row():
                        self.captions = [
                            gr.Textbox(
                                label=name,
                                lines=4,
                                max_lines=16,
                                interactive=False,
                                buttons=["copy"],
                                min_width=260,
                                elem_classes="vlmds-caption",
                            )
                            for name in models.names
                        ]
            start = go.click(
                self.caption,
                [video, runs, prompt, tokens, temperature],
                [self.state, self.frames, *self.captions],
                show_progress="hidden",
                scroll_to_output=True,
                concurrency_limit=4,
                api_visibility="private",
            )
            stopped = stop.click(None, cancels=[start], api_visibility="private")
            stopped.then(self.stop, None, self.state, queue=False, api_visibility="private")
            video.clear(
                self.clear,
                None,
                [self.state, self.frames, *self.captions],
                cancels=[start],
                queue=False,
                api_visibility="private",
            )
        for block in blocks.blocks.values():
            _take_uploads_only(block)
        self.blocks = blocks.queue(max_size=16)

    def stop(self, request: gr.Request) -> str:
        return _state(TEXTS[_language(request)]["stopped"])

    def clear(self) -> list[str]:
        return ["", "", *("" for _ in self.captions)]

    def caption(
        self,
        video: str | None,
        runs: Sequence[str],
        prompt: str,
        tokens: float,
        temperature: float,
        request: gr.Request,
    ) -> Iterator[dict[Any, str]]:
        """Updates of the page, as they come."""
        text = TEXTS[_language(request)]
        cleared: dict[Any, str] = dict.fromkeys([self.frames, *self.captions], "")
        if not video:
            yield {self.state: _state(text["none"], bad=True)}
            return
        if not runs:
            yield {self.state: _state(text["no_run"], bad=True)}
            return
        yield {self.state: _state(text["reading"]), **cleared}
        begin = time.monotonic()
        try:
            asked, options = self.models.options(prompt, max_new_tokens=int(tokens), temperature=float(temperature))
            yield from self._write(Path(video), runs, asked, options, text)
        except (SampleError, RequestError) as error:
            why = in_korean(str(error)) if text is TEXTS["ko"] else str(error)
            yield {self.state: _state(text["bad"].format(why=why), bad=True)}
        except Busy:
            yield {self.state: _state(text["busy"], bad=True)}
        except Exception:  # details go to the log only
            logging.getLogger("uvicorn.error").exception("while captioning a video")
            yield {self.state: _state(text["bug"], bad=True)}
        else:
            yield {self.state: _state(text["done"].format(seconds=time.monotonic() - begin))}

    def _write(
        self, video: Path, runs: Sequence[str], prompt: str | None, options, text: dict[str, str]
    ) -> Iterator[dict[Any, str]]:
        facts = self.models.facts(video)
        chosen = {name: self.models.get(name) for name in self.models.names if name in runs}
        seen: dict[tuple[int, int], np.ndarray] = {}  # models that take the same frames share them
        strips: dict[tuple[int, int], list[str]] = {}
        for name, captioner in chosen.items():
            form = _form(captioner)
            if form not in seen:
                seen[form] = self.models.frames(video, captioner)
            strips.setdefault(form, []).append(name)
        yield {
            self.frames: "".join(
                _strip(seen[form], facts, names if len(strips) > 1 else [], text["frames"])
                for form, names in strips.items()
            )
        }
        for box, name in zip(self.captions, self.models.names):
            if name not in chosen:
                continue
            yield {self.state: _state(text["waiting"].format(name=name))}
            captioner, written = chosen[name], ""
            with closing(self.models.stream(captioner, seen[_form(captioner)], prompt, options)) as pieces:
                for piece in pieces:
                    written += piece
                    state = "writing" if written else "waiting"
                    yield {self.state: _state(text[state].format(name=name)), box: written.lstrip()}
            yield {box: written.strip()}


def _take_uploads_only(block: gr.blocks.Block) -> None:
    """Refuse files other than uploads. Otherwise a mounted page reads any path and fetches any URL that
    a request puts in the place of an upload."""
    folder, move = Path(block.GRADIO_CACHE).resolve(), block.async_move_resource_to_block_cache

    async def guarded(path: str | Path | None) -> str | None:
        if path is not None and not Path(path).resolve().is_relative_to(folder):
            raise gr.Error("uploads only", print_exception=False)
        return await move(path)

    block.async_move_resource_to_block_cache = guarded  # type: ignore[assignment, method-assign]  # no other hook


def _text(name: str):
    return TRANSLATIONS(f"vlmds_{name}")


def _form(captioner: VideoCaptioner) -> tuple[int, int]:
    return captioner.experiment.data.num_frames, captioner.model.image_size


def _language(request: gr.Request) -> str:
    """The browser's first language, as for the rest of the page: Korean or English."""
    return "ko" if request.headers.get("accept-language", "").lower().startswith("ko") else "en"


def _state(message: str, bad: bool = False) -> str:
    role, kind = ("alert", " bad") if bad else ("status", "")
    return f'<div class="vlmds-state{kind}" role="{role}">{escape(message)}</div>'


def _strip(frames: np.ndarray, facts: dict[str, Any], names: Sequence[str], what: str) -> str:
    """HTML of the frames with their times. frames: uint8 [F, 3, S, S]."""
    about = (
        f"{facts['width']} × {facts['height']}, {facts['duration']:,.1f} s, {facts['fps']:.4g} fps, {facts['codec']}"
    )
    head = f"{len(frames)} × {frames.shape[-1]} px: {what}"
    if names:
        head += f" ({', '.join(names)})"
    figures = "".join(
        f'<figure><img alt="{time:.1f} s" src="{data_uri(frame)}"><figcaption>{time:.1f} s</figcaption></figure>'
        for frame, time in zip(frames, sample_times(len(frames), 0.0, facts["duration"]))
    )
    return (
        f'<div class="vlmds-about">{escape(about)} · {escape(head)}</div>'
        f'<div class="vlmds-frames" style="--row: {min(len(frames), 8)}">{figures}</div>'
    )
