"""The embedded scenes: pixels, masks, splits, texts and tokenizers."""

import json
import random
import time

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation
from transformers import AutoTokenizer

from blip2fast.data.records import write_records
from blip2fast.scenes import (
    QUESTION_FORMAT,
    QUESTION_TYPES,
    SceneSpec,
    SceneSplit,
    caption_pair,
    captions,
    is_exact,
    make_split,
    parse_caption,
    questions,
    save_tokenizers,
)
from blip2fast.scenes.glyphs import FORM_STARTS, HELD_OUT_FORMS, TRAIN_FORMS, handwriting
from blip2fast.scenes.world import COLOURS, SPLITS, Scene, SceneObject

WORLDS = [("shapes", 2), ("shapes", 3), ("digits", 2), ("digits", 3)]
SHAPES = SceneSpec()


def spec_of(source, grid):
    return SceneSpec(source=source, grid=grid, image_size=16 * grid)


def shapes_scene(*objects):
    return Scene(SHAPES, tuple(SceneObject(*words) for words in objects))


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world[0]}{world[1]}")
def split(request) -> SceneSplit:
    return make_split(spec_of(*request.param), "train", 300, seed=3)


def test_same_seed_same_scenes_and_a_prefix_of_a_longer_split(split):
    longer = make_split(split.spec, "train", 1100, seed=3)
    assert longer.scenes[:300] == split.scenes
    assert longer.keys[:300] == split.keys
    np.testing.assert_array_equal(longer.images[:300], split.images)
    np.testing.assert_array_equal(longer.masks[:300], split.masks)
    other = make_split(split.spec, "train", 300, seed=4)
    assert other.scenes != split.scenes
    assert (other.images != split.images).mean() > 0.5


def test_eight_thousand_scenes_take_seconds():
    start = time.process_time()
    made = make_split(SHAPES, "train", 8000)
    made.caption_records()
    made.question_records()
    assert time.process_time() - start < 10


def test_one_and_two_objects(split):
    counts = [len(scene.objects) for scene in split.scenes]
    assert set(counts) == {1, 2}
    assert 0.15 < counts.count(1) / len(counts) < 0.35
    for scene in split.scenes:
        places = [split.spec.places.index(o.place) for o in scene.objects]
        assert places == sorted(set(places))


@pytest.mark.parametrize(("source", "grid"), WORLDS)
def test_splits_are_disjoint_and_complete(source, grid):
    spec = spec_of(source, grid)
    parts = {}
    for name in SPLITS:
        rows = np.concatenate(spec.contents(name), axis=1)
        parts[name] = set(map(bytes, rows))
        assert len(parts[name]) == len(rows)
    assert not parts["train"] & parts["held_out"]
    assert not (parts["train"] | parts["held_out"]) & parts["unseen_pairs"]
    singles = grid**2 * len(spec.colours) * len(spec.kinds)
    pairs = singles * (singles - len(spec.colours) * len(spec.kinds)) // 2
    assert sum(map(len, parts.values())) == singles + pairs
    assert len(parts["held_out"]) >= 1000
    assert 0.25 < len(parts["held_out"]) / (len(parts["held_out"]) + len(parts["train"])) < 0.35


def test_unseen_pairs_are_in_no_training_text(split):
    spec = split.spec
    unseen = {f"{colour} {kind}" for colour, kind in spec.unseen_pairs}
    assert len(unseen) == len(spec.kinds)
    for name in ("train", "held_out"):
        made = make_split(spec, name, 300)
        texts = [c for record in made.caption_records(10) for c in record["captions"]]
        texts += [r["question"] + " " + r["answer"] for r in made.question_records(3)]
        texts += [text for pair in made.caption_pairs() for text in pair]
        assert not [text for text in texts if any(pair in text for pair in unseen)]
    made = make_split(spec, "unseen_pairs", 300)
    assert all(scene.has_unseen_pair for scene in made.scenes)
    for scene in made.scenes:
        (caption,) = captions(scene, 1, random.Random(0))
        named = parse_caption(caption, spec)
        assert named is not None
        assert any(f"{o.colour} {o.kind}" in unseen for o in named)
    # every colour and every kind is trained, only not together
    trained = spec.contents("train")
    assert set(trained.colour.ravel()) == {-1, *range(len(spec.colours))}
    assert set(trained.kind.ravel()) == {-1, *range(len(spec.kinds))}


def test_scenes_to_retrieve_all_differ():
    made = make_split(SHAPES, "held_out", 1000)
    assert len(set(made.scenes)) == 1000
    assert {len(scene.objects) for scene in made.scenes} == {1, 2}


def test_masks_show_the_object_in_its_place_and_colour(split):
    spec = split.spec
    cell = spec.image_size // spec.grid
    for image, masks, scene in zip(split.images, split.masks, split.scenes, strict=True):
        assert not masks[len(scene.objects) :].any()
        assert not (masks[0] & masks[1]).any()
        background = image[:, ~masks.any(0)].astype(float)
        for mask, o in zip(masks, scene.objects, strict=False):
            row, column = divmod(spec.places.index(o.place), spec.grid)
            inside = np.zeros_like(mask)
            inside[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = True
            assert mask.any()
            assert not (mask & ~inside).any()
            pixels = image[:, mask].astype(float).mean(axis=1)
            assert pixels.max() > background.mean() + 40
            # brightness varies: colours are compared by direction
            palette = np.array(list(COLOURS.values()))
            cosine = palette @ pixels / np.linalg.norm(palette, axis=1) / np.linalg.norm(pixels)
            assert list(COLOURS)[int(cosine.argmax())] == o.colour


def test_nothing_but_background_outside_the_masks():
    made = make_split(SceneSpec(noise=0.0), "train", 200)
    for image, masks in zip(made.images, made.masks, strict=True):
        # soft edges reach up to two pixels beyond the mask
        near = binary_dilation(masks.any(0), structure=np.ones((3, 3)), iterations=2)
        assert np.ptp(image[:, ~near]) == 0


def test_shapes_differ_in_their_masks():
    made = make_split(SHAPES, "train", 2000)
    share = {kind: [] for kind in SHAPES.kinds}
    for masks, scene in zip(made.masks, made.scenes, strict=True):
        for mask, o in zip(masks, scene.objects, strict=False):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            share[o.kind].append(box.mean())
    mean = {kind: float(np.mean(values)) for kind, values in share.items()}
    assert mean["square"] > 0.99
    assert mean["square"] > mean["circle"] > mean["ring"] > mean["triangle"]
    assert mean["cross"] < 0.75


def test_captions_say_the_scene_and_parse_back(split):
    rng = random.Random(0)
    for scene in split.scenes:
        texts = captions(scene, 100, rng)
        assert len(set(texts)) == len(texts) == (2 if len(scene.objects) == 1 else 6)
        for text in texts:
            assert parse_caption(text, split.spec) == frozenset(scene.objects)
            assert is_exact(text, scene)
    assert len(captions(split.scenes[0], 2, rng)) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a red circle top",
        "a red circle top left top left",
        "red red circle top left",
        "a circle red top left",
        "a red circle top left and a blue ring top left",
        "a red circle top left and a red circle top left",
        "a red circle top left and a blue",
        "a red circle middle left",
        "a red seven top left",
        "question: what is the object top left ?",
    ],
)
def test_what_is_no_caption_of_this_world_parses_to_none(text):
    assert parse_caption(text, SHAPES) is None
    assert not is_exact(text, shapes_scene(("red", "circle", "top left")))


def test_captions_are_matched_by_content():
    scene = shapes_scene(("red", "circle", "top left"), ("blue", "ring", "bottom right"))
    assert is_exact("a blue ring bottom right with a red circle top left", scene)
    assert is_exact("A red circle in the top left and a blue ring bottom right", scene)
    for wrong in (
        "a red circle top left",
        "a red circle top left and a blue ring bottom left",
        "a red ring top left and a blue circle bottom right",
        "a red circle top left and a blue ring bottom right and a red ring top right",
    ):
        assert parse_caption(wrong, SHAPES) is not None
        assert not is_exact(wrong, scene)


def test_hard_negatives_are_false_in_one_attribute_of_one_object(split):
    rng = random.Random(1)
    swapped = {"colour": 0, "kind": 0, "place": 0}
    for scene in split.scenes:
        true, false = caption_pair(scene, rng)
        assert is_exact(true, scene)
        assert not is_exact(false, scene)
        claimed = parse_caption(false, split.spec)
        assert claimed is not None
        assert len(true.split()) == len(false.split())
        (gone,), (new,) = frozenset(scene.objects) - claimed, claimed - frozenset(scene.objects)
        (attribute,) = [name for name in swapped if getattr(gone, name) != getattr(new, name)]
        swapped[attribute] += 1
    assert min(swapped.values()) > 60


def answer_of(question, scene):
    """Answers by reading the question alone, by other means than the generator's."""
    words = question.removesuffix(" ?").split()
    place = next((p for p in scene.spec.places if question.endswith(f"{p} ?")), None)
    colour = next((c for c in scene.spec.colours if c in words), None)
    kind = next((k for k in scene.spec.kinds if k in words), None)
    fitting = [
        o
        for o in scene.objects
        if place in (None, o.place) and colour in (None, o.colour) and kind in (None, o.kind)
    ]
    match words[:2]:
        case ["how", "many"]:
            return str(len(fitting))
        case ["is", "there"]:
            return "yes" if fitting else "no"
        case ["what", "colour"]:
            (o,) = fitting
            return o.colour
        case ["what", "is"]:
            (o,) = fitting
            return o.kind
        case ["where", "is"]:
            (o,) = fitting
            return o.place
    raise AssertionError(question)


def test_answers_follow_from_the_scene(split):
    rng = random.Random(2)
    asked = [(scene, q) for scene in split.scenes for q in questions(scene, rng)]
    assert {q.type for _, q in asked} == set(QUESTION_TYPES)
    for scene, q in asked:
        assert answer_of(q.question, scene) == q.answer, q
    answers = [q.answer for _, q in asked if q.type == "existence"]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6
    assert {q.answer for _, q in asked if q.type == "count"} == {"0", "1", "2"}


def test_no_answers_are_hard():
    """An object that is asked for in vain differs from one that is there in one attribute."""
    made = make_split(SHAPES, "train", 300)
    rng = random.Random(0)
    for scene in made.scenes:
        for q in questions(scene, rng):
            if q.type == "existence" and q.answer == "no":
                words = set(q.question.removesuffix(" ?").split())
                attributes = 3 if words & {"left", "right"} else 2
                best = max(
                    (o.colour in words) + (o.kind in words) + q.question.endswith(f"{o.place} ?")
                    for o in scene.objects
                )
                assert best >= attributes - 1


def test_records_are_seeded_json_lines(tmp_path, split):
    again = make_split(split.spec, "train", 300, seed=3)
    assert again.caption_records() == split.caption_records()
    assert again.question_records() == split.question_records()
    assert again.caption_pairs() == split.caption_pairs()
    path = tmp_path / "deeper" / "captions.jsonl"
    write_records(path, split.caption_records(3))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["image"] for record in records] == split.keys
    expected = [2 if len(scene.objects) == 1 else 3 for scene in split.scenes]
    assert [len(record["captions"]) for record in records] == expected
    assert set(split.question_records()[0]) == {"image", "question", "answer", "type"}


def test_images_are_written_under_their_keys(tmp_path):
    made = make_split(SHAPES, "held_out", 3)
    made.write_images(tmp_path)
    for key, image in zip(made.keys, made.images, strict=True):
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / key)), image.transpose(1, 2, 0)
        )


def test_digits_are_cut_between_forms():
    """The evidence that held-out digits are by other people: forms that restart, and likeness."""
    from sklearn.datasets import load_digits

    data = load_digits()
    opening = [*range(10), *range(10)]
    assert FORM_STARTS[-1] == len(data.target) == 1797
    restarts = [data.target[start : start + 20].tolist() == opening for start in FORM_STARTS[:-1]]
    assert sum(restarts) == 13  # one form lacks two digits at the start
    form = np.searchsorted(FORM_STARTS, np.arange(1797), side="right")
    squares = (data.data**2).sum(1)
    distance = squares[:, None] + squares - 2 * data.data @ data.data.T
    np.fill_diagonal(distance, np.inf)
    assert (form[distance.argmin(1)] == form).mean() > 0.5
    assert HELD_OUT_FORMS.start - TRAIN_FORMS.stop == 1
    train, _ = handwriting("train")
    held_out, rows = handwriting("held_out")
    assert len(train) == 1157
    assert len(held_out) == 510
    images = (data.images / 16).astype(np.float32)
    np.testing.assert_array_equal(train, images[:1157])
    np.testing.assert_array_equal(held_out, images[-510:])
    assert all((data.target[-510:][r] == digit).all() for digit, r in enumerate(rows))
    assert min(map(len, rows)) > 30


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "letters"}, "'letters'; choose one of shapes, digits"),
        ({"grid": 4}, "grid is 4; choose 2"),
        ({"image_size": 20}, "image_size is 20.*at least 24"),
        ({"noise": -0.1}, "noise is -0.1"),
    ],
)
def test_specs_that_cannot_be_drawn(values, message):
    with pytest.raises(ValueError, match=message):
        SceneSpec(**values)


def test_splits_that_cannot_be_made():
    with pytest.raises(ValueError, match="'test'; choose one of train, held_out, unseen_pairs"):
        make_split(SHAPES, "test", 10)
    with pytest.raises(ValueError, match="count is 0"):
        make_split(SHAPES, "train", 0)
    with pytest.raises(ValueError, match=r"count is 5000.*has 1109 different scenes"):
        make_split(SHAPES, "held_out", 5000)


def test_tokenizers_know_every_word_and_bring_it_back(tmp_path, split):
    qformer_path, language_path = save_tokenizers(tmp_path)
    texts = [c for record in split.caption_records() for c in record["captions"]]
    texts += [
        f"{QUESTION_FORMAT.format(record['question'])} {record['answer']}"
        for record in split.question_records()
    ]
    for path in (qformer_path, language_path):
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids = tokenizer(texts)["input_ids"]
        assert not any(tokenizer.unk_token_id in row for row in ids)
        plain = tokenizer.batch_decode(ids, skip_special_tokens=True)
        assert plain == [
            text.replace("question:", "question :").replace("answer:", "answer :") for text in texts
        ]
    qformer = AutoTokenizer.from_pretrained(qformer_path)
    assert qformer.pad_token_id == 0
    assert qformer.convert_ids_to_tokens(qformer("A red ring top left")["input_ids"]) == [
        *("[CLS]", "a", "red", "ring", "top left", "[SEP]")
    ]
    assert qformer.bos_token == "[DEC]"
    language = AutoTokenizer.from_pretrained(language_path)
    ids = language(["a red ring", "a ring"], padding=True, return_tensors="pt")
    assert ids.input_ids[:, 0].tolist() == [language.eos_token_id] * 2 == [2, 2]
    assert ids.input_ids[1, -1] == language.pad_token_id == 1
    assert language.bos_token_id == language.eos_token_id
