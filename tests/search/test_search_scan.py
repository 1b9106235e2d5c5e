"""The index: bounds that hold, exact results by reading little, files that survive a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from blip2fast.search import index as index_files
from blip2fast.search.coding import Basis, bounds_of_images, bounds_of_texts
from blip2fast.search.index import IndexWriter, Row, SearchIndex
from blip2fast.search.scan import largest, nearest

Q, D = 6, 48
MODEL = {"name": "small", "weights": "0123456789abcdef"}


def _features(count: int, rank: int, seed: int = 0, noise: float = 0.0) -> Tensor:
    """Unit features near a space of `rank` dimensions, as a trained model's are."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank, D, generator=torch.Generator().manual_seed(9))
    centre = 2 * torch.randn(Q, D, generator=torch.Generator().manual_seed(8))
    values = torch.randn(count, Q, rank, generator=draw) @ mix + centre
    values = values + noise * torch.randn(count, Q, D, generator=draw)
    return normalize(values, dim=-1).half()


def _texts(count: int, rank: int) -> Tensor:
    mix = torch.randn(rank, D, generator=torch.Generator().manual_seed(9))
    return normalize(
        torch.randn(count, rank, generator=torch.Generator().manual_seed(5)) @ mix, dim=-1
    )


def _similarity(features: Tensor, texts: Tensor) -> Tensor:
    return torch.einsum("nqd,bd->bnq", features.float(), texts).amax(-1)


@pytest.mark.parametrize("width", [3, 9, 16, 60])
@pytest.mark.parametrize(("rank", "noise"), [(48, 0.0), (7, 0.02)])
def test_no_similarity_exceeds_its_bound(width: int, rank: int, noise: float) -> None:
    features, texts = _features(900, rank, noise=noise), _texts(3, rank)
    basis = Basis.fit(features[:100], width)
    # images unlike the sample: their codes are clipped
    features = torch.cat([features, _features(100, 48, seed=3)])
    codes, losses = basis.encode(features)
    assert codes.shape == (1000, Q, min(width, D + 2))
    coarse, fine = (
        bounds_of_texts(basis, codes, losses, texts, how) - _similarity(features, texts)
        for how in (False, True)
    )
    assert coarse.min() >= 0
    assert fine.min() >= 0
    assert fine.mean() < coarse.mean()
    images = features[[0, 950]].float()
    alike = torch.einsum("nqd,bqd->bn", features.float(), images) / Q
    for how in (False, True):
        assert (bounds_of_images(basis, codes, losses, images, how) - alike).min() >= 0


def test_bounds_are_tight_where_the_axes_hold_the_features() -> None:
    features, texts = _features(900, 7), _texts(3, 7)
    basis = Basis.fit(features, 12)
    codes, losses = basis.encode(features)
    true = _similarity(features, texts)
    gap = bounds_of_texts(basis, codes, losses, texts) - true
    assert gap.max() < 0.1 * true.std()


def test_clipped_features_keep_their_bound() -> None:
    """A part whose features lie outside of the basis's range is bounded by its own losses."""
    draw = torch.Generator().manual_seed(1)
    near = normalize(torch.ones(Q, D) + 0.1 * torch.randn(200, Q, D, generator=draw), dim=-1)
    basis = Basis.fit(near, 8)
    far = normalize(torch.randn(50, Q, D, generator=draw), dim=-1)
    codes, losses = basis.encode(far)
    assert losses[1] > 10 * basis.steps[-1], "coordinates were clipped, beyond what a code says"
    texts = _texts(4, 48)
    assert (bounds_of_texts(basis, codes, losses, texts) >= _similarity(far, texts)).all()


def test_largest_is_topk() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for count in (1, 7, 19, 300, 5000):
        assert torch.equal(values[largest(values, count)], values.topk(count).values)


@pytest.mark.parametrize("slack", [0.0, 0.05, 5.0])
def test_nearest_is_exact_whatever_the_bounds(slack: float) -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(6000, generator=draw)
    bounds = scores + slack * torch.rand(6000, generator=draw)
    read: list[int] = []

    def similarity(rows: Tensor) -> Tensor:
        read.extend(rows.tolist())
        return scores[rows]

    found = nearest(bounds, similarity, 10)
    assert torch.equal(found.similarity, scores.topk(10).values)
    assert torch.equal(scores[found.rows], found.similarity)
    assert found.exact
    assert found.read == len(read) == len(set(read))
    assert found.read < 6000 if slack < 1 else found.read > 1500


def test_candidates_limit_what_is_read_and_exact_is_told() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(6000, generator=draw)
    loose = scores + 5 * torch.rand(6000, generator=draw)
    for limit in (20, 256, 1000):
        found = nearest(loose, lambda rows: scores[rows], 10, limit)
        assert (found.read, found.exact) == (limit, False)
    tight = nearest(scores + 1e-3, lambda rows: scores[rows], 10, 256)
    assert tight.exact
    assert tight.read == 256
    everything = nearest(loose[:100], lambda rows: scores[rows], 10, 1000)
    assert (everything.read, everything.exact) == (100, True)
    assert len(nearest(loose[:3], lambda rows: scores[rows], 10).rows) == 3


def _write(path: Path, features: Tensor, start: int = 0, **more: int) -> SearchIndex:
    with IndexWriter(path, MODEL, Q, D, **more) as writer:
        rows = [
            Row(f"{i}.png", f"/pictures/{i}.png", {"number": i, "who": "zoë"})
            for i in range(start, start + len(features))
        ]
        writer.add(rows, features)
    return SearchIndex(path)


def test_an_index_answers_as_its_features_do(tmp_path: Path) -> None:
    features, texts = _features(700, 7, noise=0.01), _texts(4, 7)
    index = _write(tmp_path / "i", features, part_rows=300, code_width=12)
    assert len(index) == 700
    assert torch.equal(
        index.features(torch.tensor([650, 3, 299, 300])), features[[650, 3, 299, 300]].float()
    )
    assert index.row(650) == Row("650.png", "/pictures/650.png", {"number": 650, "who": "zoë"})
    for found, true in zip(
        index.search_texts(texts, 10), _similarity(features, texts), strict=True
    ):
        assert found.exact
        torch.testing.assert_close(found.similarity, true.topk(10).values, rtol=0, atol=1e-6)
        assert set(found.rows.tolist()) == set(true.topk(10).indices.tolist())
    (alike,) = index.search_images(features[[411]].float(), 3)
    assert alike.exact
    assert alike.rows[0] == 411
    assert alike.similarity[0] == pytest.approx(1, abs=1e-3)


def test_adding_fits_anew_only_when_the_index_doubled(tmp_path: Path) -> None:
    features, texts = _features(1000, 7, noise=0.01), _texts(2, 7)
    path = tmp_path / "i"
    for start, stop, basis in ((0, 300, 1), (300, 500, 1), (500, 700, 2), (700, 1000, 2)):
        index = _write(path, features[start:stop], start, code_width=12)
        assert json.loads((path / "index.json").read_text())["basis"] == basis
        assert len(list(path.glob("part-*/codes-*"))) == len(list(path.glob("part-*")))
        true = _similarity(features[:stop], texts)
        for found, want in zip(index.search_texts(texts, 10), true, strict=True):
            torch.testing.assert_close(found.similarity, want.topk(10).values, rtol=0, atol=1e-6)
    assert index.keys() == {f"{i}.png" for i in range(1000)}
    with (
        IndexWriter(path, MODEL, Q, D) as writer,
        pytest.raises(ValueError, match=r"3\.png' is in"),
    ):
        writer.add([Row("3.png")], features[:1])


def test_a_killed_writer_leaves_what_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is killed, the index answers as before, and the next writer goes on."""
    features, texts = _features(400, 7), _texts(2, 7)
    path = tmp_path / "i"
    index = _write(path, features[:200], code_width=12)
    before = index.search_texts(texts, 5)

    class Killed(Exception):
        pass

    writes = ["flush", "replace_file", "write_through"]
    killed = 0
    for name in writes:
        for after in range(6):
            real, calls = getattr(index_files, name), [0]

            def dying(*given: object, real=real, calls=calls, after=after) -> object:  # type: ignore[no-untyped-def]
                calls[0] += 1
                if calls[0] > after:
                    raise Killed
                return real(*given)

            with monkeypatch.context() as patch:
                patch.setattr(index_files, name, dying)
                writer = IndexWriter(path, MODEL, Q, D)
                try:
                    writer.add([Row(f"{i}.png") for i in range(200, 400)], features[200:])
                    writer.commit()
                except Killed:
                    killed += 1
                writer._lock.release()
            if len(SearchIndex(path)) == 400:
                break  # it lived
            for found, want in zip(SearchIndex(path).search_texts(texts, 5), before, strict=True):
                assert torch.equal(found.rows, want.rows)
        if len(SearchIndex(path)) == 400:
            index = SearchIndex(path)
            break
    assert killed >= 1
    true = _similarity(features, texts)
    for found, want in zip(index.search_texts(texts, 5), true, strict=True):
        torch.testing.assert_close(found.similarity, want.topk(5).values, rtol=0, atol=1e-6)


def test_what_an_index_refuses(tmp_path: Path) -> None:
    features, path = _features(20, 7), tmp_path / "i"
    with pytest.raises(ValueError, match=r"no index at .*; make one with `blip2fast index build`"):
        SearchIndex(path)
    index = _write(path, features)
    for given, message in (
        (lambda: index.search_texts(torch.zeros(1, 3), 5), "holds 6 queries of width 48"),
        (lambda: index.search_texts(torch.zeros(1, D), 0), "k=0: expected at least 1"),
        (lambda: IndexWriter(path, MODEL | {"weights": "ff"}, Q, D), "made by the model 'small'"),
        (lambda: IndexWriter(tmp_path, MODEL, Q, D), "is not empty, and is no index"),
    ):
        with pytest.raises(ValueError, match=message):
            given()
    with IndexWriter(path, MODEL, Q, D) as writer:
        with pytest.raises(ValueError, match="another process is writing it"):
            IndexWriter(path, MODEL, Q, D)
        with pytest.raises(ValueError, match=r"shape \(1, 6, 3\), expected \(1, 6, 48\)"):
            writer.add([Row("x")], torch.zeros(1, Q, 3))
        with pytest.raises(ValueError, match="hold NaN or infinity"):
            writer.add([Row("x")], torch.full((1, Q, D), torch.nan))
    part = path / "part-00000" / "features.safetensors"
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(ValueError, match="it is cut short or mixed up; build the index again"):
        SearchIndex(path)
    (path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged; build the index again"):
        SearchIndex(path)
    (path / "index.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="format 9, but this version reads 1"):
        SearchIndex(path)


def test_an_empty_index_finds_nothing(tmp_path: Path) -> None:
    with IndexWriter(tmp_path / "i", MODEL, Q, D):
        pass
    with pytest.raises(ValueError, match="no index"):
        SearchIndex(tmp_path / "i")
