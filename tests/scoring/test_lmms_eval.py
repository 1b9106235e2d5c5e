"""The model for lmms-eval, in lmms-eval itself where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from blip2_models import pictures, write_run

lmms_eval = pytest.importorskip("lmms_eval", reason="pip install lmms-eval")

from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.evaluator import simple_evaluate  # noqa: E402

from blip2fast.inference.model import Blip2  # noqa: E402
from blip2fast.scoring.lmms_model import Blip2Fast, manifest  # noqa: E402

IMAGES = pictures(3)
QUESTIONS = ["what is it", "<image>\nwhat colour is it ?", "where is it"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), "opt")


def requests(settings: dict[str, Any], images: int = 1) -> list[Any]:
    return [
        Instance(
            "generate_until",
            (text, settings, lambda number: [IMAGES[number]] * images, n, "task", "test"),
            n,
            {"task": "task", "doc_id": n, "repeats": 1},
        )
        for n, text in enumerate(QUESTIONS)
    ]


@pytest.fixture
def model(run: Path) -> Blip2Fast:
    found = Blip2Fast.create_from_arg_string(
        f"pretrained={run},num_beams=2", {"batch_size": 2, "device": "cpu"}
    )
    found.task_dict = {"task": {"test": [0, 1, 2]}}
    return found


def test_requests_are_answered_as_blip2_answers(run: Path, model: Blip2Fast) -> None:
    expected: Any = Blip2.from_pretrained(run, device="cpu").answer(
        list(IMAGES),
        ["what is it", "what colour is it ?", "where is it"],
        num_beams=2,
        length_penalty=-1.0,
        max_new_tokens=6,
    )
    assert model.generate_until(requests({"max_new_tokens": 6, "temperature": 0})) == expected
    (word, *_) = expected[0].split()[1:]
    cut = model.generate_until(requests({"max_new_tokens": 6, "until": [word]}))
    assert cut[0] == expected[0].split(word)[0].strip()


def test_what_it_cannot_do_is_said(run: Path, model: Blip2Fast) -> None:
    with pytest.raises(ValueError, match="task task, sample 0: 2 images, and blip2fast reads one"):
        model.generate_until(requests({}, images=2))
    with pytest.raises(NotImplementedError, match="take tasks that generate"):
        model.loglikelihood([])
    with pytest.raises(ValueError, match="no option 'beams' in --model_args"):
        Blip2Fast(str(run), beams=3)


def test_lmms_eval_runs_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of local records, from loading the model by its name to the metric."""
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    own = Blip2.from_pretrained(run, device="cpu")
    answers: Any = own.answer(list(IMAGES), "what is it", num_beams=2, max_new_tokens=5)
    for number, image in enumerate(IMAGES):
        image.save(tmp_path / f"{number}.png")
    rows = [{"image": str(tmp_path / f"{n}.png"), "question": "what is it"} for n in range(3)]
    right = [answers[0], answers[1], "no such answer"]
    lines = [json.dumps({**row, "answer": a}) for row, a in zip(rows, right, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "utils.py").write_text(
        "from PIL import Image\n\n\ndef visual(row):\n    return [Image.open(row['image'])]\n"
    )
    (tmp_path / "tasks" / "own.yaml").write_text(
        f"""task: own_records
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 5}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    results = simple_evaluate(
        model="blip2fast",
        model_args=f"pretrained={run},num_beams=2,device=cpu",
        tasks=["own_records"],
        batch_size=2,
        task_manager=manager,
        log_samples=False,
    )
    found = results["results"]["own_records"]
    assert found["exact_match,none"] == pytest.approx(2 / 3)
