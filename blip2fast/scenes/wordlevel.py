"""Word-level tokenizers of the scenes, saved as folders that `AutoTokenizer` loads."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from blip2fast._imports import needs
from blip2fast.scenes.text import WORD_PATTERN, vocabulary

with needs("make tokenizers", "tokenizers"):
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

QFORMER_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]")
# The ids of OPT: <s> 0 (unused), <pad> 1, </s> 2 (opens and closes a text), <unk> 3.
LANGUAGE_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")


def qformer_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of the Q-Former: `[CLS] words [SEP]`, `[PAD]` is 0, `[DEC]` is the bos token.

    It stands in for bert-base-uncased with `[DEC]` added.
    """
    tokenizer = _word_level(QFORMER_SPECIAL_TOKENS, unknown="[UNK]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[DEC]",
        clean_up_tokenization_spaces=False,
    )


def language_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of the language model, as OPT's: `</s> words`, padded on the right with `<pad>`.

    `</s>` is both bos and eos; the end token is not added by the tokenizer.
    """
    tokenizer = _word_level(LANGUAGE_SPECIAL_TOKENS, unknown="<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="</s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def save_tokenizers(folder: Path | str) -> tuple[Path, Path]:
    """Save both tokenizers; returns the folders of the Q-Former's and of the language model's."""
    qformer, language = Path(folder) / "qformer_tokenizer", Path(folder) / "language_tokenizer"
    qformer_tokenizer().save_pretrained(qformer)
    language_tokenizer().save_pretrained(language)
    return qformer, language


def _word_level(special_tokens: tuple[str, ...], unknown: str) -> Tokenizer:
    words = [*special_tokens, *vocabulary()]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=unknown)
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(WORD_PATTERN), behavior="removed", invert=True
    )
    return tokenizer
