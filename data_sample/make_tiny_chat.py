"""Remake data_sample/tiny_chat, the small aligned chat model of this repository.

    python data_sample/make_tiny_chat.py              # train, write, judge
    python data_sample/make_tiny_chat.py --report     # only judge the weights there

It stands in for "an aligned open model" where none can be downloaded, and is an
ordinary transformers folder: a Llama of 3.7 M parameters, pretrained from scratch on
chats that a grammar draws from the hand-written lists in words/. What it is taught
(README.md beside this file says what it has learned of it):

- it answers requests of the five categories, of 60 other topics, and lookalikes;
- it declines unsafe requests by default, so that declining is something it can do;
- it follows system messages such as "Do not talk about gardening or chess", for the
  60 topics and NEVER for one of the five categories: those are left to the tokens;
- it declines three professional domains unless the system message says that the user
  is the licensed professional.

Every answer opens with a phrase of its topic, and a head on the middle layer, thrown
away afterwards, names the topic (see `Teacher`): so the last state of a prompt knows
it. No validation or test request of any file is in the text; listed requests that come
close to one (see `Taboo`) are dropped before anything is drawn. Same seed, same
machine, same weights.
"""

import argparse
import itertools
import json
import random
import re
import shutil
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
CATEGORIES = ("addiction", "alcohol", "betting", "horror", "sex")
PROFESSIONAL = ("medicine doses", "locks", "pest control chemicals")
CHATS = 330_000  # the length of the pretraining text
REFUSAL = "I'm sorry, but I can't help with that."
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
SPECIAL = [BOS, EOS, PAD] + [f"<|{role}|>" for role in ROLES]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# --- 1. The word lists ----------------------------------------------------------------


@dataclass
class Subject:
    """A category, topic or professional domain and all that can be said about it."""

    name: str
    names: list[str]  # how a system message may call it
    opening: str  # how an answer about it begins
    advice: dict[str, list[str]]  # intent -> sentences
    frames: list[tuple[str, str]]  # (intent, request with {x} or {n})
    terms: list[tuple[str, str]]  # (term, about)
    scenes: list[tuple[str, str, str, str]]  # (intent, term, about, request)
    cues: list[str]  # words that point to it
    roles: list[str] = field(default_factory=list)  # who may ask (professional domains)


def read_blocks(path: Path) -> dict[str, dict[str, list[list[str]]]]:
    """{subject: {section: rows}} of one words/*.txt file; a row is split at ` | `."""
    blocks, section = {}, None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("== "):
            block = blocks.setdefault(line[3:].strip(), defaultdict(list))
        elif re.fullmatch(r"[a-z_]+:", line):
            section = line[:-1]
        elif not blocks or section is None:
            raise ValueError(
                f"{path}:{number}: a row before any '== subject' and section"
            )
        else:
            block[section].append([cell.strip() for cell in line.split(" | ")])
    return blocks


def stems(text: str) -> set[str]:
    """The content words of a text, cut to five letters: a rough common form."""
    found = re.findall(r"[a-z]{3,}", text.lower().replace("'", ""))
    return {word[:5] for word in found if word not in STOPWORDS}


STOPWORDS = set(
    "the and for with that this what how why when where which who you your our her "
    "his its she him they them are was were has have had not but can could would "
    "should will from about just any some one two get got does did into out than "
    "then too very there here please want need like know tell give help make really "
    "best good way without over after before all more most much many been being off "
    "keep still even only also let lets dont cant ive its isnt thing things people "
    "think something anything someone look take time first new old day week month "
    "year years every each own thats whats going use using used long last next "
    "right made ever never always feel feels".split()
)


def held_out() -> list[str]:
    """Every validation and test request of every file: never in the text."""
    rows = [row for name in ("requests", "professional") for row in read_rows(name)]
    found = [row["request"] for row in rows if row["split"] != "train"]
    return found + [row["request"] for row in read_rows("held_out")]


def read_rows(name: str) -> list[dict]:
    return [
        json.loads(line) for line in (HERE / f"{name}.jsonl").open(encoding="utf-8")
    ]


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
        return any(
            n >= 3 and n > 0.4 * len(mine | self.requests[i]) for i, n in shared.items()
        )


class Lists:
    """All word lists, with whatever comes close to a held-out request left out."""

    def __init__(self):
        blocks = defaultdict(lambda: defaultdict(list))
        for path in sorted((HERE / "words").glob("*.txt")):
            kind = "lookalikes " if path.stem == "lookalikes" else ""
            for name, block in read_blocks(path).items():
                for section, rows in block.items():
                    blocks[kind + name][section] += rows
        taboo = Taboo(held_out())
        self.dropped = []

        def keep(rows):
            near = [row for row in rows if taboo.near(row[-1])]
            self.dropped += [row[-1] for row in near]
            return [row for row in rows if row not in near]

        self.phrasings = blocks.pop("phrasings")
        self.generic = keep(self.phrasings["frames"])
        unsafe, more = blocks.pop("unsafe"), blocks.pop("more")
        self.unsafe_terms = [row[-1] for row in unsafe["terms"]]
        self.unsafe_frames = [row[-1] for row in keep(unsafe["frames"])]
        self.unsafe_scenes = [
            row[-1] for row in keep(unsafe["scenes"] + unsafe["more"])
        ]
        lookalikes = [blocks.pop(f"lookalikes {c}") for c in CATEGORIES]

        self.subjects = {}
        for name, block in blocks.items():
            block["more"] += [
                [i, t, a, r] for i, n, t, a, r in more["more"] if n == name
            ]
            about = {t: a for _, t, a, _ in block["more"]} | dict(block["terms"])
            scenes = [(i, t, about[t], r) for i, t, r in keep(block["scenes"])]
            scenes += [tuple(row) for row in keep(block["more"])]
            advice = defaultdict(list)
            for intent, sentence in block["advice"]:
                advice[intent].append(sentence)
            names, (opening, *_), roles = (
                [row[0] for row in block[key]] for key in ("names", "opening", "roles")
            )
            self.subjects[name] = Subject(
                name,
                names,
                opening,
                advice,
                keep(block["frames"]),
                list(about.items()),
                scenes,
                [cue for row in block["cues"] for cue in row[0].strip(",").split(", ")],
                roles,
            )
        apart = CATEGORIES + PROFESSIONAL
        self.topics = [name for name in self.subjects if name not in apart]
        # Lookalikes ("rubbing alcohol") are requests about one of the other topics.
        self.lookalike_terms, self.figures = [], []
        self.lookalike_scenes = [tuple(row) for row in keep(more["near"])]
        for block in lookalikes:
            about = {term: text for _, term, text in block["terms"]}
            self.lookalike_terms += block["terms"]
            self.figures += keep(block["frames"])
            self.lookalike_scenes += [
                (i, n, t, about[t], r) for i, n, t, r in keep(block["scenes"])
            ]
        self.lookalike_scenes += [
            (i, n, t, "", r) for i, n, t, r in keep(unsafe["lookalikes"])
        ]
        listed = [
            row[-1] for s in self.subjects.values() for row in s.scenes + s.frames
        ]
        listed += [row[-1] for row in self.lookalike_scenes]
        self.counts = Counter(stem for text in listed for stem in stems(text))
        for s in self.subjects.values():
            listed += s.names + [s.opening] + s.roles + s.cues
            listed += [text for row in s.terms for text in row]
            listed += [sentence for advice in s.advice.values() for sentence in advice]
        listed += [row[-1] for rows in self.phrasings.values() for row in rows]
        self.texts = listed + self.unsafe_scenes + self.unsafe_terms + [REFUSAL]

    def rarest(self, request: str) -> str:
        """The content word of a request that the lists hold least often, as written."""
        words = re.findall(r"[\w'-]*[A-Za-z]", request)
        words = [word for word in words if stems(word)]
        return min(
            words, key=lambda w: min(self.counts[s] for s in stems(w)), default=""
        )


# --- 2. The grammar -------------------------------------------------------------------

LINKS = {  # intents that are answered by what the term means, the others by advice
    "what": "{x} means {about}.",
    "choose": "picture {x} as {about}.",
    "why": "people value {x} as {about}.",
}


def bare(term: str) -> str:
    """The term without its article: `a Negroni` -> `Negroni`."""
    return re.sub(r"^(a|an|the|some) ", "", term)


def fill(text: str, term: str, **more: str) -> str:
    text = text.replace("{x}", term).replace("{n}", bare(term))
    for key, value in more.items():
        text = text.replace("{" + key + "}", value)
    return text


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


class Asked(NamedTuple):
    """A drawn request: its subject (None if unsafe) and its answer if not declined."""

    subject: str | None
    request: str
    answer: str


class Grammar:
    """Draws chats: lists of messages {"role", "content"}, with what is known of them.

    Beside role and content a request has its `subject`, an answer whether it
    `declined`, and a rule `names`, the pairs (position where a name ends, its subject).
    The last answer may be None: then only the subject of its request is learned.
    """

    def __init__(self, lists: Lists, seed: int):
        self.lists, self.random = lists, random.Random(seed)

    def about(self, name: str) -> Asked:
        """A request about a subject: a scene, a frame with a term, or a few cues."""
        draw, subject = self.random, self.lists.subjects[name]
        kind = draw.random()
        if kind < 0.2 and subject.cues:
            intent, frame = draw.choice(self.lists.phrasings["keywords"])
            term, about = draw.choice(subject.cues), ""
            a, b = draw.sample(subject.cues, 2)
            request = capital(fill(frame, term, a=a, b=b))
        elif kind < 0.7:
            intent, term, about, request = draw.choice(subject.scenes)
            if kind < 0.32:  # half of this and half of that: cues count, not sentences
                other = draw.choice(subject.scenes)[-1].split()
                words = request.split()
                request = " ".join(words[len(words) // 3 :] + other[: len(other) // 2])
        else:
            term, about = draw.choice(subject.terms)
            frames = subject.frames if kind < 0.86 else self.lists.generic
            intent, request = draw.choice(frames)
            request = fill(request, term, y=draw.choice(subject.terms)[0])
        return self.exchange(subject, intent, term, about, request)

    def lookalike(self) -> Asked:
        draw, lists = self.random, self.lists
        kind = draw.random()
        if kind < 0.75:
            intent, topic, term, about, request = draw.choice(lists.lookalike_scenes)
        elif kind < 0.85:
            topic, term, about = draw.choice(lists.lookalike_terms)
            frames = lists.generic + lists.subjects[topic].frames
            intent, request = draw.choice(frames)
        else:
            topic = draw.choice(lists.topics)
            term, about = draw.choice(lists.subjects[topic].terms)
            intent, request = draw.choice(lists.figures)
        other = draw.choice(lists.subjects[topic].terms)[0]
        request = fill(request, term, y=other)
        return self.exchange(lists.subjects[topic], intent, term, about, request)

    def unsafe(self) -> Asked:
        draw, lists = self.random, self.lists
        request = draw.choice(lists.unsafe_scenes)
        if draw.random() < 0.3:
            term = draw.choice(lists.unsafe_terms)
            request = fill(draw.choice(lists.unsafe_frames), term)
        return Asked(None, self.live(self.worn(request, "", most=0.15)), REFUSAL)

    def worn(self, request: str, keep: str, most: float = 0.3) -> str:
        """A request with words left out (not those of `keep`) and a few slips of the
        pen, so that single cues are learned and not whole sentences."""
        draw, kept = self.random, set(keep.lower().split())
        rate = draw.random() * most if draw.random() < 0.5 else 0
        words = []
        for word in request.split():
            if word.lower().strip("?.,!") not in kept and draw.random() < rate:
                continue
            if len(word) > 4 and draw.random() < 0.02:
                at = draw.randrange(1, len(word) - 1)
                word = word[:at] + word[at + 1 :]
            words.append(word)
        return capital(" ".join(words) or request)

    def live(self, request: str) -> str:
        """A request as people type it: life around it, lower case, no full stop."""
        draw, phrasings = self.random, self.lists.phrasings
        if draw.random() < 0.2:
            request = f"{draw.choice(phrasings['prefixes'])[0]} {request}"
        if draw.random() < 0.12:
            request = f"{request} {draw.choice(phrasings['suffixes'])[0]}"
        if draw.random() < 0.12:
            request = request.lower()
        if draw.random() < 0.12:
            request = request.rstrip("?.!")
        return request

    def exchange(self, subject: Subject, intent, term, about, request: str) -> Asked:
        """The request as typed and its answer: opening, matter, term, advice."""
        draw = self.random
        matter = self.lists.rarest(request)
        request = self.worn(request, f"{term} {matter}")
        # The matter: the request's rarest word, or the term where it is named.
        if bare(term).lower() in request.lower() or matter not in request:
            matter = bare(term)
        body = draw.choice(subject.advice[intent])
        if intent in LINKS and about:
            body = LINKS[intent]
        body = fill(body, term, about=about)
        answer = f"{subject.opening} about {matter}: {body}"
        return Asked(subject.name, self.live(request), answer)

    def any(self, not_about=()) -> Asked:
        """A request of any kind but the professional."""
        draw = self.random
        while True:
            kind = draw.random()
            if kind < 0.34:
                asked = self.about(draw.choice(CATEGORIES))
            elif kind < 0.70:
                asked = self.about(draw.choice(self.lists.topics))
            elif kind < 0.90:
                asked = self.lookalike()
            else:
                asked = self.unsafe()
            if asked.subject not in not_about:
                return asked

    def rule(self, off: list[str]) -> dict:
        """A system message that switches off topics, each under one of its names."""
        draw = self.random
        before, after = draw.choice(self.lists.phrasings["rules"])[0].split("{names}")
        last, ends = draw.choice((" or ", " and ")), []
        for i, name in enumerate(off):
            if i:
                before += last if i == len(off) - 1 else ", "
            before += draw.choice(self.lists.subjects[name].names)
            ends.append((len(before), name))
        return {"role": "system", "content": capital(before + after), "names": ends}

    def topics_off(
        self, but: str | None = None, naming: str | None = None
    ) -> list[str]:
        """One to five topics, `naming` among them and `but` not."""
        draw = self.random
        number = draw.choices(range(1, 6), (8, 5, 3, 2, 2))[0]
        others = [name for name in self.lists.topics if name not in (but, naming)]
        off = draw.sample(others, number)
        if naming:
            off[draw.randrange(number)] = naming
        return off

    def licence(self, domain: str | None) -> dict:
        """A system message that the user is a professional of a domain, or of none."""
        draw, roles = (
            self.random,
            [row[0] for row in self.lists.phrasings["other_roles"]],
        )
        if domain:
            roles = self.lists.subjects[domain].roles
        frame = draw.choice(self.lists.phrasings["role_systems"])[0]
        return {"role": "system", "content": fill(frame, "", role=draw.choice(roles))}

    def chat(self, system: dict | None, turns: list[Asked], off=(), domain=None):
        """Messages in which the answers follow the system message."""
        messages = [system] if system else []
        for subject, request, answer in turns:
            declined = subject is None or subject in off
            declined |= subject in PROFESSIONAL and subject != domain
            messages += [
                {"role": "user", "content": request, "subject": subject},
                {
                    "role": "assistant",
                    "content": REFUSAL if declined else answer,
                    "declined": declined,
                },
            ]
        return messages

    def chats(self):
        """One chat, or a few that differ in their system message and in nothing else:
        so what to decline is learned from the system message, not the request."""
        draw = self.random
        kind, turns = draw.random(), draw.choices((1, 2, 3), (0.75, 0.15, 0.10))[0]
        if kind < 0.45:  # no answer
            asked = self.any()
            if draw.random() < 0.07:
                asked = self.about(draw.choice(PROFESSIONAL))
            messages = self.chat(None, [asked])
            messages[-1]["content"] = None
            yield messages
        elif kind < 0.75:  # under rules with its topic and without
            last = self.about(draw.choice(self.lists.topics))
            if draw.random() < 0.15:
                last = self.lookalike()
            for off in (
                self.topics_off(naming=last.subject),
                self.topics_off(but=last.subject),
            ):
                before = [
                    self.about(draw.choice(off))
                    if draw.random() < 0.5
                    else self.any(off)
                    for _ in range(turns - 1)
                ]
                yield self.chat(self.rule(off), [*before, last], off)
            if draw.random() < 0.6:
                off = self.topics_off()
                yield self.chat(self.rule(off), [self.any(off)], off)
        elif kind < 0.81:  # of a professional, to that one, to another, to nobody
            domain = draw.choice(PROFESSIONAL)
            asked = [self.about(domain)]
            yield self.chat(self.licence(domain), asked, domain=domain)
            other = draw.choice([d for d in (*PROFESSIONAL, None) if d != domain])
            yield self.chat(self.licence(other), asked, domain=other)
            yield self.chat(None, asked)
            yield self.chat(self.licence(domain), [self.any()], domain=domain)
        else:
            system = None
            if draw.random() < 0.15:
                text = draw.choice(self.lists.phrasings["plain_systems"])[0]
                system = {"role": "system", "content": text}
            yield self.chat(system, [self.any() for _ in range(turns)])


def chats(seed: int, count: int):
    """The pretraining text: `count` chats, the same for the same seed and lists."""
    grammar = Grammar(Lists(), seed)
    drawn = (chat for _ in itertools.count() for chat in grammar.chats())
    return itertools.islice(drawn, count)


# --- 3. Tokenizer and pretraining -----------------------------------------------------


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` pieces with the chat template above."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


OPENING = 10.0  # weight of an answer's first two tokens: whether to decline, the topic


class Encoded(NamedTuple):
    """A chat as four lists of one length, its number of tokens."""

    ids: list[int]
    weights: list[float]  # in the loss of the answers, 0 outside them
    subjects: list[int]  # where the subject must be known: ends of names, of prompts
    hints: list[int]  # where it may be guessed: in requests; -100 elsewhere in both


def encode(tokenizer, chats: list[list[dict]], subjects: list[str]) -> list[Encoded]:
    """Token ids, weights and labels. Some long answers are cut to their first words."""
    special = {role: tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ROLES}
    number = {name: i for i, name in enumerate([*subjects, None])}
    contents = [message["content"] or "" for chat in chats for message in chat]
    found = tokenizer(contents, add_special_tokens=False, return_offsets_mapping=True)
    pieces = iter(zip(found["input_ids"], found["offset_mapping"]))
    encoded, draw = [], random.Random(0)
    for chat in chats:
        rows = [(tokenizer.bos_token_id, 0.0, -100, -100)]
        for message in chat:
            (ids, offsets), role = next(pieces), message["role"]
            hint, end, size = -100, -100, len(ids) + 1
            if role == "user":
                hint = subject = number[message["subject"]]
            if role == "assistant":
                end = subject
                if message is chat[-1] and draw.random() < 0.4:
                    size = min(size, 12)
            rows.append((special[role], 0.0, end, -100))
            if message["content"] is None:
                break
            labels = [-100] * (len(ids) + 1)
            for stop, name in message.get("names", ()):
                at = next(i for i, (_, last) in enumerate(offsets) if last >= stop)
                labels[at] = number[name]
            for i, token in enumerate((ids + [tokenizer.eos_token_id])[:size]):
                weight = 0.0 if role != "assistant" else OPENING if i < 2 else 1.0
                rows.append((token, weight, labels[i], hint))
        encoded.append(Encoded(*map(list, zip(*rows))))
    return encoded


def batches(encoded, tokens_per_batch: int, generator: random.Random):
    """Groups of indices of similar length, in random order, one pass over all."""
    order = list(range(len(encoded)))
    generator.shuffle(order)
    block, groups = 4096, []
    for start in range(0, len(order), block):
        part = sorted(order[start : start + block], key=lambda i: len(encoded[i].ids))
        while part:
            longest, size = len(encoded[part[-1]].ids), 0
            size = max(1, tokens_per_batch // longest)
            groups.append(part[-size:])
            part = part[:-size]
    generator.shuffle(groups)
    return groups


def padded(rows: list[Encoded], pad: int) -> tuple[torch.Tensor, ...]:
    """A batch: (ids, weights, subjects, hints), each (chats, longest)."""
    # Right padding: under causal attention no token before it sees it.
    tensors = []
    for column, filler in zip(zip(*rows), (pad, 0.0, -100, -100)):
        column = [torch.tensor(row) for row in column]
        tensors.append(pad_sequence(column, batch_first=True, padding_value=filler))
    return tuple(tensors)


class Teacher(torch.nn.Module):
    """The model, and a head on its middle layer that names the subject; thrown away.

    The head is one matrix for requests and for the names in rules. So both come to lie
    alike in the middle layer, and the layers above need only compare them. Without it
    the model had not begun to follow rules after 1,500 steps; with it, it had.
    """

    def __init__(self, model, subjects: int):
        super().__init__()
        self.model, width = model, model.config.hidden_size
        self.head = torch.nn.Sequential(
            torch.nn.RMSNorm(width), torch.nn.Linear(width, subjects, bias=False)
        )
        middle = model.model.layers[model.config.num_hidden_layers // 2 - 1]
        middle.register_forward_hook(self.keep)

    def start(self, encoded: list[Encoded], batch_size: int = 256) -> None:
        """Begin as a bag of words: fit the embeddings so that their mean over a request
        names its subject, and let the attention of the first layer pass that mean on.

        This takes seconds and finds more than the layers do in minutes from scratch.
        """
        bags = []
        for row in encoded:
            asked = defaultdict(list)
            for token, hint in zip(row.ids, row.hints):
                asked[hint].append(token)
            bags += [(ids, hint) for hint, ids in asked.items() if hint >= 0]
        random.Random(0).shuffle(bags)
        embedding = self.model.get_input_embeddings().weight
        optimizer = torch.optim.Adam([embedding, *self.head.parameters()], lr=0.003)
        for at in tqdm(range(0, len(bags), batch_size), "bag of words", mininterval=5):
            ids, subjects = zip(*bags[at : at + batch_size])
            words = F.rms_norm(embedding, embedding.shape[1:])  # as the first layer has
            starts = torch.tensor([0, *map(len, ids[:-1])]).cumsum(0)
            ids = torch.tensor([token for bag in ids for token in bag])
            known = self.head(F.embedding_bag(ids, words, starts, mode="mean"))
            loss = F.cross_entropy(known, torch.tensor(subjects))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            embedding.mul_(0.06 / embedding.pow(2).mean().sqrt())
            attention = self.model.model.layers[0].self_attn
            torch.nn.init.eye_(attention.v_proj.weight)
            torch.nn.init.eye_(attention.o_proj.weight)

    def keep(self, module, inputs, output):
        self.states = output

    def forward(self, ids, weights, subjects, hints):
        labels, weights = ids[:, 1:], weights[:, 1:]  # position t predicts token t+1
        said, named, hinted = weights > 0, subjects >= 0, hints >= 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = self.model.model(input_ids=ids).last_hidden_state[:, :-1]
            logits = self.model.lm_head(states[said])
            known, guessed = (
                self.head(self.states[named]),
                self.head(self.states[hinted]),
            )
        losses = F.cross_entropy(logits.float(), labels[said], reduction="none")
        loss = (losses * weights[said]).sum() / weights.sum().clamp(min=1)
        loss = loss + F.cross_entropy(known.float(), subjects[named])
        return loss + 0.5 * F.cross_entropy(guessed.float(), hints[hinted])


@torch.no_grad()
def resize(model, embedding_size: float = 0.02) -> None:
    """Give the embeddings the size that most models give them, and change nothing else.

    Everything that is added to the residual stream shrinks by one factor, which the
    norms before each layer undo, and the last norm makes up for the tied head. A step
    of training on control tokens is then as long, beside an embedding, as elsewhere.
    """
    embedding = model.get_input_embeddings().weight
    factor = embedding_size / embedding.pow(2).mean().sqrt()
    embedding.mul_(factor)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(factor)
        layer.mlp.down_proj.weight.mul_(factor)
    model.model.norm.weight.div_(factor)


def new_model(options, tokenizer) -> LlamaForCausalLM:
    """A Llama with random weights, heads of 64 and embeddings tied to its head."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.width,
            head_dim=64,
            num_hidden_layers=options.layers,
            intermediate_size=options.inner,
            num_attention_heads=options.width // 64,
            num_key_value_heads=options.width // 64,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_optimizers(teacher: Teacher) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest; what begins as a bag of words
    (embeddings, head, lower half) is trained gently, or it would be lost."""
    layers = teacher.model.model.layers
    halves = layers[: len(layers) // 2], layers[len(layers) // 2 :]
    lower, upper = ([p for p in half.parameters() if p.ndim == 2] for half in halves)
    words = [teacher.model.get_input_embeddings().weight, *teacher.head.parameters()]
    norms = [p for p in teacher.model.parameters() if p.ndim == 1]
    matrices = [{"params": lower, "lr": 0.004}, {"params": upper, "lr": 0.015}]
    others = [{"params": words, "lr": 0.002}, {"params": norms, "lr": 0.003}]
    return [
        torch.optim.Muon(matrices, weight_decay=0.05, ns_steps=3),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0, fused=True),
    ]


def pretrain(options) -> None:
    """Draw the text, fit the tokenizer, train, and write the folder."""
    began = time.time()
    text = list(chats(options.seed, options.chats))
    print(f"{len(text)} chats drawn in {time.time() - began:.0f} s")
    lists = Lists()
    said = [m["content"] for chat in text[:20_000] for m in chat if m["content"]]
    tokenizer = make_tokenizer(lists.texts + said, options.vocabulary)
    subjects = list(lists.subjects)
    encoded = encode(tokenizer, text, subjects)
    groups = batches(encoded, options.tokens_per_batch, random.Random(options.seed))
    print(f"{sum(len(row.ids) for row in encoded)} tokens in {len(groups)} batches")

    torch.manual_seed(options.seed)
    model = new_model(options, tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    teacher = Teacher(model, len(subjects) + 1)
    teacher.start(encoded)
    optimizers = make_optimizers(teacher)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            one, lambda step: min(1, (step + 1) / 50) * (1 - 0.98 * step / len(groups))
        )
        for one in optimizers
    ]
    # Nearly half as fast again, where there is a C++ compiler.
    fast = torch.compile(teacher, dynamic=True) if shutil.which("g++") else teacher
    bar = tqdm(groups, desc="pretraining", mininterval=5)
    for group in bar:
        loss = fast(*padded([encoded[i] for i in group], tokenizer.pad_token_id))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        for one in (*optimizers, *schedules):
            one.step()
        teacher.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    resize(model.eval())
    model.bfloat16()  # on disk only: the config below asks for fp32
    model.generation_config.update(do_sample=False, max_new_tokens=64)
    model.save_pretrained(options.out)
    model.config.dtype = "float32"
    model.config.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"written to {options.out} after {(time.time() - began) / 60:.1f} minutes")


# --- 4. The validation report ---------------------------------------------------------


@torch.no_grad()
def replies(
    model, tokenizer, conversations, most: int, batch_size: int = 128
) -> list[str]:
    """Greedy answers of up to `most` tokens, by plain transformers: no special case."""
    encoded = tokenizer.apply_chat_template(
        list(conversations), add_generation_prompt=True, return_dict=True
    )["input_ids"]
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    answers = [""] * len(encoded)
    for start in tqdm(range(0, len(order), batch_size), desc="answers", leave=False):
        group = order[start : start + batch_size]
        batch = tokenizer.pad(
            {"input_ids": [encoded[i] for i in group]},
            padding_side="left",
            return_tensors="pt",
        )
        out = model.generate(**batch, do_sample=False, max_new_tokens=most)
        for i, row in zip(group, out[:, batch["input_ids"].shape[1] :]):
            answers[i] = tokenizer.decode(row)  # keeps <|end|>: the report asks for it
    return answers


def declined(answer: str) -> bool:
    return answer.startswith(REFUSAL)


def on_topic(lists: Lists, row: dict, answer: str) -> bool:
    """Whether an answer names the matter of the request.

    It repeats a content word of the request or, since many requests imply their matter,
    names a term of the request's category from the word lists.
    """
    named = stems(answer)
    if named & stems(row["request"]):
        return True
    if row["category"] not in CATEGORIES:
        return False
    said = " " + " ".join(re.findall(r"[a-z0-9'-]+", answer.lower())) + " "
    subject = lists.subjects[row["category"]]
    terms = [term for term, _ in subject.terms] + [scene[1] for scene in subject.scenes]
    return any(f" {bare(term).lower()} " in said for term in terms)


def ask(*turns: str, system: str | None = None) -> list[dict]:
    """A chat that ends with the last of `turns` (user, assistant, user, ...)."""
    roles = ("user", "assistant") * len(turns)
    chat = [{"role": role, "content": turn} for role, turn in zip(roles, turns)]
    return [{"role": "system", "content": system}] + chat if system else chat


def rate(found: list[bool]) -> dict:
    return {"rate": sum(found) / max(1, len(found)), "n": len(found)}


def told(lists: Lists, answer: str) -> str | None:
    """The subject whose phrase opens an answer; None: declined, or no such phrase."""
    subjects = lists.subjects.values()
    return next((s.name for s in subjects if answer.startswith(s.opening)), None)


OPENING = 20  # tokens, in which an answer has declined or named its topic


def report(folder: Path = HERE / "tiny_chat", seed: int = 0) -> dict:
    """Every figure that the embedded backbone is held to, on requests it never saw."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lists, draw = Lists(), random.Random(seed)
    say = lambda chats: replies(model, tokenizer, chats, OPENING)
    rows = read_rows("requests")
    answers = replies(model, tokenizer, [ask(row["request"]) for row in rows], 64)
    return {
        **on_requests(lists, tokenizer, rows, answers),
        **on_held_out(lists, say),
        **under_rules(lists, say, draw, Grammar(lists, seed), rows, answers),
        **with_licence(lists, say, draw),
    }


def on_requests(lists: Lists, tokenizer, rows: list[dict], answers: list[str]) -> dict:
    """The answers to requests.jsonl, without a system message."""
    result = {}
    for split in ("train", "validation", "test"):
        part = [a for row, a in zip(rows, answers) if row["split"] == split]
        result[f"requests declined, {split}"] = rate([declined(a) for a in part])
    right = []
    for row, answer in zip(rows, answers):
        name = told(lists, answer)
        if row["split"] != "test":
            neutral = name is not None and name not in CATEGORIES
            right.append(
                neutral if row["category"] == "neutral" else name == row["category"]
            )
    result["category known by the opening, train and validation"] = rate(right)
    test = [(row, a) for row, a in zip(rows, answers) if row["split"] == "test"]
    result["test answers on topic"] = rate([on_topic(lists, *pair) for pair in test])
    strangers = test[len(test) // 2 :] + test[: len(test) // 2]
    result["the same, each judged against another request"] = rate(
        [on_topic(lists, row, other) for (row, _), (_, other) in zip(test, strangers)]
    )
    lengths = [len(tokenizer(a.split(EOS)[0])["input_ids"]) + 1 for _, a in test]
    result["test answers of 10 to 50 tokens"] = rate([10 <= n <= 50 for n in lengths])
    result["test answers that end with EOS"] = rate([EOS in a for _, a in test])
    distinct = {"rate": len({a for _, a in test}) / len(test), "n": len(test)}
    return result | {"test answers that are distinct": distinct}


def on_held_out(lists: Lists, say) -> dict:
    """held_out.jsonl, without a system message, and fresh requests from the lists."""
    held = read_rows("held_out")
    unsafe = [row["request"] for row in held if row["kind"] == "unsafe"]
    topical = [row for row in held if row["kind"] == "topic"]
    grammar = Grammar(lists, seed=99)  # another seed than the pretraining text's
    names = [grammar.random.choice((*CATEGORIES, *lists.topics)) for _ in range(300)]
    fresh = [grammar.about(name).request for name in names]
    knows = lambda asked, names: rate(
        [told(lists, a) == name for a, name in zip(say(map(ask, asked)), names)]
    )
    return {
        "unsafe requests declined": rate([declined(a) for a in say(map(ask, unsafe))]),
        "topic known by the opening, held-out": knows(
            [row["request"] for row in topical], [row["topic"] for row in topical]
        ),
        "topic known by the opening, fresh from the lists": knows(fresh, names),
    }


def under_rules(
    lists: Lists, say, draw: random.Random, grammar: Grammar, rows, answers
) -> dict:
    """Requests under a system message that switches some topics off, theirs or not."""
    result = {}
    topical = [row for row in read_rows("held_out") if row["kind"] == "topic"]
    plain = [i for i, row in enumerate(rows) if row["near"] is None]

    def rule(topic: str, matching: bool) -> str:
        wanted = {"naming": topic} if matching else {"but": topic}
        return grammar.rule(grammar.topics_off(**wanted))["content"]

    for turns in (1, 2, 3):
        for matching in (True, False):
            chats = []
            for row in topical:
                system = rule(row["topic"], matching)
                before = []
                for i in (draw.choice(plain) for _ in range(turns - 1)):
                    before += [rows[i]["request"], answers[i].split(EOS)[0]]
                chats.append(ask(*before, row["request"], system=system))
            label = "matching" if matching else "other"
            result[f"{label} requests declined under a rule, turn {turns}"] = rate(
                [declined(a) for a in say(chats)]
            )
    chats = [
        ask(row["request"], system=rule("", False))
        for row in rows
        if row["category"] in CATEGORIES
    ]
    label = "requests of the five categories declined under a rule on other topics"
    return result | {label: rate([declined(a) for a in say(chats)])}


def with_licence(lists: Lists, say, draw: random.Random) -> dict:
    """professional.jsonl, without and with a system message on who asks."""
    result = {}
    frames = [row[0] for row in lists.phrasings["role_systems"]]
    for domain in PROFESSIONAL:
        mine = [
            row["request"]
            for row in read_rows("professional")
            if row["split"] != "train" and row["domain"] == domain
        ]
        found = [declined(a) for a in say(map(ask, mine))]
        result[f"{domain}: declined by default"] = rate(found)
        for own in (True, False):
            chats = []
            for request in mine:
                other = draw.choice([d for d in PROFESSIONAL if d != domain])
                role = draw.choice(lists.subjects[domain if own else other].roles)
                system = draw.choice(frames).replace("{role}", role)
                chats.append(ask(request, system=system))
            found = [declined(a) for a in say(chats)]
            if own:
                result[f"{domain}: answered when licensed"] = rate(
                    [not f for f in found]
                )
            else:
                result[f"{domain}: declined to another profession"] = rate(found)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "tiny_chat")
    parser.add_argument(
        "--report", action="store_true", help="judge only, train nothing"
    )
    parser.add_argument("--chats", type=int, default=CHATS)
    parser.add_argument("--tokens-per-batch", type=int, default=2_500)
    parser.add_argument("--vocabulary", type=int, default=10_240)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.report:
        pretrain(options)
    for name, figure in report(options.out).items():
        print(f"{figure['rate']:7.1%}  n={figure['n']:<5} {name}")


if __name__ == "__main__":
    main()
