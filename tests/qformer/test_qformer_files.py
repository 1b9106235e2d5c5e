"""QFormer reads and writes the files of transformers' Q-Formers, and refuses others clearly."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from qformer_cases import SIZES, blip2_config, images, make, make_pair, rows
from qformer_holders import build
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    Blip2QFormerModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    InstructBlipVideoQFormerConfig,
    PreTrainedConfig,
)

from blip2fast.qformer.model import QFormer

CONFIGS = {
    "blip2": blip2_config(),
    "blip2 without text": blip2_config(text=False),
    "instruct": InstructBlipQFormerConfig(**SIZES),
    "video": InstructBlipVideoQFormerConfig(**SIZES),
}


def assert_same_weights(expected: torch.nn.Module, actual: torch.nn.Module) -> None:
    want, got = expected.state_dict(), actual.state_dict()
    assert list(want) == list(got)
    for name in want:
        assert torch.equal(want[name], got[name]), name
        assert want[name].dtype == got[name].dtype


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_files_go_both_ways(config: PreTrainedConfig, tmp_path: Path) -> None:
    theirs, ours = make_pair(config, torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded, report = QFormer.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values())
    assert type(loaded.config) is type(config)
    assert not loaded.training
    assert_same_weights(theirs, loaded)

    ours.save_pretrained(tmp_path / "ours")
    back, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    assert_same_weights(ours, back)
    assert_same_weights(ours, QFormer.from_pretrained(tmp_path / "ours"))


def test_a_saved_blip2_qformer_is_found_by_automodel(tmp_path: Path) -> None:
    make(blip2_config(), torch.float32).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is Blip2QFormerModel


@pytest.mark.parametrize(
    "name",
    [
        "Blip2ForConditionalGeneration",
        "Blip2ForImageTextRetrieval, match",
        "InstructBlipForConditionalGeneration",
        "InstructBlipVideoModel",
    ],
)
def test_reads_the_qformer_of_a_full_checkpoint(name: str, tmp_path: Path) -> None:
    model, _ = build(name)
    model.save_pretrained(tmp_path)
    qformer, report = QFormer.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same_weights(model.qformer, qformer)


def test_precision_and_config_fields_can_be_chosen_on_loading(tmp_path: Path) -> None:
    make(blip2_config(), torch.float32).save_pretrained(tmp_path / "32")
    assert QFormer.from_pretrained(tmp_path / "32", dtype=torch.bfloat16).dtype == torch.bfloat16
    make(blip2_config(), torch.bfloat16).save_pretrained(tmp_path / "16")
    assert QFormer.from_pretrained(tmp_path / "16").dtype == torch.bfloat16
    assert QFormer.from_pretrained(tmp_path / "16", dtype=torch.float32).dtype == torch.float32

    changed = QFormer.from_pretrained(
        tmp_path / "32", hidden_dropout_prob=0.3, attn_implementation="eager"
    )
    assert changed.dropout.p == 0.3
    assert changed.config._attn_implementation == "eager"


def test_copies_and_pickles() -> None:
    qformer = make(blip2_config())
    call = {"query_embeds": rows().double(), "encoder_hidden_states": images().double()}
    expected = qformer(**call).last_hidden_state
    for twin in (copy.deepcopy(qformer), pickle.loads(pickle.dumps(qformer))):
        assert torch.equal(twin(**call).last_hidden_state, expected)


def test_other_models_and_other_shapes_are_refused(tmp_path: Path) -> None:
    bert = BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        vocab_size=9,
    )
    BertModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"type 'bert', not one of .*'blip_2_qformer'.*patch\(mod"):
        QFormer.from_pretrained(tmp_path / "bert")

    make(blip2_config(), torch.float32).save_pretrained(tmp_path / "blip2")
    wider = blip2_config(encoder_hidden_size=40)
    message = (
        r"blip2' does not fit the config: encoder.layer.0.crossattention.attention.key.weight is "
        r"\[32, 24\] in the file and \[32, 40\] in the model \(4 such tensors\)"
    )
    with pytest.raises(ValueError, match=message):
        QFormer.from_pretrained(tmp_path / "blip2", config=wider)
    with pytest.raises(ValueError, match=message):
        QFormer.from_pretrained(tmp_path / "blip2", encoder_hidden_size=40)
    anyway = QFormer.from_pretrained(tmp_path / "blip2", config=wider, ignore_mismatched_sizes=True)
    assert anyway.config.encoder_hidden_size == 40
    with pytest.raises(RuntimeError, match=r"(?s)24.*40"):
        QFormer(wider).load_state_dict(make(blip2_config(), torch.float32).state_dict())
    with pytest.raises(OSError, match="nowhere"):
        QFormer.from_pretrained(tmp_path / "nowhere")


def test_instructblip_owns_its_word_embeddings() -> None:
    qformer = QFormer(InstructBlipQFormerConfig(**SIZES))
    assert isinstance(qformer.get_input_embeddings(), torch.nn.Embedding)
    qformer.resize_token_embeddings(43)
    assert qformer.embeddings.word_embeddings.num_embeddings == 43
    theirs = InstructBlipQFormerModel(InstructBlipQFormerConfig(**SIZES | {"vocab_size": 43}))
    qformer.load_state_dict(theirs.state_dict())

    plain = QFormer(blip2_config())
    assert plain.get_input_embeddings() is None
    with pytest.raises(NotImplementedError, match="Blip2QFormerConfig takes embeddings and owns"):
        plain.set_input_embeddings(torch.nn.Embedding(2, 2))
