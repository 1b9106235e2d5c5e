"""The demo's parts, and a run at tiny sizes; `test_readme.py` holds the real one to its gates."""

import io
import json
import math
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console

from blip2fast import command_line
from blip2fast.demo import check_gates
from blip2fast.demo import run as demo_run
from blip2fast.demo.attention import matching_attention
from blip2fast.demo.measure import merge
from blip2fast.demo.phases import Clock, Phases
from blip2fast.demo.settings import TRAINING_RUNS, DemoSettings, Places
from blip2fast.demo.table import COLUMNS, FLOORS, render
from blip2fast.demo.training import MetricsTail, TrainingRun, launcher, needed, train
from blip2fast.stage1.model import Blip2Stage1, Stage1Config
from blip2fast.training.config_files import load_config

REPOSITORY = Path(__file__).resolve().parents[2]


def good_summary():
    table = {
        name: {"model": floor + 0.01, "chance": 0.3, "blind": 0.2, "shuffled": 0.31}
        for name, floor in FLOORS.items()
    }
    return {"source": "shapes", "table": table}


def test_gates_pass_at_their_floors_and_name_what_fails_below():
    assert check_gates(good_summary()) == []
    for name, floor in FLOORS.items():
        summary = good_summary()
        summary["table"][name]["model"] = floor
        assert check_gates(summary) == []
        for value in (floor - 0.001, math.nan):
            summary["table"][name]["model"] = value
            (failed,) = check_gates(summary)
            assert failed.startswith(f"{name}: ")
            assert f"at least {floor:.0%}" in failed


@pytest.mark.parametrize("source", ["shapes", "digits"])
@pytest.mark.parametrize("value", [0.36, math.nan])
def test_gates_fail_when_shuffled_images_still_score(source, value):
    for name in FLOORS:
        summary = good_summary() | {"source": source}
        summary["table"][name]["shuffled"] = value
        (failed,) = check_gates(summary)
        assert failed.startswith(f"{name}: ")
        assert "blind level 30.0%" in failed


def test_digits_have_no_floors():
    summary = good_summary() | {"source": "digits"}
    for row in summary["table"].values():
        row["model"] = 0.0
    assert check_gates(summary) == []


def test_gates_refuse_a_summary_without_their_rows():
    summary = good_summary()
    del summary["table"]["caption/exact"]
    with pytest.raises(ValueError, match=r"no column 'model' in row 'caption/exact'"):
        check_gates(summary)


def test_table_shows_percent_losses_and_dashes():
    rows = {"loss/itc": {"model": 1.25}, "vqa_read/colour": {"model": 0.987, "blind": 0.2}}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(rows, "title"))
    text = console.export_text()
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()]
    by_name = {row[0]: row[1:] for row in cells}
    assert by_name["contrastive (ITC)"][0] == "1.250"
    assert by_name["colour"] == ["98.7", "-", "20.0", *"-" * (len(COLUMNS) - 3)]


def test_merge_unites_columns_and_orders_sections():
    merged = merge(
        {"itm/a": {"x": 1.0}, "vqa_read/b": {"x": 2.0}}, {"itm/a": {"y": 3.0}, "loss/c": {"y": 4.0}}
    )
    assert list(merged) == ["loss/c", "itm/a", "vqa_read/b"]
    assert merged["itm/a"] == {"x": 1.0, "y": 3.0}


class Recorder:
    """Runs phases `one` -> `two` and remembers which really ran."""

    def __init__(self, folder, **changes):
        self.ran = []
        console = Console(record=True, file=io.StringIO(), width=200)
        phases = Phases(folder, changes.get("version", "1"), console, changes.get("fresh", False))
        for name, after in (("one", []), ("two", ["one"])):
            product = folder / name

            def action(name=name, product=product):
                self.ran.append(name)
                product.write_text("made")

            phases.run(name, action, changes.get(name, 0), after, [product])
        self.text = console.export_text()
        self.times = phases.times


def test_phases_are_reused_until_something_that_they_depend_on_changes(tmp_path):
    assert Recorder(tmp_path).ran == ["one", "two"]
    again = Recorder(tmp_path)
    assert again.ran == []
    assert "two: reused" in again.text
    assert all(phase["reused"] for phase in again.times.values())
    assert Recorder(tmp_path, two=1).ran == ["two"]
    assert Recorder(tmp_path, two=1).ran == []
    assert Recorder(tmp_path, one=1, two=1).ran == ["one", "two"]
    assert Recorder(tmp_path, one=1, two=1, version="2").ran == ["one", "two"]
    assert Recorder(tmp_path, one=1, two=1, version="2", fresh=True).ran == ["one", "two"]


def test_a_phase_whose_product_is_gone_runs_again(tmp_path):
    Recorder(tmp_path)
    (tmp_path / "two").unlink()
    assert Recorder(tmp_path).ran == ["two"]


def test_an_unreadable_ledger_runs_everything(tmp_path):
    Recorder(tmp_path)
    (tmp_path / "phases.json").write_text("{")
    assert Recorder(tmp_path).ran == ["one", "two"]


def test_phases_refuse_what_cannot_be(tmp_path):
    phases = Phases(tmp_path, "1", Console(quiet=True))
    with pytest.raises(ValueError, match=r"builds on \['one'\]"):
        phases.run("two", lambda: None, 0, after=["one"])
    with pytest.raises(RuntimeError, match="ended without"):
        phases.run("one", lambda: None, 0, products=[tmp_path / "never"])
    assert not (tmp_path / "phases.json").exists(), "an unfinished phase is not remembered"


def test_metrics_tail_gives_each_complete_new_line_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    tail = MetricsTail(path)
    assert tail.new_lines() == [], "lines of an earlier run are not progress"
    with path.open("a") as file:
        file.write('{"step": 1}\n{"st')
    assert tail.new_lines() == [{"step": 1}]
    assert tail.new_lines() == []
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert tail.new_lines() == [{"step": 2}]
    path.write_text('{"step": 3}\n')
    assert tail.new_lines() == [{"step": 3}], "a file that was started again is read anew"
    assert MetricsTail(tmp_path / "none").new_lines() == []


@pytest.mark.parametrize("source", ["shapes", "digits"])
@pytest.mark.parametrize("run", TRAINING_RUNS)
def test_the_demo_passes_the_paths_that_its_configurations_name(source, run, monkeypatch):
    """So that `deepspeed blip2fast/train.py --config ...` alone does what the demo does."""
    path = DemoSettings(source=source).config(run)
    folder = Path("runs", "scenes" if source == "shapes" else "digits")
    monkeypatch.chdir(REPOSITORY)
    alone = load_config(path)
    assert load_config(path, Places(folder, source).overrides(run)) == alone
    assert needed(path, Places(folder, source).overrides(run)) == []
    elsewhere = [*Places(Path("elsewhere"), source).overrides(run), "seed=0", "seed=1"]
    assert f"output_dir={Path('elsewhere', run)}" in needed(path, elsewhere)
    assert needed(path, elsewhere)[-1] == "seed=1"
    assert load_config(path, needed(path, elsewhere)) == load_config(path, elsewhere)


# Stands for the launcher: writes what train.py would, run by run; fails at run number `fails_at`.
LAUNCHED = """
import sys, time
from pathlib import Path
from blip2fast.training.config_files import load_config
fails_at, words = int(sys.argv[1]), sys.argv[3:]
starts = [i for i, word in enumerate(words) if word == "--config"] + [len(words)]
for number, (start, end) in enumerate(zip(starts, starts[1:])):
    folder = Path(load_config(words[start + 1], words[start + 3 : end : 2]).output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\\n')
    if number == fails_at:
        sys.exit(f"no room in {folder}")
    (folder / "model.json").write_text("{}")
    while not (folder / "seen").exists():
        time.sleep(0.01)
"""


@pytest.mark.parametrize("fails_at", [-1, 1])
def test_one_start_trains_all_runs_and_tells_them_apart(fails_at, tmp_path, monkeypatch):
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    command = [sys.executable, str(script), str(fails_at)]
    monkeypatch.setattr("blip2fast.demo.training.launcher", lambda processes: command)
    monkeypatch.chdir(REPOSITORY)
    places = Places(tmp_path)
    runs = [TrainingRun(DemoSettings().config(run), places.overrides(run)) for run in TRAINING_RUNS]
    (places.run("vqa")).mkdir()
    (places.run("vqa") / "model.json").write_text("left by an earlier demo")
    seen = []

    @contextmanager
    def watch(number):
        folder = places.run(TRAINING_RUNS[number])
        if number == len(TRAINING_RUNS) - 1:  # the last one ends with the launcher
            folder.mkdir(exist_ok=True)
            (folder / "seen").touch()
        yield
        seen.append(number)
        assert (folder / "model.json").exists(), "a run ends when its model is written"
        (folder / "seen").touch()

    def train_all():
        train(runs, 2, places.training_log, Console(quiet=True), watch)

    if fails_at < 0:
        train_all()
        assert seen == [0, 1, 2]
    else:
        with pytest.raises(
            ChildProcessError, match=r"(?s)stage2 failed with status 1; .*no room in"
        ):
            train_all()
        assert seen == [0]


def test_a_training_that_failed_is_told_without_a_traceback(tmp_path, monkeypatch):
    def fail(*_):
        raise ChildProcessError("stage1 failed with status 1; training.log:\nno room")

    monkeypatch.setattr(demo_run, "run_demo", fail)
    for start in (lambda: demo_run.main(["--fast"]), lambda: command_line.main(["demo", "--fast"])):
        with pytest.raises(
            SystemExit, match=r"error: stage1 failed with status 1; .*log:\nno room"
        ):
            start()


def test_the_launcher_takes_another_port_where_the_usual_one_is_taken():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.listen()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("blip2fast.demo.training.LAUNCHER_PORT", port)
            *_, option, other = launcher(2)
    assert option == "--master_port"
    assert 0 < int(other) != port
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blip2fast.demo.training.LAUNCHER_PORT", port)
        assert launcher(2)[1:] == ["--num_gpus", "2"]


def test_cpu_time_counts_children_that_still_run():
    clock = Clock()
    busy = "import time\nwhile time.process_time() < 0.6: pass\nprint(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        running = clock.read()["cpu_seconds"]
    finally:
        child.kill()
        child.communicate()
    assert 0.5 < running <= clock.read()["cpu_seconds"] + 0.05


def test_attention_maps_are_the_mean_over_queries_and_heads(tmp_path):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "encoder_hidden_size": 8,
        "num_query_tokens": 3,
        "vocab_size": 30,
        "max_position_embeddings": 8,
        "bos_token_id": 4,
        "cross_attention_frequency": 1,
        "initializer_range": 0.3,
    }
    model = Blip2Stage1(Stage1Config(**sizes)).eval()
    image = torch.randn(2, 1 + 16, 8)
    ids = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]])
    seen = []
    last = model.qformer.encoder.layer[-1].crossattention
    attend = next(m for m in last.modules() if hasattr(m, "query"))
    attend.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    maps = matching_attention(model, image, ids, (ids != 0).long())
    (args, kwargs) = seen[0]
    states = args[0] if args else kwargs["hidden_states"]
    with torch.no_grad():
        tokens = model.ln_vision(image)
        query, key = attend.query(states), attend.key(tokens)
        expected = torch.zeros(2, 17)
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(8)
            expected += scores.softmax(-1).mean(1) / 2
    patches = expected[:, 1:] / expected[:, 1:].sum(1, keepdim=True)
    torch.testing.assert_close(maps, patches.view(2, 4, 4))
    assert maps.std() > 1e-3


def run_demo(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "blip2fast.demo", "--output", str(folder), *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_tiny_demo_leaves_everything_and_reuses_it(tmp_path):
    """Every phase with the real launcher and two processes; sizes at which nothing is learned."""
    folder = tmp_path / "run"
    first = run_demo(folder, "--fast")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["table"]["vqa_read/all"]) == set(COLUMNS)
    assert all(0 < phase["seconds"] and not phase["reused"] for phase in summary["phases"].values())
    for key in ("seconds", "cpu_seconds"):
        assert summary["this_run"][key] == pytest.approx(summary["from_nothing"][key], rel=0.2)
    assert summary["machine"]["versions"]["torch"] == torch.__version__
    for name in ("losses", "metrics", "attention", "captions"):
        assert (folder / "plots" / f"{name}.png").stat().st_size > 10_000
    for run in TRAINING_RUNS:
        assert (folder / run / "model.safetensors").is_file()
        assert list((folder / run).rglob("events.out.tfevents.*"))
        report = (folder / run / "report.html").read_text()
        assert report.count('class="card sample"') == 6
        assert "held_out-00006.png" in report
    assert "text to image R@1" in (folder / "table.txt").read_text()
    assert check_gates(summary), "four steps cannot meet the gates"

    second = run_demo(folder, "--fast")
    assert second.returncode == 0
    again = json.loads((folder / "summary.json").read_text())
    reused = {name for name, phase in again["phases"].items() if phase["reused"]}
    assert reused == set(again["phases"]) - {"evaluation"}
    assert again["table"] == summary["table"]
