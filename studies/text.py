"""Tokens of English prose without the Hub: Debian's documentation packages.

    python studies/text.py smollm2/model smollm2/text
    python studies/text.py gemma3/model gemma3/text --separator 2 --tokens 12000000

Downloads about 450 MB with ``apt-get download`` and installs nothing. A package that Debian no
longer has is named and left out, so another release gives another text.

Writes smollm2/text/train.parquet: rows of 256 tokens, each from one package and beginning with the
separator, in random order. Paragraphs of fewer than 12 words, or with many symbols, are left out,
and each is taken once in a package. Fewer tokens are a random part of the same rows.
"""

import argparse
import gzip
import html
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer

PACKAGES = [
    "anarchism",
    "apache2-doc",
    "bacula-doc",
    "cmake-doc",
    "debian-handbook",
    "debian-reference-en",
    "dict-gcide",
    "dict-wn",
    "erlang-doc",
    "exim4-doc-html",
    "fortunes",
    "git-doc",
    "gnome-user-docs",
    "gnuplot-doc",
    "inkscape-tutorials",
    "jargon-text",
    "libboost1.74-doc",
    "libreoffice-help-en-us",
    "lilypond-doc",
    "linux-doc-6.1",
    "maxima-doc",
    "octave-doc",
    "perl-doc",
    "postgresql-doc-15",
    "python-django-doc",
    "python-pandas-doc",
    "python-scipy-doc",
    "python-sympy-doc",
    "python3.11-doc",
    "r-doc-html",
    "sagemath-doc",
    "sqlite3-doc",
]
ROW = 256
MOST_OF_A_PACKAGE = 7_000_000  # tokens
MARKUP = (".html", ".htm", ".xhtml", ".xml", ".page", ".docbook")
PLAIN = (".txt", ".text", ".info", ".pod", ".rst", ".md", ".dict")
NO_PROSE = re.compile(r"(?is)<(script|style|head|nav|pre|table)\b.*?</\1>|<!--.*?-->")
BLOCK = re.compile(r"(?i)</?(p|div|li|[uo]l|h[1-6]|br|t[rdh]|d[td]|section|blockquote)\b[^>]*>")
TAG = re.compile(r"<[^>]*>")


def documents(package: str, folder: Path) -> Iterator[str]:
    """The prose of each file of a package."""
    subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True)
    (archive,) = folder.glob(f"{package}_*.deb")
    subprocess.run(["dpkg", "-x", archive, folder / package], check=True)
    seen: set[str] = set()
    for path in sorted((folder / package).rglob("*")):
        name = path.name.lower().removesuffix(".gz").replace(".dict.dz", ".dict")
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 30_000_000:
            continue
        if "." in name and not name.endswith(MARKUP + PLAIN):
            continue
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if b"\0" in content[:1024]:
            continue
        text = content.decode("utf-8", "replace")
        if name.endswith(MARKUP):
            text = html.unescape(TAG.sub("", BLOCK.sub("\n\n", NO_PROSE.sub(" ", text))))
        new = [p for p in paragraphs(text) if p not in seen]
        seen.update(new)
        if sum(map(len, new)) > 300:
            yield "\n".join(dict.fromkeys(new))


def paragraphs(text: str) -> Iterator[str]:
    for part in re.split(r"\n\s*\n", text):
        paragraph = " ".join(part.split())
        letters = sum(c.isalpha() or c == " " for c in paragraph)
        ascii_ = sum(c.isascii() for c in paragraph)
        n = len(paragraph)
        if len(paragraph.split()) >= 12 and letters > 0.85 * n and ascii_ > 0.98 * n:
            yield paragraph


def rows(texts: list[str], tokenizer: object, separator: int) -> np.ndarray:
    """(n, ROW) tokens of a package."""
    flat: list[int] = []
    for first in range(0, len(texts), 64):
        batch = tokenizer(texts[first : first + 64], add_special_tokens=False)  # type: ignore[operator]
        for ids in batch["input_ids"]:
            flat += [*ids, separator]
        if len(flat) > MOST_OF_A_PACKAGE:
            break
    n = min(len(flat), MOST_OF_A_PACKAGE) // (ROW - 1)
    body = np.array(flat[: n * (ROW - 1)], np.int32).reshape(n, ROW - 1)
    return np.concatenate([np.full((n, 1), separator, np.int32), body], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a folder with the model's tokenizer")
    parser.add_argument("text", type=Path, help="the folder to write")
    parser.add_argument(
        "--separator",
        type=int,
        default=0,
        help="the token that begins rows and texts: SmolLM2's <|endoftext|> is 0, Gemma's <bos> 2",
    )
    parser.add_argument("--tokens", type=int, default=42_000_000)
    parser.add_argument("--packages", nargs="+", default=PACKAGES)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    order = random.Random(0)
    parts: list[np.ndarray] = []
    for package in tqdm(args.packages):
        with tempfile.TemporaryDirectory() as folder:
            try:
                texts = list(documents(package, Path(folder)))
            except subprocess.CalledProcessError:
                print(f"{package} cannot be downloaded")
                continue
        order.shuffle(texts)
        parts.append(rows(texts, tokenizer, args.separator))
    tokens = np.random.default_rng(0).permutation(np.concatenate(parts))[: args.tokens // ROW]
    args.text.mkdir(parents=True)
    partial = args.text / "train.parquet.partial"
    Dataset.from_dict({"input_ids": list(tokens)}).to_parquet(partial)
    partial.rename(args.text / "train.parquet")
    print(f"{tokens.size:,} tokens")


if __name__ == "__main__":
    main()
