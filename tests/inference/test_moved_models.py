"""Run folders are portable: frozen models have lasting names, and moved ones can be given."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from blip2_models import pictures, write_run
from retrieval_models import write_pictures, write_stage1

from blip2fast import Blip2
from blip2fast.checkpoints.trained import (
    load_trained,
    read_description,
    read_parameters,
    save_model,
)
from blip2fast.command_line import main
from blip2fast.data.records import CaptionRecord, write_records
from blip2fast.frozen.hub import at_revision, lasting_name

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("made"), "opt").parent


@pytest.fixture
def moved(made: Path, tmp_path: Path) -> Path:
    """A run on another machine, where its frozen models are elsewhere."""
    shutil.copytree(made, tmp_path / "here")
    run, gone = tmp_path / "here" / "run", tmp_path / "gone"
    description = dataclasses.replace(
        read_description(run),
        language_model=str(gone / "language"),
        image_encoder=f"{gone / 'vision'}, block 1",
    )
    save_model(run, read_parameters(run), description)
    return run


def test_a_moved_model_is_named_with_the_remedy(moved: Path, made: Path) -> None:
    flag = r"trained with the language model /.*gone/language, which is not there; .*language_model"
    with pytest.raises(ValueError, match=rf"{flag}=\.\.\., on the command line --language-model"):
        Blip2.from_pretrained(moved)
    with pytest.raises(ValueError, match=flag):
        load_trained(moved)
    language = str(moved.parent / "language")
    blip2 = Blip2.from_pretrained(moved, language_model=language)
    with pytest.raises(ValueError, match=r"gone/vision': not found.*command line --image-encoder"):
        blip2.caption(pictures(1))
    expected = Blip2.from_pretrained(made / "run").caption(pictures(2))
    vision = str(moved.parent / "vision")
    blip2 = Blip2.from_pretrained(moved, language_model=language, image_encoder=vision)
    assert blip2.caption(pictures(2)) == expected


def test_the_command_takes_moved_models(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(1)[0].save(tmp_path / "one.png")
    command = ["caption", str(tmp_path / "one.png"), "--model", str(moved)]
    with pytest.raises(SystemExit, match=r"error: .*--language-model"):
        main(command)
    here = moved.parent
    main([*command, "--language-model", f"{here}/language", "--image-encoder", f"{here}/vision"])
    assert capsys.readouterr().out.startswith(str(tmp_path / "one.png") + "\t")


def test_commands_of_stage1_take_a_moved_encoder(
    made: Path, moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Indices, drawings, and captions that are ranked."""
    stage1 = tmp_path / "stage1"
    run, here = write_stage1(stage1), str(stage1 / "vision")
    gone = f"{tmp_path / 'gone' / 'vision'}, block 1"
    save_model(
        run,
        read_parameters(run),
        dataclasses.replace(read_description(run), image_encoder=gone),
    )
    write_pictures(tmp_path / "photos", 2)
    photo, index = str(tmp_path / "photos" / "0.png"), str(tmp_path / "index")
    drawing = ["attention", photo, "--text", "dog", "--out", str(tmp_path / "a.png")]
    for command in (
        ["index", "build", str(tmp_path / "photos"), "--out", index, "--model", str(run)],
        ["index", "query", index, "--image", photo],
        [*drawing, "--model", str(run)],
    ):
        with pytest.raises(SystemExit, match=r"gone/vision.*not found.*--image-encoder"):
            main(command)
        main([*command, "--image-encoder", here])
    assert (tmp_path / "a.png").exists()
    # capfilt's two models have one image encoder
    write_records(tmp_path / "r.jsonl", [CaptionRecord("0.png", ("a red ring",))])
    where = ["--images", str(tmp_path / "photos"), "--out", str(tmp_path / "captions")]
    command = ["capfilt", str(tmp_path / "r.jsonl"), *where, "--captioner", str(moved)]
    command += ["--ranker", str(run), "--num-captions", "2", "--max-new-tokens", "4"]
    command += ["--min-new-tokens", "1"]
    with pytest.raises(SystemExit, match=r"gone/language.*--language-model"):
        main(command)
    flags = ["--language-model", str(moved.parent / "language"), "--image-encoder", here]
    main([*command, *flags])
    assert f"{tmp_path / 'captions' / 'captions.jsonl'}: of 1 records" in capsys.readouterr().out
    (stage1 / "words").rename(tmp_path / "words")
    with pytest.raises(SystemExit, match=r"the tokenizer .*words, which is not there; put it back"):
        main(["index", "query", index, "--image", photo, "--image-encoder", here])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path) -> Path:
    """The hub's local cache with two revisions of one language model, of which one is current."""
    repository = tmp_path / "hub" / "models--some--language"
    for revision in (OLD, NEW):
        shutil.copytree(made / "language", repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(NEW)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository


def test_names_last(cache: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    assert lasting_name("language") == (str(made / "language"), None)
    assert lasting_name("some/language") == ("some/language", NEW)
    assert lasting_name("some/other") == ("some/other", None)
    assert at_revision("some/language", OLD) == str(cache / "snapshots" / OLD)
    assert at_revision("some/language", None) == "some/language"
    assert at_revision(str(made), OLD) == str(made)
    with pytest.raises(ValueError, match=f"some/language at revision {'c' * 40}.*not found"):
        at_revision("some/language", "c" * 40)


def test_a_model_of_the_hub_is_loaded_as_it_was(cache: Path, made: Path, tmp_path: Path) -> None:
    """The newest revision is another model, or broken; the run's own is loaded."""
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    description = dataclasses.replace(
        read_description(run), language_model="some/language", revisions={"language_model": OLD}
    )
    save_model(run, read_parameters(run), description)
    (cache / "snapshots" / NEW / "model.safetensors").unlink()
    expected = Blip2.from_pretrained(made / "run").caption(pictures(2))
    assert Blip2.from_pretrained(run).caption(pictures(2)) == expected
