"""Splits captions into the words that the COCO caption metrics compare, without Java.

COCO's evaluation (arXiv 1504.00325, section 3) tokenizes with Stanford's PTBTokenizer in lower case
and then drops punctuation. `caption_tokens` follows the rules of that tokenizer, as its
documentation and its output show them: contractions (`is n't`, `dog 's`), `can not`, abbreviations
that keep their period (`st.`, `p.m.`), numbers, hyphenated words, brackets (`-lrb-`, which is not
dropped there either), currencies, quotes. docs/evaluation.md says where the two differ.
"""

from __future__ import annotations

import re

# what COCO's evaluation drops, in the form that lower-cased tokens have
_DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))

_BEFORE = {
    "\u2019": "'",
    **dict.fromkeys("\u2018\u201b\u2039\u203a", "'"),
    **dict.fromkeys("\u201c\u201d\u00ab\u00bb", '"'),
    "\u2026": "...",
    **dict.fromkeys("\u2013\u2014", "--"),
    "\u00bd": " 1/2 ",
    "\u00bc": " 1/4 ",
    "\u00be": " 3/4 ",
    "\u00a0": " ",
    "\ufe0f": "",
}
_TRANSLATED = str.maketrans(_BEFORE)
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'"}

# with a period, in any place
_WITH_PERIOD = """
mr mrs ms dr prof rev hon sgt gen gov sen rep lt col capt maj cpl adm st mt ft ave blvd rd sq ct
jr sr co corp inc ltd bros dept univ assn est bldg etc vs jan feb mar apr jun jul aug sep sept
oct nov dec mon tue tues wed thu thurs fri ph.d
"""
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_CURRENCIES = {"\u00a3": "#", "\u20ac": "$", "\u00a2": "cents"}
_SPLIT = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "lemme": "lem me",
    "gimme": "gim me",
    "'tis": "'t is",
    "'twas": "'t was",
}

_L = r"[^\W\d_]"  # a letter
_W = r"[^\W_]"  # a letter or a digit
_NOT_IN_WORD = rf"(?<!{_W})"
_PATTERN = re.compile(
    "|".join(
        (
            r"</?(?!https?:)[a-z][^<>]*>",
            r"https?://[^\s<>|(){}\"]*[^\s<>|(){}\".,;:!?']",
            r"www\.[^\s<>|(){}\"]*[^\s<>|(){}\".,;:!?']",
            r"[\w.+-]+@\w+(?:[.-]\w+)*\.[a-z]+",
            rf"{_NOT_IN_WORD}[#@]{_L}\w*",
            # faces
            r"(?<!\S)[:;=]-?[()dp](?!\S)",
            # words with an apostrophe inside or before
            rf"{_NOT_IN_WORD}'(?:tis|twas)(?!{_W})",
            rf"{_NOT_IN_WORD}'(?:em|til|cause|n'?|\d\ds?)(?!{_W})",
            rf"(?<={_W})'n'(?={_W})",
            rf"{_NOT_IN_WORD}y'(?={_L})",
            rf"{_NOT_IN_WORD}(?:ma'am|somethin'|ol'(?!{_W})|[dlo]'{_L}{{2,}}(?:-{_W}+)*)",
            # contractions
            rf"n't(?!{_W})",
            rf"'(?:s|m|d|re|ve|ll|t)(?!{_W})",
            rf"{_NOT_IN_WORD}(?:cannot|gonna|gotta|wanna|lemme|gimme)(?![-'/]?{_W})",
            rf"{_L}+(?=n't(?!{_W}))",
            # abbreviations and initials
            rf"{_NOT_IN_WORD}(?:{'|'.join(map(re.escape, _WITH_PERIOD.split()))})\.(?!{_W})",
            rf"{_NOT_IN_WORD}no\.(?=\s*\d)",
            rf"{_NOT_IN_WORD}{_L}(?:\.{_L})+(?!{_W})\.?",
            rf"{_NOT_IN_WORD}{_L}\.(?!\.\.)(?!{_L})",
            r"(?-i:[A-Z]+(?:&[A-Z]+)+|\bUS\$)",
            rf"{_NOT_IN_WORD}(?:c\+\+|[cf]\#)",
            # words joined by periods
            rf"{_NOT_IN_WORD}{_L}+(?:\.{_L}+)+(?![-_/]?{_W})",
            # words with letters, perhaps of several parts, perhaps with a number in front
            rf"(?:\d+(?:[.,]\d+)*-)?(?=[\w/-]*{_L}){_W}+(?:[-_/]{_W}+)*",
            # numbers, times, dates, fractions
            r"(?:(?<!\w)[-+]|(?<=\d)\+(?=\d))?\.?\d+(?:[.,:/-]\d+)*",
            r"[!?]+",
            r"\.{3,}|\.(?: \.)+ ?\.?",
            r"-{2,}",
            r"\*+|_+|<<|>>|\^_\^",
            r"\S",
        )
    ),
    re.IGNORECASE,
)


def caption_tokens(caption: str) -> list[str]:
    """The words of a caption, lower-cased, without punctuation.

    >>> caption_tokens("A man's dog isn't at the U.S. store.")
    ['a', 'man', "'s", 'dog', 'is', "n't", 'at', 'the', 'u.s.', 'store']
    """
    for entity, character in _ENTITIES.items():
        caption = caption.replace(entity, character)
    caption = caption.translate(_TRANSLATED)
    caption = "".join(character for character in caption if character <= "\uffff")
    words: list[str] = []
    for match in _PATTERN.finditer(caption):
        words += _written(match.group()).split()
    return [word for word in words if word not in _DROPPED]


def _written(token: str) -> str:
    """A token as the tokenizer writes it; spaces separate what it writes as several."""
    token = token.lower()
    if token[0] == "." and set(token) <= {".", " "}:
        return "..."
    if set(token) == {"-"}:
        return "--" if len(token) > 1 else "-"
    if token == '"':
        return "''"
    for given, written in (*_BRACKETS.items(), *_CURRENCIES.items()):
        token = token.replace(given, written)
    return _SPLIT.get(token, token)
