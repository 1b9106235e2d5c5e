"""`blip2fast demo-page`: in a real browser it shows what the library says; what it refuses."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio
import pytest
from blip2_models import write_run
from browser import Browser, find_browser
from retrieval_models import write_pictures, write_stage1
from small_run import free_port

from blip2fast import Blip2, Blip2Retriever, _imports
from blip2fast.command_line import main
from blip2fast.demo_page import PageModels, PageParts, build_page, serve_page
from blip2fast.frozen.pictures import load_image
from blip2fast.search.attention import draw_attention

WIDTHS = (1200, 390)


@dataclass(frozen=True)
class Served:
    """A page that is being served, and what is behind it."""

    address: str
    models: PageModels
    stage2: Path
    stage1: Path
    photos: Path

    @property
    def writer(self) -> Blip2:
        assert self.models.writer is not None
        return self.models.writer

    @property
    def matcher(self) -> Blip2Retriever:
        assert self.models.matcher is not None
        return self.models.matcher


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page")
    stage2 = write_run(folder / "two", "opt")
    stage1 = write_stage1(folder / "one")
    photos = folder / "photos"
    write_pictures(photos, 4)
    parts = PageParts.check([str(stage1), str(stage2)], photos)
    models = PageModels.load(parts, device="cpu")
    page = build_page(models)
    address = serve_page(page, "127.0.0.1", free_port(), wait=False)
    yield Served(address, models, stage2, stage1, photos)
    page.close()


class Visitor(Browser):
    """Somebody who uses the page."""

    def choose_tab(self, name: str) -> None:
        tabs = "[...document.querySelectorAll('button[role=tab]')]"
        button = f"{tabs}.find(tab => tab.innerText.trim() == '{name}')"
        self.wait(f"{button} != null")
        self.run(f"{button}.click()")

    def write(self, element: str, text: str) -> None:
        box = f"document.querySelector('#{element} textarea')"
        self.wait(f"{box} != null && {box}.offsetParent != null")
        self.run(
            f"{box}.value = {json.dumps(text)}; "
            f"{box}.dispatchEvent(new Event('input', {{bubbles: true}}))"
        )

    def press(self, button: str) -> None:
        at = f"document.querySelector('#{button}')"
        self.wait(f"{at} != null && {at}.offsetParent != null")
        self.run(f"{at}.click()")

    def read(self, element: str) -> str:
        """The text of an output once there is one."""
        return str(self.wait(f"document.querySelector('#{element} textarea').value"))


@pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", WIDTHS)
def test_a_visitor_sees_what_the_models_say(served: Served, tmp_path: Path, width: int) -> None:
    photo = served.photos / "2.png"
    with Visitor(tmp_path / "profile") as visitor:
        visitor.open(served.address, width, 1200)
        visitor.press("caption_button")
        visitor.wait("document.body.innerText.includes('give a picture first')")
        visitor.give_file("#picture input[type=file]", photo)
        visitor.wait("document.querySelector('#picture img')?.naturalWidth == 24")
        visitor.press("caption_button")
        assert visitor.read("caption") == served.writer.caption(photo)
        visitor.screenshot(tmp_path / f"caption_{width}.png")

        visitor.choose_tab("Question")
        visitor.write("question", "what is it ?")
        visitor.press("question_button")
        assert visitor.read("answer") == served.writer.answer(photo, "what is it ?")

        visitor.choose_tab("Search")
        visitor.write("query", "a red ring")
        visitor.press("search_button")
        labels = "[...document.querySelectorAll('#found .caption-label')].map(e => e.innerText)"
        found = visitor.wait(f"{labels}.length == 4 && {labels}")
        hits = served.matcher.search("a red ring", 12)
        assert found == [f"{hit.score:.3f} {hit.key}" for hit in hits]
        visitor.wait("[...document.querySelectorAll('#found img')].every(i => i.naturalWidth)")
        visitor.screenshot(tmp_path / f"search_{width}.png")

        visitor.choose_tab("Attention")
        visitor.write("attention_text", "a red ring")
        visitor.press("look_button")
        want = draw_attention(
            load_image(photo),
            served.matcher.attention(photo, "a red ring"),
            "a red ring",
        )
        drawn = "document.querySelector('#drawing img')"
        visitor.wait(f"{drawn}?.naturalWidth == {want.width}")
        assert visitor.run(f"{drawn}.naturalHeight") == want.height
        visitor.screenshot(tmp_path / f"attention_{width}.png")
        assert visitor.overflow() <= 0
        loaded = visitor.run("performance.getEntriesByType('resource').map(e => e.name)")
        away = [url for url in loaded if not url.startswith((served.address, "data:", "blob:"))]
        assert away == []


def test_a_model_of_stage_2_alone_draws_its_own_attention(served: Served) -> None:
    models = PageModels(PageParts(str(served.stage2), None, None), served.writer, None)
    photo = served.photos / "1.png"
    look = _handlers(models)["attention"]
    want = draw_attention(load_image(photo), served.writer.attention(photo), "for its caption")
    assert look(str(photo), "").tobytes() == want.tobytes()
    assert set(_handlers(models)) == {"caption", "answer", "attention"}


def test_a_model_of_stage_1_alone_searches(served: Served, tmp_path: Path) -> None:
    parts = PageParts(None, str(served.stage1), served.photos)
    models = PageModels(parts, None, served.matcher)
    handlers = _handlers(models)
    assert set(handlers) == {"search", "attention"}
    photo = str(served.photos / "1.png")
    found = handlers["search"](photo, " ", 2, True)
    hits = served.matcher.search(image=photo, k=2)
    assert [label for _, label in found] == [f"{hit.score:.3f} {hit.key}" for hit in hits]
    again = handlers["search"](None, "a red ring", 2, True)
    hits = served.matcher.search("a red ring", 2, rerank=128)
    assert [label for _, label in again] == [f"{hit.score:.3f} {hit.key}" for hit in hits]
    with pytest.raises(gradio.Error, match="the text &#x27;&#x27; is empty"):
        handlers["attention"](photo, "")
    bad = tmp_path / "<b>.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(gradio.Error, match=r"&lt;b&gt;\.png: is not a picture"):
        handlers["attention"](str(bad), "a red ring")


def _handlers(models: PageModels) -> dict[str, Any]:
    """What the page calls, by the name of the endpoint."""
    return {str(each.api_name): each.fn for each in build_page(models).fns.values()}


def test_the_command_serves_until_it_is_stopped(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def visit(page: gradio.Blocks) -> None:
        with urllib.request.urlopen(f"{page.local_url}config") as answer:
            seen.append(json.load(answer))
        page.close()

    monkeypatch.setattr(gradio.Blocks, "block_thread", visit)
    port = free_port()
    main(["demo-page", "--model", str(served.stage1), "--port", str(port), "--device", "cpu"])
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == f"http://127.0.0.1:{port}/"
    assert "Ctrl-C ends it" in said.err
    assert [config["title"] for config in seen] == ["run · blip2fast"]


def test_everything_is_checked_before_a_model_is_loaded(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(PageModels, "load", load)
    one, two = ("--model", str(served.stage1)), ("--model", str(served.stage2))
    (tmp_path / "empty").mkdir()
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = str(taken.getsockname()[1])
    for arguments, message in (
        (["--model", "./no"], "model './no': not found"),
        ([*two, *two], "run and .*run are both of stage 2; give one"),
        ([*two, "--search", str(served.photos)], "photos takes a model of stage 1 too; give a"),
        ([*one, "--search", str(tmp_path / "none")], "none: not a folder"),
        ([*one, "--search", str(tmp_path / "empty")], "empty: no pictures in this folder"),
        ([*one, "--port", port], rf"cannot serve at 127.0.0.1, port {port} \(address already in"),
    ):
        with pytest.raises(SystemExit, match=message) as ended:
            main(["demo-page", *arguments])
        assert "\n" not in str(ended.value.code)
    taken.close()
    found = _imports.find_spec
    monkeypatch.setattr(_imports, "find_spec", lambda n: None if n == "gradio" else found(n))
    with pytest.raises(SystemExit, match=r"needs gradio to serve the demo page, .*pip install"):
        main(["demo-page", *one])


def test_an_index_brings_its_model(served: Served, tmp_path: Path) -> None:
    index = tmp_path / "index"
    served.matcher.index(served.photos, index)
    parts = PageParts.check([str(served.stage2)], index)
    assert parts == PageParts(str(served.stage2), str(served.stage1), index)
