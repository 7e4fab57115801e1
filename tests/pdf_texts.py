"""Reads the texts of a PDF that Chromium printed."""

from __future__ import annotations

import re
import zlib


def page_texts(pdf: bytes) -> list[list[str]]:
    """Returns the text blocks of each page.

    Chromium writes each text as glyph numbers, and the letter of each glyph into the table `ToUnicode` of the font. The
    name of a font is its object's number, such as ``/F7``.
    """
    objects = {int(match[1]): match[2] for match in re.finditer(rb"(?:^|\n)(\d+) 0 obj\n(.*?)\nendobj", pdf, re.DOTALL)}
    letters = {
        number: _letters(_stream(objects[int(match[1])]).decode("ascii"))
        for number, content in objects.items()
        if (match := re.search(rb"/ToUnicode (\d+) 0 R", content))
    }
    pages = []
    for content in objects.values():
        if re.search(rb"/Type /Page\b", content) and (match := re.search(rb"/Contents (\d+) 0 R", content)):
            pages.append(_texts(_stream(objects[int(match[1])]).decode("latin-1"), letters))
    return pages


def _stream(content: bytes) -> bytes:
    return zlib.decompress(content.split(b"stream\n", 1)[1].rsplit(b"\nendstream", 1)[0])


def _letters(table: str) -> dict[int, str]:
    """Returns the letters of each glyph of a font."""
    letters = {}
    for part in re.findall(r"beginbfchar\n(.*?)endbfchar", table, re.DOTALL):
        for glyph, text in re.findall(r"<(\w+)> <(\w+)>", part):
            letters[int(glyph, 16)] = bytes.fromhex(text).decode("utf-16-be")
    for part in re.findall(r"beginbfrange\n(.*?)endbfrange", table, re.DOTALL):
        for first, last, text in re.findall(r"<(\w+)> <(\w+)> <(\w+)>", part):
            for step in range(int(last, 16) - int(first, 16) + 1):
                letters[int(first, 16) + step] = chr(int(text, 16) + step)
    return letters


def _texts(drawing: str, letters: dict[int, dict[int, str]]) -> list[str]:
    texts = []
    for block in re.findall(r"\bBT\n(.*?)\nET\b", drawing, re.DOTALL):
        text, font = "", 0
        for name, glyphs in re.findall(r"/F(\d+) \S+ Tf|<(\w+)> Tj", block):
            font = int(name) if name else font
            text += "".join(letters[font][int(glyphs[i : i + 4], 16)] for i in range(0, len(glyphs), 4))
        texts.append(text)
    return texts
