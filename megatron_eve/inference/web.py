"""The chat as a web page: Gradio on the loopback address, without requests to other hosts.

The page is restricted: its content security policy limits the browser to this host, other host names are rejected,
analytics and sharing are off, upload sizes are limited, and all text is shown as plain text.
"""

from __future__ import annotations

import html
import itertools
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import gradio
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from megatron_eve.inference.chat import HOST, Limits, Refused, Request, RequestQueue
from megatron_eve.inference.conversation import Conversation, PageTurn
from megatron_eve.inference.engine import DrawingStep, Engine
from megatron_eve.inference.sampling import DRAWING, GREEDY, Sampling

_HEADERS = {
    # Gradio's own page has scripts and styles in it, and compiles some.
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; "
    "form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

# Asked where one or several pictures come without a question.
_PICTURE_ALONE = {1: "Describe the picture.", 2: "Describe the pictures."}

# The buttons beside a picture share it; it is shown small, so that the answers are in sight.
_STYLE = """
.heading h1 { font-size: 1.25rem; font-weight: 600; margin: 0; overflow-wrap: anywhere }
.heading p { margin: 0; opacity: 0.75 }
.message-content { white-space: pre-wrap }
.message-buttons { display: none }
[data-testid=user] .image-container img { max-height: 15rem; width: auto }
[data-testid=bot] .image-container img { max-height: 20rem; width: auto }
.bot.message:has(> .component) { display: flex; flex-wrap: wrap; align-items: flex-start }
.bot.message > .component { width: auto; margin-top: 0 }
"""


class ChatPage:
    """Takes questions on the loopback address and passes them to the thread that owns the engine.

    Args:
        limits: for one user.
        name: of the model, for the page.
        port: 0 takes a free one.
        family: of the model, as its title stands in messages (`HFFormat.title`).
        sampling: what the page's controls show at first. Its seed is that of the first question; each one after it
            has the next.
        guidance: of drawings, likewise; None for a model that draws no pictures, whose page says nothing of them.

    Raises:
        OSError: the port is taken.
    """

    def __init__(
        self,
        limits: Limits,
        name: str,
        port: int,
        family: str = "",
        sampling: Sampling = GREEDY,
        guidance: float | None = None,
    ) -> None:
        self.requests, self.limits, self.name, self.family = RequestQueue(), limits, name, family
        self._guidance, self._pictures = guidance, itertools.count()
        self._sampling, self._seeds = sampling, itertools.count(sampling.seed)
        self._loaded = threading.Event()
        self._files = tempfile.TemporaryDirectory(prefix="chat_")
        self._pending: dict[str | None, Request] = {}  # by the browser's session
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=self._files.name)
        self._interface = self._make()
        # One question is answered at a time; this many more may wait.
        self._interface.queue(max_size=limits.waiting, default_concurrency_limit=1, api_open=False)
        _, self.url, _ = self._interface.launch(
            server_name=HOST,
            server_port=port or None,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=limits.upload_bytes,
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            theme=_theme(),
            css=_STYLE,
            app_kwargs={
                "middleware": _middleware(),
                "docs_url": None,
                "redoc_url": None,
                "openapi_url": None,
            },
        )

    def _make(self) -> gradio.Blocks:
        with gradio.Blocks(title="Ask about a picture", analytics_enabled=False, fill_height=True) as page:
            conversation = gradio.State(Conversation())
            gradio.HTML(_heading(self.name, self.family), padding=False)
            draws = self._guidance is not None
            chat = gradio.Chatbot(
                show_label=False,
                placeholder="Add a picture below, and ask. A picture alone is described."
                + (" Draw makes a picture of the text in the box." if draws else ""),
                render_markdown=False,  # show text as it is, never as HTML
                buttons=[],
                scale=1,
            )
            question = gradio.MultimodalTextbox(
                placeholder="Ask about a picture, or say what to draw" if draws else "Ask about a picture",
                file_types=["image"],
                file_count="multiple",
                sources=["upload"],
                max_plain_text_length=self.limits.characters,
                show_label=False,
                stop_btn=True,
            )
            with gradio.Row():
                draw = gradio.Button("Draw", size="sm", variant="primary", min_width=120, visible=draws)
                again = gradio.Button("Ask again", size="sm", interactive=False, min_width=120)
                new = gradio.Button("New conversation", size="sm", min_width=120)
            with gradio.Accordion("Sampling", open=not self._sampling.greedy), gradio.Row():
                temperature = gradio.Slider(
                    0.0, max(2.0, self._sampling.temperature), self._sampling.temperature, step=0.05,
                    label="Temperature",
                    info="0 takes the most likely words: the same question gets the same answer.",
                )  # fmt: skip
                top_p = gradio.Slider(
                    min(0.05, self._sampling.top_p), 1.0, self._sampling.top_p, step=0.05, label="Top-p",
                    info="Draws from the most likely words whose probabilities add up to this.",
                )  # fmt: skip
            with gradio.Accordion("Drawing", open=False, visible=draws), gradio.Row():
                guidance = gradio.Slider(
                    0.0, max(10.0, self._guidance or 0.0), self._guidance or 0.0, step=0.5, label="Guidance",
                    info="How far the text counts: 1 is without guidance, 0 without the text.",
                )  # fmt: skip
                count = gradio.Slider(
                    1, self.limits.drawn, 1, step=1, label="Pictures", info="Drawn of one text, at once.",
                )  # fmt: skip
            shown, words = [question, chat, conversation, again], [temperature, top_p]
            drawing = [guidance, count]
            asking: list[Any] = [
                event(
                    work,
                    inputs,
                    shown,
                    concurrency_limit=1,
                    concurrency_id="asking",
                    api_visibility="private",
                )
                for event, work, inputs in (
                    (question.submit, self._answer, [question, conversation, *words]),
                    (again.click, self._ask_again, [conversation, *words, *drawing]),
                    (draw.click, self._draw, [question, conversation, *drawing]),
                )
            ]
            # Not in the queue, which may be full.
            question.stop(
                self._stop,
                conversation,
                [question, again],
                cancels=asking,
                queue=False,
                api_visibility="private",
            )
            gradio.on(
                [new.click, chat.clear],
                self._begin_anew,
                None,
                shown,
                cancels=asking,
                queue=False,
                api_visibility="private",
            )
            page.unload(self._leave)
        return page

    def serve_questions(self, engine: Engine) -> None:
        """Answer in this thread, which owns the engine, until `stop`; Gradio's threads have the page."""
        self._loaded.set()
        self.requests.serve(engine, self.limits)

    def stop(self) -> None:
        """Have `serve_questions` return after the question that it is answering."""
        self.requests.close()

    def __enter__(self) -> ChatPage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interface.close(verbose=False)
        self._files.cleanup()

    def _leave(self, request: gradio.Request) -> None:
        """Cancel this session's answer. Gradio itself would let the generator run on."""
        if pending := self._pending.pop(request.session_hash, None):
            pending.cancelled.set()

    def _stop(self, before: Conversation, request: gradio.Request) -> tuple[Any, ...]:
        self._leave(request)
        return gradio.MultimodalTextbox(interactive=True), _again(before)

    def _begin_anew(self, request: gradio.Request) -> tuple[Any, ...]:
        box, again = self._stop(Conversation(), request)
        return box, [], Conversation(), again

    def _answer(
        self,
        message: dict[str, Any],
        before: Conversation,
        temperature: float,
        top_p: float,
        request: gradio.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """What Gradio calls for a question; yields the values of the page's parts, each time that they change."""
        files = tuple(message["files"])
        text = message["text"].strip() or (_PICTURE_ALONE[min(len(files), 2)] if files else "")
        if not text:  # nothing was asked
            yield gradio.MultimodalTextbox(interactive=True), before.messages(), before, _again(before)
            return
        sampling = replace(self._sampling, temperature=temperature, top_p=top_p)
        yield from self._ask(PageTurn(text, files), before, sampling, request)

    def _draw(
        self,
        message: dict[str, Any],
        before: Conversation,
        guidance: float,
        count: float,
        request: gradio.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """What Gradio calls to have pictures drawn of the text in the box."""
        text, files = message["text"].strip(), tuple(message["files"])
        if not text or self._guidance is None:  # there is nothing to draw, or no button that asks for it
            yield gradio.MultimodalTextbox(interactive=True), before.messages(), before, _again(before)
            return
        yield from self._ask(_to_draw(PageTurn(text, files), guidance, count), before, DRAWING, request)

    def _ask_again(
        self,
        before: Conversation,
        temperature: float,
        top_p: float,
        guidance: float,
        count: float,
        request: gradio.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """What Gradio calls to have the last question answered, or the last text drawn, anew, in the same place."""
        if not before.turns:
            return
        *earlier, last = before.turns
        asked, sampling = last.anew(), replace(self._sampling, temperature=temperature, top_p=top_p)
        if asked.draws:
            asked, sampling = _to_draw(asked, guidance, count), DRAWING
        yield from self._ask(asked, Conversation(tuple(earlier)), sampling, request)

    def _ask(
        self, asked: PageTurn, before: Conversation, sampling: Sampling, request: gradio.Request
    ) -> Iterator[tuple[Any, ...]]:
        """The box, the messages, the conversation and the button that asks again, each time that they change."""
        empty, waits = gradio.MultimodalTextbox(value=None, interactive=False), _again(Conversation())
        asked = replace(asked, loading=not self._loaded.is_set())
        yield empty, before.messages(asked), before, waits
        asked = replace(asked, loading=False)
        pending = None
        try:
            sampling = replace(sampling, seed=next(self._seeds))
            if problem := sampling.problem():
                raise Refused(problem)
            query = before.asked(asked, self.limits)
            query.check(self.limits)
            pending = self._pending[request.session_hash] = self.requests.submit(query, sampling)
            for piece in pending.pieces():
                before_it, asked = asked, self._with_piece(asked, piece)
                if asked == before_it:  # of many steps of a drawing, those that change what is shown
                    continue
                yield empty, before.messages(asked), before.after(asked), waits
            box = gradio.MultimodalTextbox(interactive=True)
        except Refused as error:
            asked = replace(asked, refusal=str(error))
            box = gradio.MultimodalTextbox(value={"text": asked.question, "files": []}, interactive=True)
        finally:
            # Gradio may close this long after a stop, when the session's request is that of the next question.
            if pending is not None and self._pending.get(request.session_hash) is pending:
                self._leave(request)
        yield box, before.messages(asked), before.after(asked), _again(before.after(asked))

    def _with_piece(self, asked: PageTurn, piece: str | DrawingStep) -> PageTurn:
        """A turn with more of its answer, or of its drawing."""
        if isinstance(piece, str):
            return replace(asked, answer=(asked.answer or "") + piece)
        if piece.pictures is None:
            return replace(asked, progress=f"Drawing: {100 * piece.done // piece.total} %")
        paths = []
        for picture in piece.pictures:
            paths.append(str(Path(self._files.name, f"drawn_{next(self._pictures)}.png")))
            Image.fromarray(picture).save(paths[-1])
        return replace(asked, drawn=tuple(paths))


def _to_draw(turn: PageTurn, guidance: float, count: float) -> PageTurn:
    """A turn that draws, as the page's controls say; what they cannot be is refused later."""
    return replace(turn, draws=True, count=int(count), guidance=float(guidance))


def _again(conversation: Conversation) -> gradio.Button:
    """The button that asks the last question again, which may be pressed once there is one."""
    return gradio.Button(interactive=bool(conversation.turns))


def _heading(name: str, family: str) -> str:
    """The page's label, as HTML: which model answers, and where."""
    kind = f"{html.escape(family)}, on this machine" if family else "On this machine"
    return f'<div class="heading"><h1>{html.escape(name)}</h1><p>{kind}; nothing is sent elsewhere.</p></div>'


def _theme() -> gradio.Theme:
    """Gradio's, with fonts that are here."""
    return gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def _middleware() -> list[Any]:
    """Adds headers to every response, and rejects other host names (which another site's page could use)."""
    return [
        Middleware(_HeaderMiddleware),
        Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
    ]


class _HeaderMiddleware:
    """Adds `_HEADERS` to every response."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        await self._app(scope, receive, send_with)
