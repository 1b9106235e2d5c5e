"""Run folders are portable: frozen models have lasting names, and moved ones can be given."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from blip2_models import pictures, write_run

from blip2fast import Blip2
from blip2fast.checkpoints.trained import (
    load_trained,
    read_description,
    read_parameters,
    save_model,
)
from blip2fast.command_line import main
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
