"""Text rich in two- and three-digit numerals.

Every sentence is generated here, and every number in it is real: looked up in a table of the
standard library (Unicode, HTTP, HTML, opcodes) or computed (calendar, arithmetic, units). A
sentence states one fact, and a fact is stated once in the whole corpus: the held-out part holds no
sentence of the training part.
"""

from __future__ import annotations

import calendar
import datetime
import html.entities
import http
import math
import opcode
import random
import unicodedata
from collections.abc import Iterator

from demo.document import Document

SENTENCES_A_DOCUMENT = 14


def number_documents(seed: int) -> list[Document]:
    """Return documents of number-rich sentences, one kind of fact each; the same for a seed."""
    rng = random.Random(seed)
    documents = []
    for name, facts in FACTS.items():
        sentences = sorted(set(facts(rng)))
        rng.shuffle(sentences)
        for start in range(0, len(sentences), SENTENCES_A_DOCUMENT):
            text = "\n".join(sentences[start : start + SENTENCES_A_DOCUMENT])
            documents.append(Document(text, f"generated: {name}", "numbers"))
    return documents


def _dates(rng: random.Random) -> Iterator[str]:
    first = datetime.date(1800, 1, 1).toordinal()
    last = datetime.date(2099, 12, 31).toordinal()
    for ordinal in rng.sample(range(first, last), 500):
        date = datetime.date.fromordinal(ordinal)
        day = date.timetuple().tm_yday
        left = (366 if calendar.isleap(date.year) else 365) - day
        weekday, month = calendar.day_name[date.weekday()], calendar.month_name[date.month]
        yield (
            f"{weekday}, {date.day} {month} {date.year} is day {day} of the year, in week "
            f"{date.isocalendar().week}; days remaining: {left}."
        )


def _products(rng: random.Random) -> Iterator[str]:
    pairs = [(a, b) for a in range(2, 32) for b in range(a, 33) if a * b < 1000]
    for a, b in rng.sample(pairs, 300):
        yield f"{a} times {b} is {a * b}, and {a * b} divided by {a} is {b}."


def _sums(rng: random.Random) -> Iterator[str]:
    for _ in range(400):
        a, b = rng.randint(11, 480), rng.randint(11, 480)
        yield f"If you add {a} and {b} you get {a + b}; the difference is {abs(a - b)}."


def _squares(_: random.Random) -> Iterator[str]:
    for n in range(10, 250):
        root = math.isqrt(n)
        yield (
            f"The square root of {n} lies between {root} and {root + 1}, because {root} squared is "
            f"{root**2} and {root + 1} squared is {(root + 1) ** 2}."
        )


def _factors(_: random.Random) -> Iterator[str]:
    for n in range(100, 400):
        divisors = [d for d in range(2, n) if n % d == 0]
        listed = ", ".join(map(str, divisors))
        yield f"{n} is divisible by {listed}." if divisors else f"{n} is a prime number."


def _code_points(_: random.Random) -> Iterator[str]:
    for point in range(33, 1000):
        name = unicodedata.name(chr(point), "")
        if name:
            yield f"The character {chr(point)} has the code point {point}: {name.lower()}."


def _html_entities(_: random.Random) -> Iterator[str]:
    for name, point in html.entities.name2codepoint.items():
        yield f"In HTML the entity &{name}; is the same as &#{point}; and shows {chr(point)}."


def _http_statuses(_: random.Random) -> Iterator[str]:
    for status in http.HTTPStatus:
        end = f": {status.description.rstrip('.')}." if status.description else "."
        yield f"HTTP status {status.value} means {status.phrase}{end}"


def _opcodes(_: random.Random) -> Iterator[str]:
    for name, number in opcode.opmap.items():
        yield f"The bytecode instruction {name} has the number {number}."


def _temperatures(_: random.Random) -> Iterator[str]:
    for celsius in range(5, 300, 5):
        yield f"{celsius} degrees Celsius are {celsius * 9 // 5 + 32} degrees Fahrenheit."


def _durations(rng: random.Random) -> Iterator[str]:
    for minutes in rng.sample(range(61, 1000), 200):
        hours, rest = divmod(minutes, 60)
        yield f"{minutes} minutes are {hours} hours and {rest} minutes."


FACTS = {
    "calendar dates": _dates,
    "products": _products,
    "sums": _sums,
    "square roots": _squares,
    "divisors": _factors,
    "Unicode code points": _code_points,
    "HTML entities": _html_entities,
    "HTTP statuses": _http_statuses,
    "bytecode instructions": _opcodes,
    "temperatures": _temperatures,
    "durations": _durations,
}
