"""The command `blip2fast` as a whole; what each command does is tested in its room."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from small_run import values, write_world
from tqdm import tqdm

from blip2fast import __version__
from blip2fast.command_line import machine, main, options, records, runs, scores
from blip2fast.command_line.application import app
from blip2fast.training.config_files import SHIPPED, load_config

ROOT = Path(__file__).parents[2]


def commands() -> list[list[str]]:
    def below(command: Any, words: list[str]) -> list[list[str]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            return [words]
        return [each for name in inner for each in below(inner[name], [*words, name])]

    return below(typer.main.get_command(app), [])


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_says_what_it_does_with_an_example(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    assert re.search(rf"Example: blip2fast {' '.join(words)}\b", command.help)
    assert all(each.help or each.show_default for each in command.params), words


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    said = capsys.readouterr().out
    assert {words[0] for words in commands()} <= set(said.split())
    main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"
    main(["features", "--help"])
    assert "--encoder" in capsys.readouterr().out
    main(["train", "--help"])
    assert "usage: blip2fast train" in capsys.readouterr().out


def run_quietly(line: str) -> subprocess.CompletedProcess[str]:
    """Run Python code after `main` is imported; it fails if torch or transformers is too."""
    program = [
        "import sys",
        "from blip2fast.command_line import main",
        line,
        "heavy = {'torch', 'transformers', 'matplotlib', 'pytest'} & {*sys.modules}",
        "assert not heavy, heavy",
    ]
    command = [sys.executable, "-c", "\n".join(program)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_help_of_every_command_is_quick_and_has_its_example() -> None:
    done = run_quietly(f"for words in {commands()}: main([*words, '--help'])")
    assert done.returncode == 0, done.stderr[-2000:]
    said = " ".join(re.sub(r"[│\s]+", " ", done.stdout).split())
    for words in commands():
        assert f"Example: blip2fast {' '.join(words)} " in said, words


def test_a_wrong_name_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """Of every command that reads something, each path and each key that may be mistyped."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes((ROOT / "docs" / "demo_captions.png").read_bytes())
    (tmp_path / "rows.csv").write_text("image,caption\na.png,a cat\n")
    (tmp_path / "runs" / "stage1").mkdir(parents=True)
    (tmp_path / "runs" / "stage1" / "config.yaml").write_text("stage: 1\n")
    picture, photos, rows = "photos/a.png", "photos", "rows.csv"
    image = (f"image {picture}x: no such file", f"{picture}x")
    model = ("model 'runs/stagel': not found: .*is it runs/stage1", "runs/stagel")
    nothing = ("no records at rows.cvs: not a file", "rows.cvs")
    folder = ("--images photo: not a folder", "photo")
    config = ("no configuration at scenes_stag1: .*did you mean scenes_stage1", "scenes_stag1")
    key = ("optim.lrr: no such key; the nearest is optim.lr", "optim.lrr=1")
    evaluated = ["--out", "out", "--data"]
    cases: list[tuple[str, list[str]]] = [
        (config[0], ["plan", "--config", config[1]]),
        (config[0], ["storage-loss", "--config", config[1]]),
        (config[0], ["train", "--config", config[1]]),
        (key[0], ["plan", "--config", "scenes_stage1", "--set", key[1]]),
        (key[0], ["train", "--config", "scenes_stage1", "--set", key[1]]),
        ("no configuration at runs/no/config.yaml", ["train", "--resume", "runs/no"]),
        ("confg x; the nearest option is --config", ["train", "--confg", "x"]),
        ("give a configuration by --config my.yaml", ["train", "my.yaml"]),
        (nothing[0], ["data", "check", nothing[1]]),
        (folder[0], ["data", "check", rows, "--images", folder[1]]),
        ("tokenizer './no': not found", ["data", "check", rows, "--tokenizer", "./no"]),
        (nothing[0], ["data", "import", nothing[1], "--out", "table"]),
    ]
    for images, source, encoder, fault in (
        (folder[1], rows, "./enc", folder[0]),
        (photos, nothing[1], "google/vit", nothing[0]),
        (photos, rows, "./enc", "image encoder './enc': not found"),
    ):
        given = ["--images", images, "--records", source, "--encoder", encoder, "--out", "f"]
        cases.append((fault, ["features", *given]))
    for source, images, name, fault in (
        (nothing[1], photos, "runs/stage1", nothing[0]),
        (rows, folder[1], "runs/stage1", folder[0]),
        (rows, photos, "runs/stagel", "captioner 'runs/stagel': not found: .*runs/stage1"),
    ):
        models = ["--captioner", name, "--ranker", name]
        cases.append((fault, ["capfilt", source, "--images", images, *models, "--out", "f"]))
    for task in ("retrieval", "caption", "vqa"):
        for data, images, name, fault in (
            (nothing[1], photos, "runs/stage1", nothing[0]),
            (rows, folder[1], "runs/stage1", folder[0]),
            (rows, photos, model[1], model[0]),
        ):
            given = [*evaluated, data, "--images", images, "--model", name]
            cases.append((fault, ["eval", task, *given]))
    answers = ["--annotations", "no.json", "--model", "runs/stage1", "--images", photos]
    cases += [
        ("--annotations no.json: no such file", ["eval", "vqa", *evaluated, rows, *answers]),
        ("image photo: no such file", ["index", "build", "photo", "--model", "m", "--out", "i"]),
        (model[0], ["index", "build", photos, "--model", model[1], "--out", "i"]),
        ("no index at runs: index.json is missing", ["index", "query", "runs", "a text"]),
        ("image photo: no such file or folder", ["caption", "photo", "--model", "m"]),
        (model[0], ["caption", photos, "--model", model[1]]),
        ("model 'rows.csv' is a file; give the folder", ["caption", photos, "--model", rows]),
        ("model 'runs' holds runs; give one: stage1", ["caption", photos, "--model", "runs"]),
        ("no question: give some after the image", ["vqa", picture, "--model", "m"]),
        (model[0], ["vqa", picture, "what?", "--model", model[1]]),
        (image[0], ["chat", image[1], "--model", "m"]),
        (image[0], ["attention", image[1], "--text", "a", "--model", "m", "--out", "a.png"]),
        (model[0], ["attention", picture, "--text", "a", "--model", model[1], "--out", "a.png"]),
        (model[0], ["demo-page", "--model", model[1]]),
        ("rows.csv exists already", ["convert", "runs/stage1", rows, "--to", "blip2fast"]),
        ("weights 'runs/stagel': not", ["convert", model[1], "new", "--to", "blip2fast"]),
        ("no metrics at runs/stage1/metrics.jsonl", ["report", "runs/stage1"]),
        ("--output rows.csv is a file", ["demo", "--output", rows]),
    ]
    ran = "\n".join(
        [
            f"os.chdir({str(tmp_path)!r})",
            f"for words in {[words for _, words in cases]}:",
            "    out = io.StringIO()",
            "    try:",
            "        with redirect_stdout(out), redirect_stderr(out): main(words)",
            "    except SystemExit as end: print(end, file=out)",
            "    else: print('no fault', file=out)",
            "    print(json.dumps(out.getvalue()))",
        ]
    )
    before = "import io, json, os; from contextlib import redirect_stderr, redirect_stdout"
    done = run_quietly(f"{before}\n{ran}")
    # the last line of `run_quietly` is reached, although `main` exits
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines()]
    for (fault, words), told in zip(cases, said, strict=True):
        assert re.search(fault, " ".join(told.split())), (words, told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "rows.csv", "runs"]


def test_near_misses_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for given, near in (
        (["plam"], "plan"),
        (["data", "chek"], "check"),
        (["plan", "--confg", "x"], "--config"),
        (["train", "--resum", "x", "--stes"], "--set"),
        (["demo", "--fats"], "--fast"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(given)
        assert near in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"no configuration at vitg_stage: .* vitg_stage1\?"):
        main(["plan", "--config", "vitg_stage"])


def test_python_runs_it_as_a_module() -> None:
    command = [sys.executable, "-m", "blip2fast", "plan", "--config", "nowhere.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no configuration at nowhere.yaml: not a file\n"


def test_shipped_configurations_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # as from a wheel: no configs/ here
    whole = load_config(SHIPPED / "scenes_stage1.yaml")
    assert load_config("scenes_stage1") == load_config("configs/scenes_stage1.yaml") == whole
    (tmp_path / "scenes_stage1").write_text(f"{(SHIPPED / 'scenes_stage1.yaml').read_text()}\n")
    assert load_config("scenes_stage1", ["seed=3"]).seed == 3


@pytest.mark.parametrize("stage", [1, 2])
def test_init_writes_what_a_run_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: int
) -> None:
    file = tmp_path / "my run.yaml"
    odd = "photos: 2024 #1"
    given = ["--stage", str(stage), "--images", odd, "--records", "true", "--encoder", "12"]
    main(["init", str(file), *given])
    assert f"blip2fast train --config '{file}'" in capsys.readouterr().out
    run = load_config(file)
    assert (run.stage, run.data.images, run.output_dir) == (stage, odd, "runs/my run")
    assert (run.data.records, run.data.image_encoder) == ("true", "12")
    assert (run.init_from, run.offload) == ((None, "none"), ("runs/stage1", "auto"))[stage - 1]
    # a comment for whoever reads it
    assert file.read_text().count("#") > 8
    before = file.read_text()
    with pytest.raises(SystemExit, match=r"error: .*my run.yaml exists: give --overwrite"):
        main(["init", str(file)])
    assert file.read_text() == before
    main(["init", str(file), "--overwrite", "--encoder", "other"])
    assert load_config(file).data.image_encoder == "other"
    assert [path.name for path in tmp_path.iterdir()] == ["my run.yaml"]


def test_init_knows_how_language_models_end_a_caption(tmp_path: Path) -> None:
    for name, end in (("facebook/opt-6.7b", "\n"), ("google/flan-t5-xl", None)):
        file = tmp_path / f"{Path(name).name}.yaml"
        main(["init", str(file), "--stage", "2", "--language-model", name])
        run = load_config(file)
        assert run.language_model is not None
        assert (run.language_model.path, run.language_model.end_text) == (name, end)
    with pytest.raises(SystemExit, match=r"run.json: a configuration is a yaml file; .*run.yaml"):
        main(["init", str(tmp_path / "run.json")])


@pytest.mark.slow
def test_train_is_train_py(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values(world, tmp_path / "out", 1)))
    command = [sys.executable, "-m", "blip2fast", "train", "--config", str(file)]
    short = ["--set", "optim.max_steps=2", "--set", "optim.warmup_steps=1"]
    done = subprocess.run([*command, *short], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_bench_says_what_a_wheel_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "site" / "blip2fast" / "c" / "m.py"))
    with pytest.raises(SystemExit, match=r"error: the benchmarks are not in the wheel: clone"):
        main(["bench"])
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command[1:])
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match="3"):
        main(["bench", "-k", "itc"])
    assert calls == [["-m", "pytest", "benchmarks/", "--benchmark-only", "-k", "itc"]]
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name[6:] else name)
    with pytest.raises(SystemExit, match=r"need pytest_benchmark: run `pip install -e '.\[dev\]'`"):
        main(["bench"])
    assert len(calls) == 1


def test_results_are_a_table_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"task": "vqa", "metrics": {"[b]accuracy": 0.25}, "failed": [], "samples": 3}
    for terminal in (False, True):
        monkeypatch.setattr(scores, "on_terminal", lambda terminal=terminal: terminal)
        scores._show(result, Path("out"))
        said = capsys.readouterr().out
        assert ("──" in said) == terminal
        assert re.search(r"\[b\]accuracy +0\.2500", said)


@pytest.fixture
def show(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str], int], list[str]]:
    """The lines of a command on a terminal of so many columns; 0: in a file."""

    def shown(words: list[str], columns: int) -> list[str]:
        for module in (machine, records, runs):
            monkeypatch.setattr(module, "on_terminal", lambda: columns > 0)
        monkeypatch.setenv("COLUMNS", str(columns or 80))
        capsys.readouterr()
        with contextlib.suppress(SystemExit):
            main(words)
        return capsys.readouterr().out.splitlines()

    return shown


def test_the_plan_is_as_wide_as_the_terminal(
    show: Callable[[list[str], int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    call = ["plan", "--config", "scenes_stage2", "--device-gib", "2", "--host-gib", "64"]
    plain, narrow, wide = show(call, 0), show(call, 80), show(call, 160)
    assert plain[3].split()[:6] == ["GiB", "on", "each", "device", "language", "model"]
    assert not any("─" in line for line in plain)
    rows = [line.split()[-1] for line in plain if re.search(r"(yes|no)$", line)]
    assert {"yes", "no"} == {*rows}
    for drawn in (narrow, wide):
        assert [line.split()[-1] for line in drawn if re.search(r"(yes|no) *$", line)] == rows
        assert any("─" in line for line in drawn)
        assert drawn[0] == plain[0]
        assert drawn[-3:] == plain[-3:]
    head = next(line for line in wide if line.startswith(" GiB on each device"))
    assert all(name in head for name in ("optimiser", "activations", "host, each process"))
    # what does not fit into the table is beneath it, of the choice
    chosen = re.fullmatch(r"offload: auto would choose '(.+)'", plain[-1])
    assert chosen is not None
    assert any(line.startswith(f"{chosen[1]}, GiB: language model 0.00, ") for line in narrow)
    assert max(len(line) for line in narrow[2:-4]) <= 80


def test_checked_records_are_a_table_on_a_terminal(
    show: Callable[[list[str], int], list[str]], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("image,caption\na.png,a cat\nb.png,a dog\n,x\n")
    (tmp_path / "a.png").write_bytes((ROOT / "docs" / "demo_captions.png").read_bytes())
    call = ["data", "check", str(rows), "--images", str(tmp_path)]
    plain, drawn = show(call, 0), show(call, 80)
    assert plain[0] == "2 records of 2 images, 2 texts; 1 rows unusable"
    said = {" ".join(line.split()) for line in drawn}
    assert {"records 2", "rows that make no record 1", "images readable 1", "missing 1"} <= said
    assert any(re.fullmatch(r"width: least, median, largest \d+, \d+, \d+", line) for line in said)
    # what is wrong is told in the same lines
    assert drawn[-3:] == plain[-3:]
    assert plain[-1] == "not usable as it is"


def test_doctor_is_a_table_on_a_terminal_and_plain_in_a_file(
    show: Callable[[list[str], int], list[str]],
) -> None:
    plain, drawn = show(["doctor"], 0), show(["doctor"], 80)
    assert not any("─" in line for line in plain)
    (heading,) = [number for number, line in enumerate(plain) if line.startswith("what runs on")]
    assert drawn[:heading] == plain[:heading]
    assert max(map(len, drawn[heading:])) <= 80
    for line in plain[heading + 1 :]:
        op = re.fullmatch(r"  (\w+): (\w+) \((\d+) kinds?\)", line)
        if op is not None:
            assert any(each.split()[:3] == [*op.groups()] for each in drawn), line


@pytest.mark.parametrize("tell", [options.say, options.complain])
def test_lines_do_not_run_into_a_bar(
    monkeypatch: pytest.MonkeyPatch, tell: Callable[[str], None]
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with tqdm(total=4, ncols=60, file=sys.stderr) as bar:
        bar.update(1)
        tell("a line")
    assert re.search(r"\r +\r(passed over: )?a line\n", terminal.getvalue())
