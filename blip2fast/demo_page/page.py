"""The demo page: gradio's elements over `Blip2` and `Blip2Retriever`.

One call of a model at a time, in the order of the visitors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

from blip2fast._imports import needs
from blip2fast.demo_page.models import PageModels
from blip2fast.frozen.pictures import load_image
from blip2fast.inference.model import Blip2
from blip2fast.search.attention import draw_attention
from blip2fast.search.retriever import Blip2Retriever

with needs("serve the demo page", "gradio", "PIL"):
    import gradio as gr
    from PIL import Image

# seconds for which visitors' pictures are kept on the disk
_KEPT_S = 3600
# pixels of a picture among those found
_FOUND = 384
# the visitor's own fonts: the page asks no other machine for anything
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
# four tabs beside each other on a phone; small pictures as large as others
_CSS = """
button[role=tab] { padding: 0 .5rem !important; }
#picture img { width: 100%; height: 100%; object-fit: contain; }
"""
_ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}


def build_page(models: PageModels) -> gr.Blocks:
    """The page, with a tab for everything that its models can do.

    Every tab is also an endpoint of gradio's API: `/caption`, `/answer`, `/search`, `/attention`.
    """
    names = [name for name in (models.parts.writer, models.parts.matcher) if name is not None]
    with gr.Blocks(
        title=f"{Path(names[0]).name} · blip2fast",
        analytics_enabled=False,
        delete_cache=(600, _KEPT_S),
    ) as page:
        gr.Markdown("# blip2fast\n" + " and ".join(f"`{name}`" for name in names))
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                picture = gr.Image(
                    label="Picture",
                    type="filepath",
                    image_mode=None,
                    height=340,
                    elem_id="picture",
                )
            with gr.Column(scale=3, min_width=280), gr.Tabs(overflow_behavior="wrap"):
                if models.writer is not None:
                    _caption_tab(models.writer, picture)
                    _question_tab(models.writer, picture)
                if models.matcher is not None and models.parts.pictures is not None:
                    _search_tab(models.matcher, picture)
                _attention_tab(models, picture)
    return page


def serve_page(page: gr.Blocks, host: str, port: int, *, wait: bool = True) -> str:
    """Serve a page.

    Args:
        page: made by `build_page`.
        host, port: where; `0.0.0.0` shows it to the network.
        wait: until it is interrupted; otherwise it ends with `page.close()`.

    Returns:
        Its address.
    """
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        share=False,
        ssr_mode=False,
        quiet=True,
        footer_links=["api"],
        theme=gr.themes.Default(**_FONTS),
        css=_CSS,
    )
    if wait:
        page.block_thread()
    return str(address)


def _caption_tab(model: Blip2, picture: gr.Image) -> None:
    with gr.Tab("Caption", id="caption"):
        many = gr.Slider(1, 5, value=1, step=1, label="Captions")
        button = gr.Button("Describe it", variant="primary", elem_id="caption_button")
        caption = gr.Textbox(label="Caption", lines=2, elem_id="caption")

    @_with_faults
    def describe(path: str | None, count: float) -> str:
        found = model.caption(_read(path), num_captions=int(count))
        return found if isinstance(found, str) else "\n".join(map(str, found))

    button.click(describe, [picture, many], caption, api_name="caption", **_ONE_AT_A_TIME)


def _question_tab(model: Blip2, picture: gr.Image) -> None:
    with gr.Tab("Question", id="question"):
        question = gr.Textbox(label="Question", elem_id="question")
        button = gr.Button("Ask", variant="primary", elem_id="question_button")
        answer = gr.Textbox(label="Answer", elem_id="answer")

    @_with_faults
    def ask(path: str | None, text: str) -> str:
        return str(model.answer(_read(path), text))

    gr.on(
        [button.click, question.submit],
        ask,
        [picture, question],
        answer,
        api_name="answer",
        **_ONE_AT_A_TIME,
    )


def _search_tab(model: Blip2Retriever, picture: gr.Image) -> None:
    with gr.Tab("Search", id="search"):
        query = gr.Textbox(
            label="Text", placeholder="empty: pictures like the one given", elem_id="query"
        )
        with gr.Row():
            count = gr.Slider(1, 48, value=12, step=1, label="Pictures")
            rerank = gr.Checkbox(label="Re-rank by matching (for texts)")
        button = gr.Button("Search", variant="primary", elem_id="search_button")
        found = gr.Gallery(
            show_label=False,
            columns=3,
            height="auto",
            buttons=["fullscreen", "download"],
            interactive=False,
            elem_id="found",
        )

    @_with_faults
    def search(path: str | None, text: str, k: float, again: bool) -> list[tuple[Image.Image, str]]:
        many = int(k)
        if text.strip():
            hits = model.search(text, many, rerank=max(128, many) if again else 0)
        else:
            hits = model.search(k=many, image=_read(path))
        shown = []
        for hit in hits:
            try:
                shown.append((_small(hit.path), f"{hit.score:.3f} {hit.key}"))
            except ValueError as error:  # it has gone since it was indexed
                gr.Warning(escape(str(error)))
        return shown

    gr.on(
        [button.click, query.submit],
        search,
        [picture, query, count, rerank],
        found,
        api_name="search",
        **_ONE_AT_A_TIME,
    )


def _attention_tab(models: PageModels, picture: gr.Image) -> None:
    with gr.Tab("Attention", id="attention"):
        hint = "what the queries see beside the picture"
        if models.writer is not None:
            hint += "; empty: of the caption"
        text = gr.Textbox(
            label="Text",
            placeholder=hint,
            visible=models.matcher is not None,
            elem_id="attention_text",
        )
        button = gr.Button("Draw where each query looks", variant="primary", elem_id="look_button")
        drawing = gr.Image(
            label="Attention",
            show_label=False,
            format="png",
            interactive=False,
            buttons=["fullscreen", "download"],
            elem_id="drawing",
        )

    @_with_faults
    def look(path: str | None, beside: str) -> Image.Image:
        image = _read(path)
        if models.matcher is not None and (beside.strip() or models.writer is None):
            return draw_attention(image, models.matcher.attention(image, beside), beside)
        assert models.writer is not None  # there is one of the two
        return draw_attention(image, models.writer.attention(image), "for its caption")

    gr.on(
        [button.click, text.submit],
        look,
        [picture, text],
        drawing,
        api_name="attention",
        **_ONE_AT_A_TIME,
    )


def _with_faults(function: Callable[..., Any]) -> Callable[..., Any]:
    """Shows the visitor what was wrong with the input."""

    @wraps(function)
    def told(*inputs: Any) -> Any:
        try:
            return function(*inputs)
        except ValueError as error:
            # gradio takes the message for HTML
            raise gr.Error(escape(str(error)), print_exception=False) from error

    return told


def _read(path: str | None) -> Image.Image:
    if not path:
        raise ValueError("give a picture first")
    return load_image(path)


def _small(path: str) -> Image.Image:
    image = load_image(path, least=_FOUND)
    image.thumbnail((_FOUND, _FOUND))
    return image
