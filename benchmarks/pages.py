"""Tables of results in Markdown, and the pages that show them between pairs of marks."""

from collections.abc import Mapping, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without an end of line."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """The text with each block between its marks ``<!-- NAME -->`` and ``<!-- end NAME -->``."""
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        assert after, f"the page has no {begin} ... {end}"
        text = f"{before}{begin}\n{block}\n{end}{after}"
    return text
