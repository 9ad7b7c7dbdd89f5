"""How texts of different scripts are cut into words, so that ROUGE and BLEU of all of them mean something.

`rouge-score` knows the letters a to z and no others: of two equal Russian or Chinese texts it says 0. BLEU's usual
tokeniser (13a) looks for blanks, which Chinese, Japanese, Thai and others don't write. So the script of a reference
chooses the tokenisers of its row; in Latin script they are the packages' own.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

# First and last code point of scripts that write no blanks between words. Each character counts as one, as in
# sacrebleu's `zh` and `char`. Hangul and Tibetan separate their words or syllables.
WITHOUT_BLANKS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x3005, 0x3007),  # iteration mark and zero of Han
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),  # Katakana
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),  # Han
    (0xA9E0, 0xA9FF),  # Myanmar
    (0xAA60, 0xAA7F),  # Myanmar
    (0xF900, 0xFAFF),  # Han
    (0xFF66, 0xFF9F),  # Katakana of half width
    (0x20000, 0x3FFFF),  # Han
)
KANA = ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F))
HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
JOINERS = "\u200c\u200d"  # within Persian and Indic words
BLEU_TOKENISERS = {"latin": "13a", "words": "13a", "chinese": "zh", "characters": "char"}


def within(character: str, ranges: Sequence[tuple[int, int]]) -> bool:
    """Return whether a character is in one of the ranges of code points."""
    return any(first <= ord(character) <= last for first, last in ranges)


def writing_of(text: str) -> str:
    """Return how most letters of a text are written.

    Returns:
        "latin": in Latin letters, or there is none; "words": in others, with blanks between words; "chinese": in Han
        characters; "characters": in another script without blanks.
    """
    if text.isascii():
        return "latin"
    counts = Counter(kind_of_letter(character) for character in text if character.isalpha())
    others = counts["words"] + counts["han"] + counts["kana"] + counts["characters"]
    if others <= counts["latin"]:
        return "latin"
    if counts["words"] >= others - counts["words"]:
        return "words"
    return "chinese" if not counts["kana"] and counts["han"] > counts["characters"] else "characters"


def kind_of_letter(letter: str) -> str:
    """Return "latin", "kana", "han", "characters" (another script without blanks) or "words" (any other script)."""
    if letter.isascii() or unicodedata.name(letter, "").startswith(("LATIN", "FULLWIDTH LATIN")):
        return "latin"
    if within(letter, KANA):
        return "kana"
    if within(letter, HAN):
        return "han"
    return "characters" if within(letter, WITHOUT_BLANKS) else "words"


class Words:
    """Tokeniser of any script for `rouge-score`, in lower case; punctuation is left out."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text; of scripts without blanks, each letter with its marks."""
        words: list[str] = []
        takes_mark = continues = False  # the last word: a mark belongs to it; a letter does
        for character in unicodedata.normalize("NFC", text.lower()):
            kind = unicodedata.category(character)[0]
            if kind == "M":
                if takes_mark:
                    words[-1] += character
            elif kind in "LN":
                alone = within(character, WITHOUT_BLANKS)
                if continues and not alone:
                    words[-1] += character
                else:
                    words.append(character)
                takes_mark, continues = True, not alone
            elif character not in JOINERS:
                takes_mark = continues = False
        return words
