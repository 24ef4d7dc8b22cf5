"""Prompts as the reference prepares its captions: lower case, and cleaned of what web captions carry along."""
from __future__ import annotations

import html
import re
from collections.abc import Iterable
from urllib.parse import unquote_plus

from ..errors import UnsupportedError

_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_SITE = r"[a-zA-Z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
Rules = list[tuple[re.Pattern[str], str]]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


# The order of all rules is the reference's (caption cleaning of DeepFloyd IF, which PixArt took over): each sees what the
# ones before it left.
_ADDRESSES = _rules(
    ("<person>", "person"),
    *((rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|{_SITE})", "") for scheme in ("https?", "www")),
)
_SIGNS = _rules(
    (r"@\w+\b", ""),  # nicknames
    (r"[\u31c0-\u9fff]+", ""),  # CJK strokes, Katakana extensions, enclosed and unified ideographs, hexagrams
    (r"[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # article numbers
    (r"\\n", " "),  # a written-out newline
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_ENDINGS})", ""),  # file names
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_JOINTS = re.compile(r"[-_]")
_MANY_JOINTS = 3  # a-name-joined-like-this is words
_WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article codes: jc6640, jc6640vc, 6640vc231
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),  # of shops
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_ENDINGS})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445×]\d+\.?\d*\b", ""),  # sizes; the second x is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def prepare(text: str, clean: bool = False, lower_case: bool = True) -> str:
    """A prompt as the pipelines of diffusers encode it: lower-cased and stripped, or cleaned twice (which lower-cases too).

    Cleaning takes brackets away, and with them the weights of `(word:1.2)`. Raises UnsupportedError without ftfy and
    beautifulsoup4.
    """
    if clean:
        return clean_caption(clean_caption(text))
    return text.lower().strip() if lower_case else text


def clean_caption(text: str) -> str:
    """One pass of the reference's rules over a caption."""
    ftfy, soup = _libraries()
    text = _apply(_ADDRESSES, unquote_plus(str(text)).strip().lower())
    text = _apply(_SIGNS, soup(text, features="html.parser").text)
    if len(_JOINTS.findall(text)) > _MANY_JOINTS:
        text = _JOINTS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _apply(_WORDS, text).strip()


def _apply(rules: Iterable[tuple[re.Pattern[str], str]], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _libraries() -> tuple:
    """ftfy, and the class BeautifulSoup."""
    try:
        import ftfy
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise UnsupportedError(
            f"clean_caption needs ftfy and beautifulsoup4 ({error}): `pip install ftfy beautifulsoup4`, or turn it off."
        ) from None
    return ftfy, BeautifulSoup
