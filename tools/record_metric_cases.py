"""Record what the field's own programs give, as the test data of blip2fast/evaluation/.

    python tools/record_metric_cases.py VQA/PythonEvaluationTools/vqaEvaluation/vqaEval.py

It needs pycocoevalcap (pip) and Java for caption_metrics.json, and the published evaluation script
of VQAv2 (github.com/GT-Vision-Lab/VQA) for vqa_accuracy.json; both go to tests/reference/. The
script is of Python 2: its print statements are rewritten before it is run.
"""

from __future__ import annotations

import json
import random
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[1] / "tests" / "reference"

CAPTIONS = """
A man riding a wave on top of a surfboard.
Two cats -- one's black & one's white.
It isn't the boys' dog, it's the girl's.
They can't, won't and don't eat; she cannot either.
He's gonna jump, we're gonna watch, I've got to go and I'm late.
A T-shirt with a full-size black-and-white print
A man in a t-shirt/jersey holds a 12-inch pizza.
A clock that reads 5:30 p.m. on St. Mark's tower.
A U.S. flag, the U.K. flag and a flag of the U.S.A.
Mr. Smith and Dr. Jones, Jr., on Main St.
A sign says "STOP" in front of a ``closed'' shop
A sign says \u201cstop\u201d, and the dog\u2019s bowl is \u2018red\u2019
The bus costs $5.00, the train $1,000 and the fish \u00a35 or \u20ac5.
50% off!! Wow! Really?! What??
A 1950's car, a '50s diner and the 1980s
3.5 pizzas, 1/2 a cake, \u00bd a pie and .5 litres
A group of people (four men) [and a dog] {in a park}
A woman, who is tall,walks by the sea
A dog is running... and a cat... sleeps\u2026
A dog \u2014 brown \u2013 and a cat---black
half- eaten hot - dog and a -small bun
At five o'clock the ma'am drinks with O'Reilly
rock'n'roll and rock 'n' roll, y'all
'tis a dog and 'twas a cat, give 'em food
the grey centre of a theatre, in colour
caf\u00e9 au lait in Z\u00fcrich, na\u00efve art
an AT&T store & an H&M; M&M's and R&B
#5 on a #hashtag by @user
100\u00b0F outside, 70 \u00b0C inside
6'2" tall, 4" x 6" wide, 4x4 and 5x7
a boeing 747-400, an F-16, an mp3 player and a 7-eleven
call 555-1234 or 1-800-555-1234
www.example.com and me@example.com say hello
a &amp; b
:) and :-) but ;)
a cat w/ a hat, w/o shoes and/or gloves
No. 5 is no. five
e.g. a dog, i.e. an animal, etc.
 A   photo	of a   cat.
a man wearing a hat.a woman with a dog
e
.
!!!
""".strip("\n").split("\n")

CANDIDATES = [
    (
        "a man riding a wave on a surfboard",
        [
            "A man riding a wave on top of a surfboard.",
            "A surfer rides a big wave.",
            "a man surfing in the ocean",
            "Man on a surfboard, riding.",
        ],
    ),
    (
        "two cats sleeping on a bed",
        [
            "Two cats lie on the bed.",
            "A black cat and a white cat sleep",
            "two cats sleeping on a bed",
        ],
    ),
    ("a a a a a a a a", ["a red bus", "A bus parked on a street"]),
    ("pizza", ["A pizza on a plate.", "pizza"]),
    ("", ["A dog isn't here.", "an empty street"]),
    ("the dog's ball is red and the cat's ball is blue", ["The dog's ball is red."]),
    (
        "a man is standing next to a very large elephant in a field with many trees and people",
        ["A man next to an elephant.", "man standing beside elephant"],
    ),
    ("a red bus on a street", ["a red bus on a street", "A bus driving down the street."]),
]

ANSWERS = [
    "yes",
    "Yes.",
    "the two dogs",
    "A  cat",
    "1,000",
    "1,000 men, or more",
    "3.5",
    "e.g. dogs",
    "isnt",
    "dont know",
    "hadntve",
    "hadnt've",
    "somebody'd",
    "ow's'at",
    "black/white",
    "t-shirt",
    "on the left; top",
    "u.s.a.",
    "no, he isn't",
    "it's",
    "none",
    "ten o'clock",
    "oclock",
    "(big)",
    "what?",
    " an\nold\tman ",
    "5:30",
    "St. Louis",
    "$5",
    "50%",
    "#1",
    "the a an",
    "",
    "a/c",
    "Ive",
    "10",
    "hello , you",
    "red-ish",
    "'twas",
    "yall'd've",
    "_x_",
    "a@b",
    "blue & white",
]


def main(script: str) -> None:
    TARGET.mkdir(exist_ok=True)
    _write("caption_metrics.json", _captions())
    _write("vqa_accuracy.json", _answers(script))


def _write(name: str, content: Any) -> None:
    (TARGET / name).write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n")


def _captions() -> dict[str, Any]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokens(texts: dict[int, list[str]]) -> dict[int, list[str]]:
        with_names = {n: [{"caption": text} for text in each] for n, each in texts.items()}
        return PTBTokenizer().tokenize(with_names)

    split = tokens({n: [caption] for n, caption in enumerate(CAPTIONS)})
    # the tokenizer drops an empty text at the end of its file, so such candidates are added here
    found = {n: [text] for n, (text, _) in enumerate(CANDIDATES)}
    written = tokens({n: each for n, each in found.items() if each != [""]})
    candidates = {n: written.get(n, [""]) for n in found}
    references = tokens({n: texts for n, (_, texts) in enumerate(CANDIDATES)})
    bleu, each_bleu = Bleu(4).compute_score(references, candidates, verbose=0)
    scores: dict[str, tuple[float, Any]] = {
        "CIDEr-D": Cider().compute_score(references, candidates),
        "ROUGE-L": Rouge().compute_score(references, candidates),
        **{f"BLEU-{n + 1}": (bleu[n], each_bleu[n]) for n in range(4)},
    }
    return {
        "pycocoevalcap": version("pycocoevalcap"),
        "tokens": [[text, split[n][0].split()] for n, text in enumerate(CAPTIONS)],
        "candidates": [text for text, _ in CANDIDATES],
        "references": [texts for _, texts in CANDIDATES],
        "corpus": {name: float(score) for name, (score, _) in scores.items()},
        "each": {name: [float(x) for x in each] for name, (_, each) in scores.items()},
    }


class _Annotations:
    def __init__(self, qa: dict[int, Any]) -> None:
        self.qa = qa

    def getQuesIds(self) -> list[int]:
        return list(self.qa)


def _answers(script: str) -> dict[str, Any]:
    code = re.sub(r'print "([^"]*)"', r'print("\1")', Path(script).read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    exec(compile(code, script, "exec"), names)
    draw = random.Random(0)
    cases = []
    for _ in range(40):
        several = draw.sample(ANSWERS, draw.choice((1, 2, 4)))
        cases.append(
            {
                "prediction": draw.choice([*several, draw.choice(ANSWERS)]),
                "answers": [draw.choice(several) for _ in range(10)],
                "question_type": draw.choice(("what", "how many")),
                "answer_type": draw.choice(("other", "number", "yes/no")),
            }
        )
    true = {
        n: {**case, "answers": [{"answer": a, "id": i} for i, a in enumerate(case["answers"])]}
        for n, case in enumerate(cases)
    }
    given = {n: {"answer": case["prediction"]} for n, case in enumerate(cases)}
    evaluation = names["VQAEval"](_Annotations(true), _Annotations(given), n=10)
    evaluation.evaluate()

    def plain(text: str) -> str:
        text = text.replace("\n", " ").replace("\t", " ").strip()
        return str(evaluation.processDigitArticle(evaluation.processPunctuation(text)))

    return {
        "normalised": [[text, plain(text)] for text in ANSWERS],
        "cases": cases,
        "each": [evaluation.evalQA[n] / 100 for n in range(len(cases))],
        "accuracy": evaluation.accuracy["overall"] / 100,
        "question_type": evaluation.accuracy["perQuestionType"],
        "answer_type": evaluation.accuracy["perAnswerType"],
    }


if __name__ == "__main__":
    main(sys.argv[1])
