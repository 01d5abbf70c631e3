"""The rules for a page of the docs, and what they count."""

import re
from collections.abc import Iterator

MAX_WORDS = 1500
MAX_WORDS_OF_README = 450
MAX_WORDS_OF_ALL = 16_000
MAX_WORDS_OF_PARAGRAPH = 80
MAX_NUMBERS_OF_SENTENCE = 3
MAX_ROWS, MAX_COLUMNS, MAX_WORDS_OF_CELL = 10, 6, 15

FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
ITEM = re.compile(r"([-*+]|\d+\.) ")
HEADING = re.compile(r"#+ ")
UNCOUNTED = re.compile(r"`[^`]*`|\[[^\]]*\]\([^)]*\)|<http[^>]*>|\$[^$]*\$")
"""Code, links and formulas, whose numbers do not count."""
NUMBER = re.compile(r"(?<![\w#.])(?<!\w-)\d[\d.,]*(?:/\d+)?")
"""Not one of a name, as in SmolLM2-135M or #666. A fraction is one number."""
END = re.compile(r"(?<!\bal)(?<!\be\.g)(?<!\bi\.e)[.!?][\"')*_]*\s+(?=[\"'*_(]*[A-Z])")


def words(text: str) -> int:
    return len(text.split())


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs and items of lists, each in one line. Code, tables and headings are none."""
    open_: list[str] = []
    for line in [*IMAGE.sub("", _without_code(text)).splitlines(), ""]:
        line = line.strip()
        ends = not line or line.startswith("|") or HEADING.match(line) is not None
        if open_ and (ends or ITEM.match(line)):
            yield " ".join(open_)
            open_ = []
        if not ends:
            open_.append(ITEM.sub("", line, count=1) if ITEM.match(line) else line)


def sentences(text: str) -> Iterator[str]:
    for paragraph in paragraphs(text):
        yield from END.split(UNCOUNTED.sub("X", paragraph))


def numbers(sentence: str) -> int:
    return len(NUMBER.findall(sentence))


def tables(text: str) -> Iterator[list[list[str]]]:
    """The cells of each table by rows, heads included."""
    rows: list[list[str]] = []
    for line in [*_without_code(text).splitlines(), ""]:
        line = line.strip()
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            yield [row for row in rows if not all(re.fullmatch(":?-+:?", cell) for cell in row)]
            rows = []


def broken_rules(text: str, max_words: int = MAX_WORDS) -> list[str]:
    """What a page has too much of."""
    found: list[str] = []

    def require(n: int, most: int, of: str, where: str = "") -> None:
        if n > most:
            found.append(f"{n} {of}, at most {most}" + (f": {where[:60]}" if where else ""))

    require(words(text), max_words, "words in a page")
    for paragraph in paragraphs(text):
        require(words(paragraph), MAX_WORDS_OF_PARAGRAPH, "words in a paragraph", paragraph)
    for sentence in sentences(text):
        require(numbers(sentence), MAX_NUMBERS_OF_SENTENCE, "numbers in a sentence", sentence)
    for heads, *rows in tables(text):
        where = " | ".join(heads)
        require(len(rows), MAX_ROWS, "rows in a table", where)
        require(len(heads), MAX_COLUMNS, "columns in a table", where)
        for cell in (cell for row in (heads, *rows) for cell in row):
            require(words(cell), MAX_WORDS_OF_CELL, "words in a cell", cell)
    return found


def _without_code(text: str) -> str:
    return COMMENT.sub("", FENCE.sub("\n", text))
