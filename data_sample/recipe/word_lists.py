"""The hand-written lists in words/, and which of their requests may be drawn from.

No validation or test request of any file may be in the pretraining text, nor one that
might be a rewording of it: `Taboo` finds those, and `Lists` leaves them out.
"""

import json
import re
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path

HERE = Path(__file__).resolve().parent  # held_out.jsonl, professional.jsonl
DATA = HERE.parent  # requests.jsonl, border.jsonl
WORDS = HERE / "words"
CATEGORIES = ("addiction", "alcohol", "betting", "horror", "sex")
PROFESSIONAL = ("medicine doses", "locks", "pest control chemicals")
REFUSAL = "I'm sorry, but I can't help with that."


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def read_blocks(*paths: Path) -> dict[str, dict[str, list[list[str]]]]:
    """{subject: {section: rows}} of words/*.txt files; a row is split at ` | `."""
    blocks = {}
    for line in chain(*(path.open(encoding="utf-8") for path in paths)):
        line = line.strip()
        if line.startswith("== "):
            block = blocks.setdefault(line[3:], defaultdict(list))
            rows = None  # so that a row before any section is an error
        elif re.fullmatch(r"[a-z_]+:", line):
            rows = block[line[:-1]]
        elif line and not line.startswith("#"):
            rows.append([cell.strip() for cell in line.split(" | ")])
    return blocks


def last(rows) -> list[str]:
    """The last cell of each row: its request, or all that it has."""
    return [row[-1] for row in rows]


STOPWORDS = {*(HERE / "stopwords.txt").read_text(encoding="utf-8").split()}


def stems(text: str) -> set[str]:
    """The content words of a text, cut to five letters: a rough common form."""
    found = re.findall(r"[a-z]{3,}", text.lower().replace("'", ""))
    return {word[:5] for word in found if word not in STOPWORDS}


def held_out() -> list[str]:
    """Every request that is not to train on, of every file: never in the text."""
    rows = read_rows(DATA / "requests.jsonl") + read_rows(HERE / "professional.jsonl")
    apart = read_rows(DATA / "border.jsonl") + read_rows(HERE / "held_out.jsonl")
    rows = [row for row in rows if row["split"] != "train"]
    return [row["request"] for row in rows + apart]


class Taboo:
    """Finds listed requests that are, or might be rewordings of, a held-out one."""

    def __init__(self, requests: list[str]):
        self.requests = [stems(request) for request in requests]
        self.holding = defaultdict(list)  # stem -> the requests that hold it
        for i, found in enumerate(self.requests):
            for stem in found:
                self.holding[stem].append(i)

    def near(self, text: str) -> bool:
        """Whether three stems or more are shared, and over 40% of the two together."""
        mine = stems(re.sub(r"\{\w\}", "", text))
        shared = Counter(i for stem in mine for i in self.holding.get(stem, ()))
        return any(n >= 3 and n > 0.4 * len(mine | self.requests[i])
                   for i, n in shared.items())

    def drop(self, rows: list) -> list:
        """The rows whose request is not near a held-out one."""
        return [row for row in rows if not self.near(row[-1])]


class Subject:
    """A category, topic or professional domain and all that can be said about it."""

    def __init__(self, name: str, block: dict[str, list], taboo: Taboo):
        self.name = name
        self.names = last(block["names"])  # how a system message may call it
        self.roles = last(block["roles"])  # who may ask (professional domains)
        self.opening = block["opening"][0][0]  # how an answer about it begins
        cues = last(block["cues"])  # words that point to it, many to a line
        self.cues = [cue for line in cues for cue in line.strip(",").split(", ")]
        self.advice = defaultdict(list)  # intent -> sentences
        for intent, sentence in block["advice"]:
            self.advice[intent].append(sentence)
        self.frames = taboo.drop(block["frames"])  # (intent, request with {x} or {n})
        about = {term: text for _, term, text, _ in block["more"]}
        about |= dict(block["terms"])
        self.terms = list(about.items())  # (term, about)
        scenes = [(i, term, about[term], text) for i, term, text in block["scenes"]]
        # (intent, term, about, request)
        self.scenes = taboo.drop(scenes + block["more"])
        self.texts = [*self.names, self.opening, *self.roles, *self.cues]
        self.texts += chain(*self.terms, *self.advice.values())


class Lists:
    """All word lists, with whatever comes close to a held-out request left out."""

    def __init__(self):
        blocks, taboo = read_blocks(*sorted(WORDS.glob("*.txt"))), Taboo(held_out())
        more, self.phrasings = blocks.pop("more"), blocks.pop("phrasings")
        for intent, name, *scene in more["more"]:
            blocks[name]["more"].append([intent, *scene])
        self.generic = taboo.drop(self.phrasings["frames"])  # frames for any subject
        self.other_roles = last(self.phrasings["other_roles"])  # of no domain
        unsafe = blocks.pop("unsafe")
        self.unsafe_terms = last(unsafe["terms"])
        self.unsafe_frames = last(taboo.drop(unsafe["frames"]))
        self.unsafe_scenes = last(taboo.drop(unsafe["scenes"] + unsafe["more"]))
        # Lookalikes ("rubbing alcohol") are requests about one of the other topics.
        lookalikes = blocks.pop("lookalikes")
        self.lookalike_terms = lookalikes["terms"]  # (topic, term, about)
        self.lookalike_frames = taboo.drop(lookalikes["frames"])
        self.lookalike_scenes = taboo.drop(lookalikes["scenes"])
        self.subjects = {name: Subject(name, blocks[name], taboo) for name in blocks}
        apart = CATEGORIES + PROFESSIONAL
        self.topics = [name for name in self.subjects if name not in apart]

        subjects = self.subjects.values()
        listed = last(chain(*(s.scenes + s.frames for s in subjects)))
        listed += last(self.lookalike_scenes)
        self.counts = Counter(stem for text in listed for stem in stems(text))
        self.texts = listed + [text for s in subjects for text in s.texts]
        self.texts += last(chain(*self.phrasings.values()))
        self.texts += self.unsafe_scenes + self.unsafe_terms + [REFUSAL]

    def rarest(self, request: str) -> str:
        """The content word of a request that the lists hold least often, as written."""
        words = [w for w in re.findall(r"[\w'-]*[A-Za-z]", request) if stems(w)]
        held = {word: min(self.counts[stem] for stem in stems(word)) for word in words}
        return min(words, key=held.get, default="")
