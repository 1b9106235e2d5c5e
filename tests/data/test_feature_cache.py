"""The feature cache: what is read is what was written, and nothing half-written is read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blip2fast.data import feature_cache
from blip2fast.data.feature_cache import FeatureCache

N, S, E = 5, 3, 8


def _features(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, S, E, generator=torch.Generator().manual_seed(seed)) * 3


def _keys() -> list[str]:
    return [f"image-{i}.png" for i in range(N)]


def _write(
    path: Path, dtype: str = "float32", features: torch.Tensor | None = None
) -> FeatureCache:
    features = _features() if features is None else features
    with FeatureCache.create(path, _keys(), S, E, dtype, encoder_id="tiny") as writer:
        writer.write(2, features[2:])
        writer.write(0, features[:2])
    return FeatureCache(path)


def test_float32_returns_the_same_bits(tmp_path: Path) -> None:
    cache = _write(tmp_path / "c")
    assert (cache.num_images, cache.num_tokens, cache.width) == (N, S, E)
    assert (cache.dtype, cache.encoder_id, cache.relative_error) == ("float32", "tiny", 0.0)
    assert cache.keys == _keys()
    assert cache.row("image-3.png") == 3
    assert torch.equal(cache.read([3, 0, 3]), _features()[[3, 0, 3]])
    assert torch.equal(cache.read(torch.tensor([4])), _features()[[4]])
    assert cache.read([]).shape == (0, S, E)


def test_bfloat16_rounds_once(tmp_path: Path) -> None:
    cache = _write(tmp_path / "c", "bfloat16")
    assert torch.equal(cache.read(range(N)), _features().bfloat16().float())
    assert cache.read([0], dtype=torch.bfloat16).dtype == torch.bfloat16
    assert 0 < cache.relative_error < 2**-8


def test_int8_is_within_its_bound_and_states_its_error(tmp_path: Path) -> None:
    features = _features()
    features[1, 1] = 0  # a token of zeros has no scale
    features[2, 0, 0] = 500.0  # an outlier coarsens its own token only
    cache = _write(tmp_path / "c", "int8", features)
    read = cache.read(range(N))
    error = (read - features).abs()
    bound = features.abs().amax(-1, keepdim=True) / 254
    assert bool((error <= bound * 1.0001).all())
    assert torch.equal(read[1, 1], torch.zeros(E))
    measured = error.square().sum().sqrt() / features.square().sum().sqrt()
    assert cache.relative_error == pytest.approx(measured.item(), rel=1e-4)
    assert cache.relative_error > 0


def test_half_written_is_refused_then_resumed(tmp_path: Path) -> None:
    path = tmp_path / "c"
    writer = FeatureCache.create(path, _keys(), S, E)
    writer.write(0, _features()[:2])
    with pytest.raises(ValueError, match=r"3 of 5 rows were never written \(first: row 2"):
        writer.close()
    with pytest.raises(ValueError, match="half-written"):
        FeatureCache(path)
    with pytest.raises(ValueError, match="interrupted write"):
        FeatureCache.create(path, _keys(), S, E)
    with pytest.raises(ValueError, match="encoder_id '', now 'other'"):
        FeatureCache.create(path, _keys(), S, E, encoder_id="other", when_there="resume")
    again = FeatureCache.create(path, _keys(), S, E, when_there="resume")
    assert again.missing_rows == [2, 3, 4]
    again.write(2, _features()[2:])
    again.close()
    assert torch.equal(FeatureCache(path).read(range(N)), _features())
    assert not path.with_name("c.partial").exists()


def test_an_error_while_writing_leaves_no_cache(tmp_path: Path) -> None:
    def fail() -> None:
        with FeatureCache.create(tmp_path / "c", _keys(), S, E) as writer:
            writer.write(0, _features())
            raise KeyError("the encoder failed")

    with pytest.raises(KeyError):
        fail()
    assert not (tmp_path / "c").exists()


def test_existing_is_refused_unless_replaced(tmp_path: Path) -> None:
    _write(tmp_path / "c")
    with pytest.raises(ValueError, match="exists"):
        FeatureCache.create(tmp_path / "c", _keys(), S, E)
    with FeatureCache.create(tmp_path / "c", _keys(), S, E, when_there="replace") as writer:
        writer.write(0, _features(1))
    assert torch.equal(FeatureCache(tmp_path / "c").read([0]), _features(1)[:1])


def test_files_are_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    at_rename: list[set[int]] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def noted_rename(path: Path, target: Path) -> Path:
        at_rename.append(set(flushed))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    _write(tmp_path / "c", "int8")
    (before,) = at_rename
    files = list((tmp_path / "c").iterdir())
    assert {f.name for f in files} == {"features.bin", "keys.json", "manifest.json", "scales.bin"}
    for path in (*files, tmp_path / "c"):
        assert path.stat().st_ino in before, path
    assert flushed[-1] == tmp_path.stat().st_ino  # the new name


def test_a_writer_that_is_killed_while_closing_leaves_a_whole_cache_or_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every change that `close` makes to files: the older cache, the new one, or none."""
    path, moment, found = tmp_path / "c", 0, []
    changes = [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "unlink")]
    changes += [(shutil, "rmtree"), (Path, "write_text")]
    while True:
        moment += 1
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        _write(path)
        writer = FeatureCache.create(path, _keys(), S, E, when_there="replace")
        writer.write(0, _features(1))
        left = moment

        def dies(change: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left <= 0:
                    raise SystemExit("killed")
                return change(*args, **kwargs)

            return counted

        with monkeypatch.context() as patch:
            for owner, name in changes:
                patch.setattr(owner, name, dies(getattr(owner, name)))
            try:
                writer.close()
                break
            except SystemExit:
                pass
        if path.exists():
            found.append(FeatureCache(path).read([0])[0, 0, 0].item())
            assert found[-1] in (_features()[0, 0, 0], _features(1)[0, 0, 0])
        if path.with_name("c.partial").exists():
            shutil.rmtree(path, ignore_errors=True)
            again = FeatureCache.create(path, _keys(), S, E, when_there="resume")
            assert again.missing_rows == []
            again.close()
        assert torch.equal(FeatureCache(path).read(range(N)), _features(1))
    assert len(set(found)) == 2
    assert moment > 10
    assert torch.equal(FeatureCache(path).read(range(N)), _features(1))


def test_cut_or_mixed_files_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "c")
    features = tmp_path / "c" / "features.bin"
    whole = features.read_bytes()
    features.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=f"{len(whole) - 4} bytes.*needs {len(whole)}"):
        FeatureCache(tmp_path / "c")
    features.write_bytes(whole)
    keys = tmp_path / "c" / "keys.json"
    keys.write_text(json.dumps(_keys()[::-1]))
    with pytest.raises(ValueError, match="keys"):
        FeatureCache(tmp_path / "c")
    keys.write_text('["image-0')
    with pytest.raises(ValueError, match="not readable as JSON"):
        FeatureCache(tmp_path / "c")


def test_bad_input_names_the_values(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no feature cache at"):
        FeatureCache(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"'a' comes 2 times"):
        FeatureCache.create(tmp_path / "c", ["a", "b", "a"], S, E)
    with pytest.raises(ValueError, match="keys is empty"):
        FeatureCache.create(tmp_path / "c", [], S, E)
    with pytest.raises(ValueError, match="dtype='float8'"):
        FeatureCache.create(tmp_path / "c", _keys(), S, E, "float8")
    writer = FeatureCache.create(tmp_path / "c", _keys(), S, E)
    with pytest.raises(ValueError, match=r"\(5, 3, 7\), expected \(n, 3, 8\)"):
        writer.write(0, torch.zeros(N, S, E - 1))
    with pytest.raises(ValueError, match=r"rows 4\.\.8 of a cache of 5"):
        writer.write(4, _features())
    with pytest.raises(ValueError, match="NaN"):
        writer.write(0, torch.full((1, S, E), torch.nan))
    writer.write(0, _features())
    writer.close()
    cache = FeatureCache(tmp_path / "c")
    with pytest.raises(ValueError, match=r"'x.png' is not among the 5"):
        cache.row("x.png")
    with pytest.raises(ValueError, match=r"rows 0\.\.5 asked"):
        cache.read([0, 5])


def test_a_disk_without_room_is_an_error_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a bus error in the middle: what is free is looked at, then reserved."""
    named = r"c: 0\.001 MB for 5 images of 3 tokens x 8 in float32, and .* are free on the disk"
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(feature_cache.shutil, "disk_usage", lambda _: usage._replace(free=100))
        with pytest.raises(ValueError, match=named):
            _write(tmp_path / "c")

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(ValueError, match=named):
            _write(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    with FeatureCache.create(tmp_path / "c", _keys(), S, E) as writer:
        reserved = sum(file.stat().st_blocks * 512 for file in writer._partial.iterdir())
        assert reserved >= writer.nbytes
        writer.write(0, _features())


def test_one_process_writes_a_cache(tmp_path: Path) -> None:
    """A second is refused; a lock of a dead process holds nobody up."""
    with FeatureCache.create(tmp_path / "c", _keys(), S, E) as writer:
        assert _in_another_process(tmp_path / "c") == "c: another process is writing it"
        writer.write(0, _features())
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert _in_another_process(tmp_path / "d") == "started"
    assert (tmp_path / "d.lock").exists()
    with FeatureCache.create(tmp_path / "d", _keys(), S, E, when_there="resume") as writer:
        writer.write(0, _features())
    assert len(FeatureCache(tmp_path / "d")) == N


def _in_another_process(path: Path) -> str:
    """Start to write a cache, and die: how far that came."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            FeatureCache.create(path, _keys(), S, E, when_there="replace")
            said = "started"
        except ValueError as error:
            said = str(error).removeprefix(f"{path.parent}/").partition(";")[0]
        os.write(write, said.encode())
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(read, 1000).decode()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("manifest.json", '{"format": FORMAT}'),
        ("manifest.json", "[" * 100_000),
        ("keys.json", "7"),
        ("keys.json", '["a", 1]'),
        ("keys.json", "[" * 100_000),
    ],
    ids=["empty", "deep", "number", "mixed", "deep keys"],
)
def test_json_that_is_not_a_cache_is_one_line(tmp_path: Path, file: str, text: str) -> None:
    _write(tmp_path / "c")
    stated = json.loads((tmp_path / "c" / "manifest.json").read_text())
    (tmp_path / "c" / file).write_text(text.replace("FORMAT", json.dumps(stated["format"])))
    with pytest.raises(ValueError, match="write the cache again") as error:
        FeatureCache(tmp_path / "c")
    assert "\n" not in str(error.value)


def test_an_unknown_dtype_in_the_manifest_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"
    path.write_text(path.read_text().replace('"float32"', '"float7"'))
    with pytest.raises(ValueError, match=r"float7.*write the cache again"):
        FeatureCache(tmp_path / "c")
