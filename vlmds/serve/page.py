"""Web page of `vlmds serve`: upload a video, see the sampled frames and the captions of all models."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI

from vlmds.errors import SampleError
from vlmds.files import write
from vlmds.inference.options import GenerationOptions
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.serve import html
from vlmds.serve.korean import in_korean
from vlmds.serve.loaded import Busy, Models, RequestError
from vlmds.video.encode import encoded
from vlmds.video.sampling import is_still

TEXTS = {
    "en": {
        "title": "# Caption a video",
        "video": "Video or picture",
        "preview": "Preview",
        "encoding": "This browser cannot play this format. The file is valid; a copy to play is being made…",
        "copy": "A copy without sound, because this browser cannot play the file's format. Captions are of the file itself.",
        "unplayable": "This browser cannot play this format. The file is valid and can be captioned; these are its frames.",
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
        "video": "영상 또는 사진",
        "preview": "미리보기",
        "encoding": "이 브라우저에서 재생할 수 없는 형식입니다. 파일은 정상이며, 재생용 사본을 만드는 중입니다…",
        "copy": "이 브라우저에서 재생할 수 없는 형식이므로 소리가 없는 재생용 사본을 표시합니다. 캡션은 원본 파일로 생성합니다.",
        "unplayable": "이 브라우저에서 재생할 수 없는 형식입니다. 파일은 정상이며 캡션을 생성할 수 있습니다. 아래는 영상의 프레임입니다.",
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

CSS = """
.vlmds-title h1 { font-size: 22px; font-weight: 600; }
.vlmds-preview video, .vlmds-preview > img { width: 100%; max-height: 280px; border-radius: 6px; background: #000; }
.vlmds-preview p { margin: 6px 0; }
/* Korean breaks between words, not inside them. */
.gradio-container, .gradio-container textarea { word-break: keep-all; overflow-wrap: anywhere; }
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
    button has a contrast of 2.8 with its white text, that of soft texts 1.9; these have at least 4.5."""
    fill = {
        f"button_primary_background_fill{state}{mode}": shade
        for mode in ("", "_dark")
        for state, shade in (("", "*primary_700"), ("_hover", "*primary_800"))
    }
    soft = {
        f"{name}{mode}": shade
        for name in ("body_text_color_subdued", "input_placeholder_color")
        for mode, shade in (("", "*neutral_600"), ("_dark", "*neutral_400"))
    }
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(**fill, **soft)


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
                    # Not gr.Video: it reports an error for each valid file that the browser cannot play.
                    video = gr.File(label=_text("video"), height=140, elem_id="video", buttons=[])
                    video.preprocess = _path  # type: ignore[method-assign]  # its own leaves an empty file each time
                    preview = gr.HTML(elem_id="preview", padding=False)
                    encode = gr.Button(elem_id="encode", visible="hidden")  # pressed by the preview's own script
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
                        go = gr.Button(_text("go"), variant="primary", scale=2, elem_id="go")
                        stop = gr.Button(_text("stop"), scale=1, min_width=80, elem_id="stop")
                with gr.Column(scale=5, min_width=300):
                    self.state = gr.HTML(elem_id="state", padding=False)
                    self.frames = gr.HTML(elem_id="frames", padding=False)
                    with gr.Row():
                        self.captions = [
                            gr.Textbox(
                                label=name,
                                lines=4,
                                max_lines=20,  # more would slow the browser down with every token of a long text
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
            previewed = video.upload(
                self.preview, video, preview, show_progress="hidden", concurrency_limit=4, api_visibility="private"
            )
            copied = encode.click(
                self.encode, video, preview, show_progress="hidden", concurrency_limit=1, api_visibility="private"
            )
            video.clear(
                self.clear,
                None,
                [preview, self.state, self.frames, *self.captions],
                cancels=[start, previewed, copied],
                queue=False,
                api_visibility="private",
            )
        for block in blocks.blocks.values():
            _take_uploads_only(block)
        self.blocks = blocks.queue(max_size=16)

    def stop(self, request: gr.Request) -> str:
        return html.state(TEXTS[_language(request)]["stopped"])

    def clear(self) -> list[str]:
        return ["", "", "", *("" for _ in self.captions)]

    def preview(self, video: str | None, request: gr.Request) -> str:
        """HTML of a player of the file; where the browser cannot play it, the page asks for :meth:`encode`."""
        return self._shown(video, request, lambda strip, text: html.player(video or "", "encoding", strip, text))

    def encode(self, video: str | None, request: gr.Request) -> str:
        """HTML of a player of a copy in a format that browsers play, or of frames, if there is no such copy."""

        def shown(strip: str, text: dict[str, str]) -> str:
            copy = Path(str(video)).with_name("vlmds-copy.mp4")
            try:
                if not copy.exists():
                    write(copy, encoded(Path(str(video)).read_bytes(), seconds=self.models.limits.decode_seconds))
                    self.blocks.upload_file_set.add(str(copy))  # deleted with the uploads
            except (SampleError, OSError):
                return html.without_player("unplayable", strip, text)
            return html.player(str(copy), "unplayable", strip, text, note="copy")

        return self._shown(video, request, shown)

    def _shown(self, video: str | None, request: gr.Request, shown: Callable[[str, dict[str, str]], str]) -> str:
        """HTML of the preview area. shown: that of a video, from its frames and the texts."""
        text = TEXTS[_language(request)]
        if not video:
            return ""
        try:
            facts = self.models.facts(Path(video))
            frames = self.models.frames(Path(video), self.models.get(None))
        except SampleError as error:
            return html.state(_bad(error, text), bad=True)
        except Busy:
            return html.state(text["busy"])
        strip = html.strip(frames, facts, [], text["frames"])
        return f'<div class="vlmds-preview">{strip if is_still(facts["frames"]) else shown(strip, text)}</div>'

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
            yield {self.state: html.state(text["none"], bad=True)}
            return
        if not runs:
            yield {self.state: html.state(text["no_run"], bad=True)}
            return
        yield {self.state: html.state(text["reading"]), **cleared}
        begin = time.monotonic()
        try:
            asked, options = self.models.options(prompt, max_new_tokens=int(tokens), temperature=float(temperature))
            yield from self._write(Path(video), runs, asked, options, text)
        except (SampleError, RequestError) as error:
            yield {self.state: html.state(_bad(error, text), bad=True)}
        except Busy:
            yield {self.state: html.state(text["busy"], bad=True)}
        except Exception:  # details go to the log only
            logging.getLogger("uvicorn.error").exception("while captioning a video")
            yield {self.state: html.state(text["bug"], bad=True)}
        else:
            yield {self.state: html.state(text["done"].format(seconds=time.monotonic() - begin))}

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
                html.strip(seen[form], facts, names if len(strips) > 1 else [], text["frames"])
                for form, names in strips.items()
            )
        }
        for box, name in zip(self.captions, self.models.names):
            if name not in chosen:
                continue
            yield {self.state: html.state(text["waiting"].format(name=name))}
            captioner, written = chosen[name], ""
            with closing(self.models.stream(captioner, seen[_form(captioner)], prompt, options)) as pieces:
                for piece in pieces:
                    written += piece
                    state = "writing" if written else "waiting"
                    yield {self.state: html.state(text[state].format(name=name)), box: written.lstrip()}
            yield {box: written.strip()}


def _path(payload: Any) -> str | None:
    return payload and payload.path


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


def _bad(error: Exception, text: dict[str, str]) -> str:
    return text["bad"].format(why=in_korean(str(error)) if text is TEXTS["ko"] else str(error))


def _form(captioner: VideoCaptioner) -> tuple[int, int]:
    return captioner.experiment.data.num_frames, captioner.model.image_size


def _language(request: gr.Request) -> str:
    """The browser's first language, as for the rest of the page: Korean or English."""
    return "ko" if request.headers.get("accept-language", "").lower().startswith("ko") else "en"
