"""Captions, questions and hard negatives of scenes, and the models' text formats.

A caption names every object with its absolute place. It is judged by content, not by wording:
`parse_caption` returns the set of objects that it names, and `is_exact` compares that set with the
scene.
"""

import random
import re
from functools import cache
from itertools import permutations
from typing import Literal, NamedTuple

from blip2fast.scenes.world import COLOURS, GRIDS, KINDS, Scene, SceneObject, SceneSpec

QuestionType = Literal["colour", "kind", "count", "existence", "place"]
QUESTION_TYPES: tuple[QuestionType, ...] = ("colour", "kind", "count", "existence", "place")

# Follows the description, or the soft prompts that replace it, in question answering.
QUESTION_FORMAT = "question: {} answer:"
COUNTS = ("0", "1", "2")

_ROWS, _COLUMNS = GRIDS[3]
# A place is one word of the scenes' language: "top left" as two costs a token in every text and
# makes reading harder to learn for models of this size.
WORD_PATTERN = rf"(?:{'|'.join(_ROWS)}) (?:{'|'.join(_COLUMNS)})|\w+|[^\w\s]"
_WORDS = re.compile(WORD_PATTERN)

_OBJECT = "a {0.colour} {0.kind} {0.place}"
# Conjunctions of two objects, and caption endings. Objects come first, with words at fixed
# distances: small models then learn to bind colour, kind and place several times sooner.
_CAPTION_FORMATS = (
    (" and ", ""),
    (" with ", ""),
    (" and ", " in the picture"),
)
_ONE_OBJECT_FORMATS = tuple(f for f in _CAPTION_FORMATS if f[0] == " and ")
_FILLERS = frozenset({"a", "and", "in", "picture", "the", "with"})


class Question(NamedTuple):
    """A question about a scene with its unique correct answer."""

    question: str
    answer: str
    type: QuestionType


def captions(scene: Scene, count: int, rng: random.Random) -> list[str]:
    """Up to `count` different captions of a scene, in random wording and order of mention.

    A scene with one object has 2 wordings, one with two objects has 6.
    """
    wordings = _wordings(len(scene.objects))
    return [
        _caption(scene.objects, wording)
        for wording in rng.sample(wordings, min(count, len(wordings)))
    ]


def parse_caption(caption: str, spec: SceneSpec) -> frozenset[SceneObject] | None:
    """The set of objects that a caption names, or None if it is not a valid caption of this world.

    Filler words are skipped; the rest must be a sequence of colour, kind and place triples, with no
    place named twice.
    """
    words = [word for word in _WORDS.findall(caption.lower()) if word not in _FILLERS]
    if not words or len(words) % 3:
        return None
    objects = [SceneObject(*words[start : start + 3]) for start in range(0, len(words), 3)]
    known = all(
        o.colour in spec.colours and o.kind in spec.kinds and o.place in spec.places
        for o in objects
    )
    return frozenset(objects) if known and len({o.place for o in objects}) == len(objects) else None


def is_exact(caption: str, scene: Scene) -> bool:
    """True if the caption names exactly the objects of the scene, each in its place."""
    return parse_caption(caption, scene.spec) == frozenset(scene.objects)


def caption_pair(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A true caption, and the same caption with one attribute of one object swapped.

    The swapped caption is false for the scene. It names an unseen colour-kind pair only if the
    scene itself shows one, so novelty alone does not reveal it.
    """
    wording = rng.choice(_wordings(len(scene.objects)))
    objects = list(scene.objects)
    index = rng.randrange(len(objects))
    objects[index] = _swapped(scene, objects[index], rng)
    return _caption(scene.objects, wording), _caption(tuple(objects), wording)


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """One question of each type that the scene allows, with its answer.

    An existence question is about an object in the scene or, with equal probability, about an
    absent one that differs from it in one attribute. Questions about a colour, kind or place are
    asked only if exactly one object fits the description.
    """
    target = scene.objects[rng.randrange(len(scene.objects))]
    return [
        _colour_question(scene, target, rng),
        _kind_question(scene, target, rng),
        _count_question(scene, rng),
        _existence_question(scene, target, rng),
        *_place_question(scene, target, rng),
    ]


def vocabulary() -> list[str]:
    """Every word of every world's captions, questions and answers; a place counts as one word."""
    words = [
        *COLOURS,
        *(kind for kinds in KINDS.values() for kind in kinds),
        *(f"{row} {column}" for row in _ROWS for column in _COLUMNS),
        *COUNTS,
        *sorted(_FILLERS),
        *("question", ":", "?", "answer", "what", "colour", "where", "how", "many"),
        *("object", "objects", "is", "are", "there", "yes", "no"),
    ]
    return list(dict.fromkeys(words))


class _Wording(NamedTuple):
    joint: str
    closing: str
    order: tuple[int, ...]


@cache
def _wordings(count: int) -> tuple[_Wording, ...]:
    """All wordings of a caption with `count` objects; with one, the joint makes no difference."""
    formats = _CAPTION_FORMATS if count > 1 else _ONE_OBJECT_FORMATS
    return tuple(
        _Wording(*words, order) for words in formats for order in permutations(range(count))
    )


def _caption(objects: tuple[SceneObject, ...], wording: _Wording) -> str:
    parts = [_OBJECT.format(objects[index]) for index in wording.order]
    return wording.joint.join(parts) + wording.closing


def _swapped(
    scene: Scene,
    target: SceneObject,
    rng: random.Random,
    attributes: tuple[str, ...] = ("colour", "kind", "place"),
) -> SceneObject:
    """An object that is not in the scene and differs from `target` in exactly one attribute."""
    spec = scene.spec
    barred = frozenset() if scene.has_unseen_pair else spec.unseen_pairs
    options: dict[str, list[SceneObject]] = {
        "colour": [target._replace(colour=c) for c in spec.colours if c != target.colour],
        "kind": [target._replace(kind=k) for k in spec.kinds if k != target.kind],
        "place": [
            target._replace(place=p)
            for p in spec.places
            if all(p != other.place for other in scene.objects)
        ],
    }
    attribute = rng.choice(attributes)
    allowed = [o for o in options[attribute] if (o.colour, o.kind) not in barred]
    return rng.choice(allowed)


def _colour_question(scene: Scene, target: SceneObject, rng: random.Random) -> Question:
    names = [f"object {target.place}"]
    if _alone(scene, target, "kind"):
        names.append(target.kind)
    return Question(f"what colour is the {rng.choice(names)} ?", target.colour, "colour")


def _kind_question(scene: Scene, target: SceneObject, rng: random.Random) -> Question:
    names = [f"object {target.place}"]
    if _alone(scene, target, "colour"):
        names.append(f"{target.colour} object")
    return Question(f"what is the {rng.choice(names)} ?", target.kind, "kind")


def _count_question(scene: Scene, rng: random.Random) -> Question:
    if rng.random() < 0.5:
        return Question("how many objects are there ?", COUNTS[len(scene.objects)], "count")
    present = [o.colour for o in scene.objects]
    # A uniformly drawn colour would be absent five times out of six.
    colour = rng.choice(present) if rng.random() < 0.6 else rng.choice(scene.spec.colours)
    answer = COUNTS[present.count(colour)]
    return Question(f"how many {colour} objects are there ?", answer, "count")


def _existence_question(scene: Scene, target: SceneObject, rng: random.Random) -> Question:
    with_place = rng.random() < 0.5
    attributes = ("colour", "kind", "place") if with_place else ("colour", "kind")
    asked = target if rng.random() < 0.5 else _swapped(scene, target, rng, attributes)
    name = f"a {asked.colour} {asked.kind}"
    if with_place:
        answer = "yes" if asked in scene.objects else "no"
        return Question(f"is there {name} {asked.place} ?", answer, "existence")
    pairs = {(o.colour, o.kind) for o in scene.objects}
    answer = "yes" if (asked.colour, asked.kind) in pairs else "no"
    return Question(f"is there {name} ?", answer, "existence")


def _place_question(scene: Scene, target: SceneObject, rng: random.Random) -> list[Question]:
    names = [
        name
        for name, unique in (
            (target.kind, _alone(scene, target, "kind")),
            (f"{target.colour} object", _alone(scene, target, "colour")),
            (f"{target.colour} {target.kind}", _alone(scene, target, "colour", "kind")),
        )
        if unique
    ]
    if not names:
        return []
    return [Question(f"where is the {rng.choice(names)} ?", target.place, "place")]


def _alone(scene: Scene, target: SceneObject, *attributes: str) -> bool:
    """True if no other object of the scene has the target's values of all these attributes."""
    return not any(
        all(getattr(other, name) == getattr(target, name) for name in attributes)
        for other in scene.objects
        if other != target
    )
