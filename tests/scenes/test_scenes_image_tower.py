"""The image tower: trained on images alone, read by Auto classes, good enough to see kinds."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from blip2fast.frozen.image_encoders import load_image_encoder
from blip2fast.frozen.images import transform_for
from blip2fast.scenes import SceneSpec, make_split
from blip2fast.scenes.build_towers import FOLDER, NAMES, build, main
from blip2fast.scenes.image_tower import to_pixel_values, train_image_tower

SOURCES = ("shapes", "digits")


@pytest.fixture(scope="module")
def images():
    return make_split(SceneSpec(), "train", 256).images


@pytest.fixture(scope="module")
def tiny(images, tmp_path_factory):
    """A tower after 40 steps, with its folder."""
    folder = tmp_path_factory.mktemp("tower")
    return folder, train_image_tower(images, folder, width=32, layers=2, steps=40, batch_size=32)


def test_training_lowers_the_loss(images, tiny, tmp_path):
    untrained = train_image_tower(images, tmp_path, width=32, layers=2, steps=1, batch_size=32)
    _, report = tiny
    assert report.steps == 40
    assert report.seconds > 0
    assert report.loss < 0.6 * untrained.loss


def test_same_seed_same_tower(images, tiny, tmp_path):
    folder, report = tiny
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = train_image_tower(images, tmp_path, width=32, layers=2, steps=40, batch_size=32)
    assert again.loss == report.loss
    assert (tmp_path / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_folder_is_a_transformers_model_and_its_own_transform(images, tiny):
    folder, _ = tiny
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
    assert model.config.model_type == "vit"
    tokens = model(to_pixel_values(images[:3])).last_hidden_state
    assert tokens.shape == (3, 17, 32)
    encoder = load_image_encoder(str(folder))
    assert (encoder.num_tokens, encoder.width, encoder.image_size) == (17, 32, 32)
    transform = transform_for(str(folder), 32)
    from PIL import Image

    picture = Image.fromarray(images[0].transpose(1, 2, 0))
    torch.testing.assert_close(transform(picture), to_pixel_values(images[:1])[0])


def test_positions_are_there(tiny):
    """Regression: transformers leaves the position tables of a new ViTMAE at zero, untrained."""
    folder, _ = tiny
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
    table = model.embeddings.position_embeddings[0, 1:]
    assert table.std() > 0.3
    assert torch.cdist(table, table).fill_diagonal_(9).min() > 0.3


@pytest.mark.parametrize(
    ("given", "values", "message"),
    [
        (np.zeros((2, 3, 32, 32), np.float32), {}, r"float32 \[2, 3, 32, 32\]; give uint8"),
        (np.zeros((0, 3, 32, 32), np.uint8), {}, r"\[0, 3, 32, 32\].*n >= 1"),
        (np.zeros((2, 3, 32, 24), np.uint8), {}, "32x24 pixels"),
        (np.zeros((2, 3, 32, 32), np.uint8), {"patch_size": 7}, "patch_size is 7"),
        (np.zeros((2, 3, 32, 32), np.uint8), {"width": 40}, "width is 40; use a multiple of 16"),
    ],
)
def test_what_cannot_be_trained_on(given, values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_image_tower(given, tmp_path / "none", steps=1, **values)
    assert not (tmp_path / "none").exists()


def test_unknown_towers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'image_letters'; there are image_shapes"):
        build("image_letters", tmp_path)


def test_the_script_builds_what_is_named(tmp_path, capsys):
    main(["--out", str(tmp_path), "qformer_tokenizer"])
    assert [path.name for path in tmp_path.iterdir()] == ["qformer_tokenizer"]
    assert "qformer_tokenizer" in capsys.readouterr().out


def test_shipped_towers_are_small_and_complete():
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(NAMES)
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 2_500_000


def test_the_shipped_tokenizer_is_what_the_script_builds(tmp_path):
    build("qformer_tokenizer", tmp_path)
    built, shipped = (
        AutoTokenizer.from_pretrained(folder / "qformer_tokenizer") for folder in (tmp_path, FOLDER)
    )
    text = "A red circle top left with a blue seven middle centre"
    assert shipped.get_vocab() == built.get_vocab()
    assert shipped(text)["input_ids"] == built(text)["input_ids"]


@pytest.mark.parametrize("source", SOURCES)
def test_colour_and_kind_can_be_read_from_the_shipped_tower(source):
    """Ridge regression from the four tokens of a place, on scenes that the tower never saw."""
    spec = SceneSpec(source=source)
    encoder = load_image_encoder(str(FOLDER / f"image_{source}"))
    features, colours, kinds = {}, {}, {}
    for name, count in (("train", 1200), ("held_out", 300)):
        made = make_split(spec, name, count, seed=5)
        features[name] = by_place(encoder(to_pixel_values(made.images)))
        colours[name] = labels(made, "colour", spec.colours)
        kinds[name] = labels(made, "kind", spec.kinds)
    occupied = colours["held_out"] >= 0
    for wanted, floor in ((colours, 0.98), (kinds, FLOORS[source])):
        guess = ridge(features["train"], wanted["train"], features["held_out"])
        assert (guess == wanted["held_out"])[occupied].float().mean() > floor


# A guess is right in 20 % (shapes) or 10 % (digits).
FLOORS = {"shapes": 0.98, "digits": 0.75}


def by_place(tokens):
    """Tokens [B, 17, E] to [B, 4, 4 * E]: the 2x2 patches of each place."""
    patches = tokens[:, 1:].unflatten(1, (2, 2, 2, 2))
    return patches.permute(0, 1, 3, 2, 4, 5).reshape(len(tokens), 4, -1)


def labels(made, attribute, words):
    """[n, 4] index of the word at each place, -1 where there is no object."""
    table = torch.full((len(made.scenes), 4), -1)
    for row, scene in enumerate(made.scenes):
        for o in scene.objects:
            place = made.spec.places.index(o.place)
            table[row, place] = words.index(getattr(o, attribute))
    return table


def ridge(features, wanted, others):
    """Classes [m, 4] of `others` [m, 4, F], fitted on the occupied places of `features`."""
    rows = features[wanted >= 0].double()
    mean, deviation = rows.mean(0), rows.std(0)
    bias = torch.ones(len(rows), 1, dtype=torch.float64)
    x = torch.cat([(rows - mean) / deviation, bias], dim=1)
    y = torch.nn.functional.one_hot(wanted[wanted >= 0]).double()
    weights = torch.linalg.solve(x.T @ x + 3 * torch.eye(x.shape[1], dtype=torch.float64), x.T @ y)
    z = (others.double() - mean) / deviation
    return (z @ weights[:-1] + weights[-1]).argmax(-1)
