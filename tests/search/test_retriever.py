"""`Blip2Retriever`: pictures indexed, found by text and picture, re-ranked, as the model says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from retrieval_models import write_pictures, write_retrieval, write_stage1

from blip2fast import Blip2Retriever
from blip2fast.checkpoints.trained import load_trained
from blip2fast.command_line import main
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.evaluation.retrieval import TokenizedTexts, encode_all, match_logits
from blip2fast.stage1.losses import max_query_similarity
from blip2fast.stage1.model import Blip2Stage1

TEXTS = ["a red ring", "what is the dog on the left ?", "blue cat"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stage1(tmp_path_factory.mktemp("stage1"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_pictures(folder, 6)
    write_pictures(folder / "below", 5, seed=1)
    return folder


@pytest.fixture(scope="module")
def retriever(run: Path) -> Blip2Retriever:
    return Blip2Retriever.from_pretrained(run)


@pytest.fixture(scope="module")
def index(
    retriever: Blip2Retriever, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("index") / "photos.index"
    done = retriever.index(photos, out, batch_size=4, metadata=lambda key: {"long": len(key)})
    assert (done.added, done.there, done.faults) == (11, 0, [])
    return out


def _scores(run: Path, retriever: Blip2Retriever, paths: list[Path]) -> tuple[torch.Tensor, ...]:
    """[I, J] ITC similarities and "match" logits, by the library's evaluation."""
    model = load_trained(run)
    assert isinstance(model, Blip2Stage1)
    tokens = retriever.image_tokens(paths)
    ids, mask = retriever._tokens(TEXTS)
    texts = TokenizedTexts(ids, mask, torch.zeros(len(TEXTS), dtype=torch.long))
    features = encode_all(model, lambda rows: tokens[rows], len(paths), texts)
    count, J = len(paths), len(TEXTS)
    pairs = torch.arange(count).repeat_interleave(J), torch.arange(J).repeat(count)
    match = match_logits(model, lambda rows: tokens[rows], texts, pairs)[:, 1].view(count, J)
    return max_query_similarity(*features), match


def test_search_is_what_evaluation_says(
    run: Path, retriever: Blip2Retriever, photos: Path, index: Path
) -> None:
    paths = sorted(photos.rglob("*.png"))
    similarity, match = _scores(run, retriever, paths)
    retriever.open(index)
    for j, text in enumerate(TEXTS):
        hits = retriever.search(text, k=4)
        order = similarity[:, j].argsort(descending=True)[:4]
        assert hits.exact
        assert [hit.path for hit in hits] == [str(paths[i]) for i in order]
        # the index holds fp16
        found = torch.tensor([hit.similarity for hit in hits])
        torch.testing.assert_close(found, similarity[order, j], rtol=0, atol=2e-3)
        ranked = retriever.search(text, k=4, rerank=11)
        both = similarity[:, j] + match[:, j]
        order = both.argsort(descending=True)[:4]
        assert [hit.path for hit in ranked] == [str(paths[i]) for i in order]
        torch.testing.assert_close(
            torch.tensor([hit.match for hit in ranked]), match[order, j], rtol=1e-4, atol=1e-4
        )
    assert hits[0].metadata == {"long": len(hits[0].key)}
    assert hits[0].key == Path(hits[0].path).relative_to(photos).as_posix()
    torch.testing.assert_close(retriever.similarity(paths, TEXTS), similarity)
    both = retriever.similarity(paths, TEXTS, match=True)
    torch.testing.assert_close(both, similarity + match, rtol=1e-4, atol=1e-4)


def test_a_picture_finds_itself_first(retriever: Blip2Retriever, photos: Path, index: Path) -> None:
    retriever.open(index)
    hits = retriever.search(image=photos / "below" / "3.png", k=2)
    assert hits[0].key == "below/3.png"
    assert hits[0].similarity == pytest.approx(1, abs=2e-3)
    assert hits[1].similarity < hits[0].similarity


def test_a_second_call_adds_what_is_new_and_names_what_is_unreadable(
    retriever: Blip2Retriever, photos: Path, index: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copytree(index, tmp_path / "index")
    write_pictures(tmp_path / "photos" / "new", 2, seed=2)
    (tmp_path / "photos" / "bad.png").write_bytes(b"no picture")
    done = retriever.index(tmp_path / "photos", tmp_path / "index")
    assert (done.added, done.there) == (2, 11)
    assert len(done.faults) == 1
    assert "bad.png: is not a picture" in done.faults[0]
    hits = retriever.search(image=tmp_path / "photos" / "new" / "1.png", k=20)
    assert (hits[0].key, len(hits)) == ("new/1.png", 13)


def test_a_feature_cache_is_indexed_and_reranked(
    retriever: Blip2Retriever, photos: Path, index: Path, tmp_path: Path
) -> None:
    paths = sorted(photos.rglob("*.png"))
    tokens = retriever.image_tokens(paths)
    keys = [path.relative_to(photos).as_posix() for path in paths]
    with FeatureCache.create(tmp_path / "cache", keys, *tokens.shape[1:]) as writer:
        writer.write(0, tokens)
    cache = FeatureCache(tmp_path / "cache")
    assert retriever.index(cache).added == 11
    hits = retriever.search(TEXTS[0], k=3, rerank=11)
    retriever.open(index)
    want = retriever.search(TEXTS[0], k=3, rerank=11)
    assert [hit.key for hit in hits] == [hit.key for hit in want]
    assert hits[0].match == pytest.approx(want[0].match, abs=1e-4)


def test_a_folder_of_transformers_scores_as_transformers_does(tmp_path: Path) -> None:
    from transformers import Blip2ForImageTextRetrieval, BlipImageProcessorPil

    folder = write_retrieval(tmp_path / "model")
    paths = write_pictures(tmp_path / "photos", 3)
    retriever = Blip2Retriever.from_pretrained(folder)
    theirs = Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
    pictures = [Image.open(path).convert("RGB") for path in paths]
    pixels = BlipImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt")
    ids, mask = retriever._tokens(TEXTS)
    with torch.no_grad():
        itc = theirs(pixels["pixel_values"], ids, mask, use_image_text_matching_head=False)
        itm = theirs(pixels["pixel_values"], ids, mask, use_image_text_matching_head=True)
    found = retriever.similarity(paths, TEXTS)
    torch.testing.assert_close(found, itc.logits_per_image, rtol=1e-4, atol=1e-4)
    match = (retriever.similarity(paths, TEXTS, match=True) - found).diagonal()
    torch.testing.assert_close(match, itm.logits_per_image[:, 1], rtol=1e-4, atol=1e-4)


def test_what_the_retriever_refuses(retriever: Blip2Retriever, index: Path, tmp_path: Path) -> None:
    fresh = Blip2Retriever(retriever._matcher)
    with pytest.raises(ValueError, match=r"no index to search: call index\(images\)"):
        fresh.search("a ring")
    fresh.open(index)
    (tmp_path / "empty").mkdir()
    for given, message in (
        (lambda: fresh.search(), "search for a text or for an image"),
        (lambda: fresh.search(" "), "the text ' ' is empty"),
        (lambda: fresh.search("a", 5, rerank=3), "rerank=3: give at least k=5"),
        (lambda: fresh.index(tmp_path / "empty"), "no pictures in this folder"),
        (lambda: fresh.index(tmp_path / "none"), "none: no such file or folder"),
    ):
        with pytest.raises(ValueError, match=message):
            given()
    other = Blip2Retriever.from_pretrained(write_stage1(tmp_path / "other", seed=5))
    with pytest.raises(ValueError, match=r"was made by the model .*: give that model, or build"):
        other.open(index)


def test_the_commands_build_and_query(
    run: Path,
    retriever: Blip2Retriever,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(tmp_path / "i")
    main(["index", "build", str(photos), "--model", str(run), "--out", out])
    assert capsys.readouterr().out == f"{out}: 11 added, 0 there, 0 unreadable\n"
    main(["index", "query", out, TEXTS[0], "-k", "3"])
    lines = capsys.readouterr().out.splitlines()
    retriever.open(out)
    want = [f"{hit.score:.4f}\t{hit.path}" for hit in retriever.search(TEXTS[0], k=3)]
    assert lines == want
    main(["index", "query", out, TEXTS[0], "-k", "3", "--rerank", "--json"])
    assert '"match": ' in capsys.readouterr().out
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as ended:
        main(["index", "build", str(tmp_path / "bad.png"), "--model", str(run), "--out", out])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "0 added, 0 there, 1 unreadable" in said.out
    assert "passed over: image" in said.err
    for arguments, message in (
        (["index", "query", out], "give a text, or --image FILE"),
        (["index", "query", str(tmp_path), "x"], "no index at"),
        (["index", "build", "nowhere", "--model", str(run), "--out", out], "no such file"),
        (["index", "build", str(photos), "--model", "./no", "--out", out], "'./no': not found"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(arguments)


def test_attention_is_drawn_for_every_query(
    run: Path, retriever: Blip2Retriever, photos: Path, tmp_path: Path
) -> None:
    weights = retriever.attention(photos / "0.png", TEXTS[0])
    assert weights.shape == (5, 4, 4)
    assert bool((weights > 0).all())
    assert bool((weights.sum((1, 2)) < 1).all())
    other = retriever.attention(photos / "0.png", TEXTS[1])
    assert (weights - other).abs().max() > 1e-3, "the text matters"
    out = tmp_path / "a.png"
    main(
        [
            *("attention", str(photos / "0.png"), "--text", TEXTS[0]),
            *("--model", str(run), "--out", str(out)),
        ]
    )
    page = Image.open(out)
    assert page.mode == "RGB"
    # seven tiles: the picture, the mean, five queries
    assert page.width >= 4 * 192
    assert len(page.getcolors(1_000_000)) > 500
    with pytest.raises(SystemExit, match=r"a drawing is written as \.png"):
        main(["attention", "x.png", "--text", "a", "--model", str(run), "--out", "a.jpg"])
