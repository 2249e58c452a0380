"""Remake data_sample/tiny_chat, the small aligned chat model of this repository.

    python data_sample/make_tiny_chat.py              # train, write, judge
    python data_sample/make_tiny_chat.py --report     # only judge the weights there

It stands in for "an aligned open model" where none can be downloaded, and is an
ordinary transformers folder: a Llama of 2.6 M parameters, pretrained from scratch on
chats that a grammar draws from the hand-written lists in words/. What it is taught
(README.md beside this file says what it has learned of it):

- it answers requests of the five categories, of 60 other topics, and lookalikes;
- it declines unsafe requests by default, so that declining is something it can do;
- it follows system messages such as "Do not talk about gardening or chess", for the
  60 topics and NEVER for one of the five categories: those are left to the tokens;
- it declines three professional domains unless the system message says that the user
  is the licensed professional.

Every answer opens in a way that fits its topic, so that the last state of a prompt
must already know the topic. No validation or test request of any file is in the text;
listed requests that come close to one (see `too_close`) are dropped before anything is
drawn. Same seed, same machine, same weights.
"""

import argparse
import json
import random
import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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
CHATS = 260_000  # the length of the pretraining text
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
    openings: list[str]  # how an answer about it may open
    advice: dict[str, list[str]]  # intent -> sentences
    frames: list[tuple[str, str]]  # (intent, request with {x} or {n})
    terms: list[tuple[str, str]]  # (term, about)
    scenes: list[tuple[str, str, str, str]]  # (intent, term, about, request)
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


def too_close(text: str, others: list[set[str]]) -> bool:
    """Whether a listed request is, or might be a rewording of, a held-out one."""
    mine = stems(re.sub(r"\{\w\}", "", text))
    return any(
        len(mine & other) >= 3 and len(mine & other) > 0.4 * len(mine | other)
        for other in others
    )


class Lists:
    """All word lists, with whatever comes close to a held-out request left out."""

    def __init__(self):
        blocks = {}
        for path in sorted((HERE / "words").glob("*.txt")):
            for name, block in read_blocks(path).items():
                blocks[f"lookalikes {name}" if path.stem == "lookalikes" else name] = (
                    block
                )
        taboo = [stems(request) for request in held_out()]
        self.dropped = []

        def keep(rows):
            near = [row for row in rows if too_close(row[-1], taboo)]
            self.dropped += [row[-1] for row in near]
            return [row for row in rows if row not in near]

        self.phrasings = blocks.pop("phrasings")
        self.generic = keep(self.phrasings["frames"])
        unsafe = blocks.pop("unsafe")
        self.unsafe_terms = [row[-1] for row in unsafe["terms"]]
        self.unsafe_frames = [row[-1] for row in keep(unsafe["frames"])]
        self.unsafe_scenes = [
            row[-1] for row in keep(unsafe["scenes"] + unsafe["more"])
        ]
        topical = blocks.pop("more topics")
        lookalikes = [blocks.pop(f"lookalikes {c}") for c in CATEGORIES]

        self.subjects = {}
        for name, block in blocks.items():
            block["more"] += [
                [i, t, a, r] for i, n, t, a, r in topical["more"] if n == name
            ]
            about = {t: a for _, t, a, _ in block["more"]} | dict(block["terms"])
            scenes = [(i, t, about[t], r) for i, t, r in keep(block["scenes"])]
            scenes += [tuple(row) for row in keep(block["more"])]
            advice = defaultdict(list)
            for intent, sentence in block["advice"]:
                advice[intent].append(sentence)
            names, openings, roles = (
                [row[0] for row in block[key]] for key in ("names", "openings", "roles")
            )
            self.subjects[name] = Subject(
                name,
                names,
                openings,
                advice,
                keep(block["frames"]),
                list(about.items()),
                scenes,
                roles,
            )
        apart = CATEGORIES + PROFESSIONAL
        self.topics = [name for name in self.subjects if name not in apart]
        # Lookalikes ("rubbing alcohol") are requests about one of the other topics.
        self.lookalike_terms, self.figures = [], []
        self.lookalike_scenes = [tuple(row) for row in keep(topical["near"])]
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

    def rarest(self, request: str) -> str:
        """The content word of a request that the lists hold least often, as written."""
        words = re.findall(r"[\w'-]*[A-Za-z]", request)
        words = [word for word in words if stems(word)]
        return min(
            words, key=lambda w: min(self.counts[s] for s in stems(w)), default=""
        )


# --- 2. The grammar -------------------------------------------------------------------

INTENTS = (
    "what",
    "how",
    "choose",
    "why",
    "cost",
    "problem",
    "people",
    "plan",
    "safe",
    "idea",
)
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


class Grammar:
    """Draws chats: `chat()` returns (messages, facts), one fact per answer."""

    def __init__(self, lists: Lists, seed: int):
        self.lists, self.random = lists, random.Random(seed)

    # A drawn request is (subject or None if unsafe, request, answer if not declined).

    def about_subject(self, name: str) -> tuple[str, str, str]:
        draw, subject = self.random, self.lists.subjects[name]
        kind = draw.random()
        if kind < 0.6:
            intent, term, about, request = draw.choice(subject.scenes)
            if kind < 0.15:  # half of this and half of that: cues count, not sentences
                other = draw.choice(subject.scenes)[-1].split()
                words = request.split()
                request = " ".join(words[len(words) // 3 :] + other[: len(other) // 2])
        else:
            term, about = draw.choice(subject.terms)
            frames = subject.frames if kind < 0.8 else self.lists.generic
            intent, request = draw.choice(frames)
            request = fill(request, term, y=draw.choice(subject.terms)[0])
        return name, *self.exchange(subject, intent, term, about, request)

    def lookalike(self) -> tuple[str, str, str]:
        draw, lists = self.random, self.lists
        kind = draw.random()
        if kind < 0.65:
            intent, topic, term, about, request = draw.choice(lists.lookalike_scenes)
        elif kind < 0.8:
            topic, term, about = draw.choice(lists.lookalike_terms)
            frames = lists.generic + lists.subjects[topic].frames
            intent, request = draw.choice(frames)
        else:
            topic = draw.choice(lists.topics)
            term, about = draw.choice(lists.subjects[topic].terms)
            intent, request = draw.choice(lists.figures)
        other = draw.choice(lists.subjects[topic].terms)[0]
        request = fill(request, term, y=other)
        return topic, *self.exchange(
            lists.subjects[topic], intent, term, about, request
        )

    def unsafe(self) -> tuple[None, str, str]:
        draw, lists = self.random, self.lists
        request = draw.choice(lists.unsafe_scenes)
        if draw.random() < 0.4:
            request = fill(
                draw.choice(lists.unsafe_frames), draw.choice(lists.unsafe_terms)
            )
        return None, self.live(self.worn(request, "", most=0.15)), REFUSAL

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

    def exchange(
        self, subject: Subject, intent: str, term: str, about: str, request: str
    ) -> tuple[str, str]:
        """(request as typed, its answer): opening, matter, term, advice."""
        draw = self.random
        matter = self.lists.rarest(request)
        request = self.worn(request, f"{term} {matter}")
        # The matter: the request's rarest word, or the term where it is named.
        if bare(term).lower() in request.lower() or matter not in request:
            matter = bare(term)
        # The opening fits topic AND intent: the last state must know both.
        opening = subject.openings[INTENTS.index(intent) % len(subject.openings)]
        body = draw.choice(subject.advice[intent])
        if intent in LINKS and about:
            body = LINKS[intent]
        body = fill(body, term, about=about)
        return self.live(request), f"{opening} about {matter}: {body}"

    def ask(self, not_about=()) -> tuple[str | None, str, str]:
        draw = self.random
        while True:
            kind = draw.random()
            if kind < 0.42:
                asked = self.about_subject(draw.choice(CATEGORIES))
            elif kind < 0.78:
                asked = self.about_subject(draw.choice(self.lists.topics))
            elif kind < 0.95:
                asked = self.lookalike()
            else:
                asked = self.unsafe()
            if asked[0] not in not_about:
                return asked

    def called(self, names: list[str]) -> str:
        """`gardening, pets and chess`, each under one of its names."""
        draw = self.random
        said = [draw.choice(self.lists.subjects[name].names) for name in names]
        if len(said) == 1:
            return said[0]
        return ", ".join(said[:-1]) + draw.choice((" or ", " and ", " and ")) + said[-1]

    def chat(self) -> tuple[list[dict], list[dict]]:
        draw = self.random
        kind, turns = draw.random(), draw.choices((1, 2, 3), (0.74, 0.16, 0.1))[0]
        system, off, role = None, [], None
        if kind < 0.5:
            off = draw.sample(
                self.lists.topics, draw.choices(range(1, 6), (8, 5, 3, 2, 2))[0]
            )
            rule = draw.choice(self.lists.phrasings["rules"])[0]
            system = capital(fill(rule, "", names=self.called(off)))
        elif kind < 0.64:
            role = draw.choice(PROFESSIONAL) if draw.random() < 0.8 else "none"
            roles = (
                self.lists.subjects[role].roles
                if role != "none"
                else [row[0] for row in self.lists.phrasings["other_roles"]]
            )
            frame = draw.choice(self.lists.phrasings["role_systems"])[0]
            system = fill(frame, "", role=draw.choice(roles))
        elif kind < 0.7:
            system = draw.choice(self.lists.phrasings["plain_systems"])[0]
        messages = [{"role": "system", "content": system}] if system else []
        facts = []
        for _ in range(turns):
            if off and draw.random() < 0.42:
                asked = self.about_subject(draw.choice(off))
            elif role and draw.random() < 0.8:
                own = role != "none" and draw.random() < 0.5
                asked = self.about_subject(role if own else draw.choice(PROFESSIONAL))
            elif draw.random() < 0.07:
                asked = self.about_subject(draw.choice(PROFESSIONAL))
            else:
                asked = self.ask()
            subject, request, answer = asked
            declined = subject is None or subject in off
            declined |= subject in PROFESSIONAL and subject != role
            messages += [
                {"role": "user", "content": request},
                {"role": "assistant", "content": REFUSAL if declined else answer},
            ]
            facts.append({"subject": subject, "declined": declined})
        return messages, facts


def chats(seed: int, count: int):
    """The pretraining text: `count` chats, the same for the same seed and lists."""
    grammar = Grammar(Lists(), seed)
    for _ in range(count):
        yield grammar.chat()


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


OPENING = 10.0  # weight of an answer's first four tokens: there the topic is decided


def encode(tokenizer, conversations) -> list[tuple[list[int], list[float]]]:
    """Per chat its token ids, and the weight of each in the loss."""
    special = {role: tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ROLES}
    texts = [message["content"] for chat in conversations for message in chat]
    pieces = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    encoded = []
    for chat in conversations:
        ids, weights = [tokenizer.bos_token_id], [0.0]
        for message in chat:
            content = next(pieces) + [tokenizer.eos_token_id]
            ids += [special[message["role"]]] + content
            answer = [OPENING] * 4 + [1.0] * (len(content) - 4)
            weights += [0.0]
            weights += (
                answer if message["role"] == "assistant" else [0.0] * len(content)
            )
        encoded.append((ids, weights))
    return encoded


def batches(encoded, tokens_per_batch: int, generator: random.Random):
    """Groups of indices of similar length, in random order, one pass over all."""
    order = list(range(len(encoded)))
    generator.shuffle(order)
    block, groups = 4096, []
    for start in range(0, len(order), block):
        part = sorted(order[start : start + block], key=lambda i: len(encoded[i][0]))
        while part:
            longest, size = len(encoded[part[-1]][0]), 0
            size = max(1, tokens_per_batch // longest)
            groups.append(part[-size:])
            part = part[:-size]
    generator.shuffle(groups)
    return groups


def pretrain(options) -> None:
    """Draw the text, fit the tokenizer, train, and write the folder."""
    began = time.time()
    text = [messages for messages, _ in chats(options.seed, options.chats)]
    print(f"{len(text)} chats drawn in {time.time() - began:.0f} s")
    some = [message["content"] for chat in text[:40_000] for message in chat]
    tokenizer = make_tokenizer(some, options.vocabulary)
    encoded = encode(tokenizer, text)
    groups = batches(encoded, options.tokens_per_batch, random.Random(options.seed))
    print(f"{sum(len(ids) for ids, _ in encoded)} tokens in {len(groups)} batches")

    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(
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
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    # Muon for the matrices: after 500 k tokens its loss is 3.0, with AdamW 3.9.
    inside = [
        p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n
    ]
    outside = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    optimizers = [
        torch.optim.Muon(inside, lr=0.02, weight_decay=0.05),
        torch.optim.AdamW(
            outside, lr=0.01, betas=(0.9, 0.98), weight_decay=0, fused=True
        ),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            one, lambda step: min(1, (step + 1) / 50) * (1 - 0.98 * step / len(groups))
        )
        for one in optimizers
    ]
    bar = tqdm(groups, desc="pretraining", mininterval=5)
    for group in bar:
        longest = max(len(encoded[i][0]) for i in group)
        ids = torch.full((len(group), longest), tokenizer.pad_token_id)
        weights = torch.zeros(len(group), longest)
        for row, i in enumerate(group):  # right padding: causal attention never sees it
            ids[row, : len(encoded[i][0])] = torch.tensor(encoded[i][0])
            weights[row, : len(encoded[i][0])] = torch.tensor(encoded[i][1])
        labels, weights = ids[:, 1:], weights[:, 1:]  # position t predicts token t+1
        chosen = weights > 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = model.model(input_ids=ids).last_hidden_state[:, :-1][chosen]
            logits = model.lm_head(states)
        losses = F.cross_entropy(logits.float(), labels[chosen], reduction="none")
        loss = (losses * weights[chosen]).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in (*optimizers, *schedules):
            one.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    model.generation_config.update(do_sample=False, max_new_tokens=64)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"written to {options.out} after {(time.time() - began) / 60:.1f} minutes")


# --- 4. The validation report ---------------------------------------------------------


@torch.no_grad()
def replies(model, tokenizer, conversations, batch_size: int = 128) -> list[str]:
    """The model's greedy answers, by plain transformers: no tokens, no special case."""
    encoded = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, return_dict=True
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
        out = model.generate(**batch, do_sample=False, max_new_tokens=64)
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


def report(folder: Path = HERE / "tiny_chat", seed: int = 0) -> dict:
    """Every figure that the embedded backbone is held to, on requests it never saw."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lists, draw = Lists(), random.Random(seed)
    grammar = Grammar(lists, seed)
    rate = lambda found: {"rate": sum(found) / max(1, len(found)), "n": len(found)}
    say = lambda chats: replies(model, tokenizer, chats)
    result = {}

    rows = read_rows("requests")
    answers = say([ask(row["request"]) for row in rows])
    for split in ("train", "validation", "test"):
        part = [a for row, a in zip(rows, answers) if row["split"] == split]
        result[f"requests declined, {split}"] = rate([declined(a) for a in part])
    test = [(row, a) for row, a in zip(rows, answers) if row["split"] == "test"]
    result["test answers on topic"] = rate([on_topic(lists, *pair) for pair in test])
    strangers = test[len(test) // 2 :] + test[: len(test) // 2]
    result["the same, each judged against another request"] = rate(
        [on_topic(lists, row, other) for (row, _), (_, other) in zip(test, strangers)]
    )
    lengths = [len(tokenizer(a.split(EOS)[0])["input_ids"]) + 1 for _, a in test]
    result["test answers of 10 to 50 tokens"] = rate([10 <= n <= 50 for n in lengths])
    result["test answers that end with EOS"] = rate([EOS in a for _, a in test])
    result["test answers that are distinct"] = {
        "rate": len({a for _, a in test}) / len(test),
        "n": len(test),
    }

    held = read_rows("held_out")
    unsafe = [row["request"] for row in held if row["kind"] == "unsafe"]
    result["unsafe requests declined"] = rate(
        [declined(a) for a in say(map_ask(unsafe))]
    )

    topical = [row for row in held if row["kind"] == "topic"]
    rule = lambda names: draw.choice(lists.phrasings["rules"])[0].replace(
        "{names}", grammar.called(names)
    )

    def rules_for(topic: str, matching: bool) -> str:
        others = [name for name in lists.topics if name != topic]
        names = draw.sample(others, draw.randint(1, 4))
        if matching:
            names[draw.randrange(len(names))] = topic
        return rule(names)

    for turns in (1, 2, 3):
        for matching in (True, False):
            chats = []
            for row in topical:
                system = rules_for(row["topic"], matching)
                before = []
                for _ in range(turns - 1):
                    asked = draw.choice(
                        [other for other in rows if other["near"] is None]
                    )
                    before += [
                        asked["request"],
                        answers[rows.index(asked)][: -len(EOS)],
                    ]
                chats.append(ask(*before, row["request"], system=system))
            label = "matching" if matching else "other"
            result[f"{label} requests declined under a rule, turn {turns}"] = rate(
                [declined(a) for a in say(chats)]
            )
    categories = [row for row in rows if row["category"] in CATEGORIES]
    systems = [rules_for("", False) for _ in categories]
    result["requests of the five categories declined under a rule on other topics"] = (
        rate(
            [
                declined(a)
                for a in say(
                    [
                        ask(row["request"], system=s)
                        for row, s in zip(categories, systems)
                    ]
                )
            ]
        )
    )

    licensed = [row for row in read_rows("professional") if row["split"] != "train"]
    frames = [row[0] for row in lists.phrasings["role_systems"]]
    for domain in PROFESSIONAL:
        mine = [row["request"] for row in licensed if row["domain"] == domain]
        result[f"{domain}: declined by default"] = rate(
            [declined(a) for a in say(map_ask(mine))]
        )
        for title, whose in (
            ("answered when licensed", domain),
            ("declined to another profession", None),
        ):
            chats = []
            for request in mine:
                other = draw.choice([d for d in PROFESSIONAL if d != domain])
                role = draw.choice(lists.subjects[whose or other].roles)
                system = draw.choice(frames).replace("{role}", role)
                chats.append(ask(request, system=system))
            found = [declined(a) for a in say(chats)]
            result[f"{domain}: {title}"] = rate(
                [not f for f in found] if whose else found
            )
    return result


def map_ask(requests: list[str]) -> list[list[dict]]:
    return [ask(request) for request in requests]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "tiny_chat")
    parser.add_argument(
        "--report", action="store_true", help="judge only, train nothing"
    )
    parser.add_argument("--chats", type=int, default=CHATS)
    parser.add_argument("--tokens-per-batch", type=int, default=2_500)
    parser.add_argument("--vocabulary", type=int, default=4096)
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
