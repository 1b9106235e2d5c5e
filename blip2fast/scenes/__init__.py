"""The embedded data: small rendered scenes, their texts, and two towers trained on them.

spec = SceneSpec(source="shapes")                    # or "digits": real handwriting
train = make_split(spec, "train", 8000, seed=0)      # images, masks, scenes, keys
records = train.caption_records(per_scene=4)         # for blip2fast.data.write_records
is_exact("a red circle top left", train.scenes[0])   # judged by content, not by words
"""

from blip2fast.scenes.splits import SceneSplit, make_split
from blip2fast.scenes.text import (
    QUESTION_FORMAT,
    QUESTION_TYPES,
    Question,
    caption_pair,
    captions,
    is_exact,
    parse_caption,
    questions,
)
from blip2fast.scenes.wordlevel import language_tokenizer, qformer_tokenizer, save_tokenizers
from blip2fast.scenes.world import Scene, SceneObject, SceneSpec

__all__ = [
    "QUESTION_FORMAT",
    "QUESTION_TYPES",
    "Question",
    "Scene",
    "SceneObject",
    "SceneSpec",
    "SceneSplit",
    "caption_pair",
    "captions",
    "is_exact",
    "language_tokenizer",
    "make_split",
    "parse_caption",
    "qformer_tokenizer",
    "questions",
    "save_tokenizers",
]
