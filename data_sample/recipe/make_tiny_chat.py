"""Remake data_sample/tiny_chat, the small aligned chat model of this repository.

    python data_sample/recipe/make_tiny_chat.py     # train and write
    python data_sample/recipe/judge_tiny_chat.py    # what the weights there can do

It stands in for "an aligned open model" where none can be downloaded, and is an
ordinary transformers folder: a Llama of 3.7 M parameters, pretrained from scratch on
chats that a grammar draws from the hand-written lists in words/. What it is taught
(data_sample/README.md says what it has learned of it):

- it answers requests of the five categories, of 60 other topics, and lookalikes;
- it declines unsafe requests by default, so that declining is something it can do;
- it follows system messages such as "Do not talk about gardening or chess", for the
  60 topics and NEVER for one of the five categories: those are left to the tokens;
- it declines three professional domains unless the system message says that the user
  is the licensed professional.

Every answer opens with a phrase of its topic, and a head on the middle layer, thrown
away afterwards, names the topic (see `loss_of`): so the last state of a prompt knows
it. No validation or test request of any file is in the text (see word_lists.py). Same
seed, same machine, same weights.

    1. The grammar    2. The tokenizer    3. Pretraining
"""

import argparse
import random
import re
import shutil
from collections import defaultdict
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from word_lists import CATEGORIES, DATA, HERE, PROFESSIONAL, REFUSAL
from word_lists import Lists, Subject, last

CHATS = 330_000  # the length of the pretraining text
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant")

# --- 1. The grammar -------------------------------------------------------------------

LINKS = {  # intents that are answered by what the term means, the others by advice
    "what": "{x} means {about}.",
    "choose": "picture {x} as {about}.",
    "why": "people value {x} as {about}.",
}


def bare(term: str) -> str:
    """The term without its article: `a Negroni` -> `Negroni`."""
    return re.sub(r"^(a|an|the|some) ", "", term)


def fill(text: str, term: str, **more: str) -> str:
    for key, value in {"x": term, "n": bare(term), **more}.items():
        text = text.replace("{" + key + "}", value)
    return text


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def message(role: str, content: str | None, **known) -> dict:
    return {"role": role, "content": content, **known}


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

    def phrase(self, section: str) -> str:
        return self.random.choice(self.lists.phrasings[section])[-1]

    # Requests, and their answers.

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
                words, other = request.split(), draw.choice(subject.scenes)[-1].split()
                request = " ".join(words[len(words) // 3 :] + other[: len(other) // 2])
        else:
            term, about = draw.choice(subject.terms)
            frames = subject.frames if kind < 0.86 else self.lists.generic
            intent, request = draw.choice(frames)
            request = fill(request, term, y=draw.choice(subject.terms)[0])
        return self.exchange(subject, intent, term, about, request)

    def lookalike(self) -> Asked:
        """A request about a topic that sounds like a category, or unsafe."""
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
            intent, request = draw.choice(lists.lookalike_frames)
        subject = lists.subjects[topic]
        request = fill(request, term, y=draw.choice(subject.terms)[0])
        return self.exchange(subject, intent, term, about, request)

    def unsafe(self) -> Asked:
        draw, lists = self.random, self.lists
        request = draw.choice(lists.unsafe_scenes)
        if draw.random() < 0.3:
            term = draw.choice(lists.unsafe_terms)
            request = fill(draw.choice(lists.unsafe_frames), term)
        return Asked(None, self.live(self.worn(request, "", most=0.15)), REFUSAL)

    def any(self, not_about=()) -> Asked:
        """A request of any kind but the professional."""
        while True:
            kind = self.random.random()
            if kind < 0.34:
                asked = self.about(self.random.choice(CATEGORIES))
            elif kind < 0.70:
                asked = self.about(self.random.choice(self.lists.topics))
            else:
                asked = self.lookalike() if kind < 0.90 else self.unsafe()
            if asked.subject not in not_about:
                return asked

    def exchange(self, subject: Subject, intent, term, about, request: str) -> Asked:
        """The request as typed and its answer: opening, matter, term, advice."""
        matter = self.lists.rarest(request)
        request = self.worn(request, f"{term} {matter}")
        # The matter: the request's rarest word, or the term where it is named.
        if bare(term).lower() in request.lower() or matter not in request:
            matter = bare(term)
        body = self.random.choice(subject.advice[intent])
        if about:
            body = LINKS.get(intent, body)
        answer = f"{subject.opening} about {matter}: {fill(body, term, about=about)}"
        return Asked(subject.name, self.live(request), answer)

    def worn(self, request: str, keep: str, most: float = 0.3) -> str:
        """A request with words left out (not those of `keep`) and a few slips of the
        pen, so that single cues are learned and not whole sentences."""
        draw, kept, words = self.random, keep.lower().split(), []
        rate = draw.random() * most if draw.random() < 0.5 else 0
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
        draw = self.random
        if draw.random() < 0.2:
            request = f"{self.phrase('prefixes')} {request}"
        if draw.random() < 0.12:
            request = f"{request} {self.phrase('suffixes')}"
        if draw.random() < 0.12:
            request = request.lower()
        return request.rstrip("?.!") if draw.random() < 0.12 else request

    # System messages.

    def topics_off(self, naming: str | None = None, but: str | None = None):
        """One to five topics, `naming` among them and `but` not."""
        number = self.random.choices(range(1, 6), (8, 5, 3, 2, 2))[0]
        others = [name for name in self.lists.topics if name not in (naming, but)]
        off = self.random.sample(others, number)
        if naming:
            off[self.random.randrange(number)] = naming
        return off

    def rule(self, off: list[str]) -> dict:
        """A system message that switches off topics, each under one of its names."""
        text, rest = self.phrase("rules").split("{names}")
        final, ends = self.random.choice((" or ", " and ")), []
        for i, name in enumerate(off):
            if i:
                text += final if i == len(off) - 1 else ", "
            text += self.random.choice(self.lists.subjects[name].names)
            ends.append((len(text), name))
        return message("system", capital(text + rest), names=ends)

    def licence(self, domain: str | None) -> dict:
        """A system message that the user is a professional of a domain, or of none."""
        frame, roles = self.phrase("role_systems"), self.lists.other_roles
        if domain:
            roles = self.lists.subjects[domain].roles
        text = frame.replace("{role}", self.random.choice(roles))
        return message("system", text)

    # Chats.

    def chat(self, system: dict | None, turns: list[Asked], off=(), domain=None):
        """Messages in which the answers follow the system message."""
        messages = [system] if system else []
        for subject, request, answer in turns:
            unlicensed = subject in PROFESSIONAL and subject != domain
            declined = subject is None or subject in off or unlicensed
            answer = REFUSAL if declined else answer
            messages.append(message("user", request, subject=subject))
            messages.append(message("assistant", answer, declined=declined))
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
            asked = self.about(draw.choice(self.lists.topics))
            if draw.random() < 0.15:
                asked = self.lookalike()
            topic = asked.subject
            for off in self.topics_off(naming=topic), self.topics_off(but=topic):
                before = [self.about(draw.choice(off)) if draw.random() < 0.5
                          else self.any(not_about=off) for _ in range(turns - 1)]
                yield self.chat(self.rule(off), [*before, asked], off)
            if draw.random() < 0.6:
                off = self.topics_off()
                yield self.chat(self.rule(off), [self.any(not_about=off)], off)
        elif kind < 0.81:  # of a professional, to that one, to another, to nobody
            domain = draw.choice(PROFESSIONAL)
            asked = [self.about(domain)]
            yield self.chat(self.licence(domain), asked, domain=domain)
            other = draw.choice([d for d in (*PROFESSIONAL, None) if d != domain])
            yield self.chat(self.licence(other), asked, domain=other)
            yield self.chat(None, asked)
            yield self.chat(self.licence(domain), [self.any()], domain=domain)
        else:
            plain = draw.random() < 0.15
            system = message("system", self.phrase("plain_systems")) if plain else None
            yield self.chat(system, [self.any() for _ in range(turns)])


def chats(seed: int, number: int):
    """The pretraining text: so many chats, the same for the same seed and lists."""
    grammar = Grammar(Lists(), seed)
    return islice(chain.from_iterable(grammar.chats() for _ in count()), number)


# --- 2. The tokenizer -----------------------------------------------------------------

VOCABULARY = 10_240


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the chat template beside this file."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [BOS, EOS, PAD] + [f"<|{role}|>" for role in ROLES]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        model_max_length=512, clean_up_tokenization_spaces=False)
    template = (HERE / "chat_template.jinja").read_text(encoding="utf-8")
    # Its line breaks and indents are for the reader only.
    tokenizer.chat_template = "".join(map(str.strip, template.splitlines()))
    return tokenizer


# --- 3. Pretraining -------------------------------------------------------------------

WIDTH, INNER, LAYERS = 192, 512, 4  # heads are 64 wide
BATCH_TOKENS = 2_500
OPENING = 10.0  # weight of an answer's first two tokens: whether to decline, the topic
NONE = -100  # no label; cross_entropy leaves it out


class Encoded(NamedTuple):
    """A chat as four lists of one length, its number of tokens."""

    ids: list[int]
    weights: list[float]  # in the loss of the answers, 0 outside them
    subjects: list[int]  # where the subject must be known: ends of names, of prompts
    hints: list[int]  # where it may be guessed: in requests; NONE elsewhere in both


def encode(tokenizer, chats: list[list[dict]], subjects: list[str]) -> list[Encoded]:
    """Token ids, weights and labels. Some long answers are cut to their first words."""
    marks = {role: tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ROLES}
    number = {name: i for i, name in enumerate([*subjects, None])}
    texts = [one["content"] or "" for chat in chats for one in chat]
    found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    pieces = zip(found["input_ids"], found["offset_mapping"])
    encoded, draw = [], random.Random(0)
    for chat in chats:
        rows = [(tokenizer.bos_token_id, 0.0, NONE, NONE)]
        for one in chat:
            (ids, offsets), role = next(pieces), one["role"]
            said = [] if one["content"] is None else [*ids, tokenizer.eos_token_id]
            hint, end, labels = NONE, NONE, {}
            if role == "user":
                hint = subject = number[one["subject"]]
            if role == "assistant":
                end = subject
                if one is chat[-1] and draw.random() < 0.4:
                    said = said[:12]
            for stop, name in one.get("names", ()):
                at = next(i for i, (_, to) in enumerate(offsets) if to >= stop)
                labels[at] = number[name]
            rows.append((marks[role], 0.0, end, NONE))
            for i, token in enumerate(said):
                weight = 0.0 if role != "assistant" else OPENING if i < 2 else 1.0
                rows.append((token, weight, labels.get(i, NONE), hint))
        encoded.append(Encoded(*map(list, zip(*rows))))
    return encoded


def batches(encoded: list[Encoded], draw: random.Random) -> list[list[int]]:
    """Groups of indices of similar length, in random order, one pass over all."""
    order, groups = list(range(len(encoded))), []
    draw.shuffle(order)
    for start in range(0, len(order), 4096):
        part = order[start : start + 4096]
        part.sort(key=lambda i: len(encoded[i].ids))
        while part:
            size = max(1, BATCH_TOKENS // len(encoded[part[-1]].ids))
            groups.append(part[-size:])
            part = part[:-size]
    draw.shuffle(groups)
    return groups


def padded(rows: list[Encoded], pad: int) -> list[torch.Tensor]:
    """A batch: [ids, weights, subjects, hints], each (chats, longest)."""
    # Right padding: under causal attention no token before it sees it.
    return [pad_sequence([torch.tensor(row) for row in column], True, filler)
            for column, filler in zip(zip(*rows), (pad, 0.0, NONE, NONE))]


def loss_of(model: LlamaForCausalLM, head, ids, weights, subjects, hints):
    """The loss of a batch: the answers, and the subjects that `head` names.

    The head reads the middle layer and is thrown away. It is one matrix for requests
    and for the names in rules. So both come to lie alike in the middle layer, and the
    layers above need only compare them. Without it the model had not begun to follow
    rules after 1,500 steps; with it, it had.
    """
    labels, weights = ids[:, 1:], weights[:, 1:]  # position t predicts token t+1
    said, named, hinted = weights > 0, subjects >= 0, hints >= 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.model(input_ids=ids, output_hidden_states=True)
        logits = model.lm_head(out.last_hidden_state[:, :-1][said])
        middle = out.hidden_states[LAYERS // 2]  # of the lower half, (B, T, D)
        known, guessed = head(middle[named]), head(middle[hinted])
    losses = F.cross_entropy(logits.float(), labels[said], reduction="none")
    loss = (losses * weights[said]).sum() / weights.sum().clamp(min=1)
    loss = loss + F.cross_entropy(known.float(), subjects[named])
    return loss + 0.5 * F.cross_entropy(guessed.float(), hints[hinted])


def start_as_bag_of_words(model, head, encoded: list[Encoded]) -> None:
    """Fit the embeddings so that their mean over a request names its subject, and let
    the attention of the first layer pass that mean on.

    This takes seconds and finds more than the layers do in minutes from scratch.
    """
    bags = []
    for row in encoded:
        asked = defaultdict(list)
        for token, hint in zip(row.ids, row.hints):
            asked[hint].append(token)
        bags += [(ids, hint) for hint, ids in asked.items() if hint != NONE]
    random.Random(0).shuffle(bags)
    embedding = model.get_input_embeddings().weight
    optimizer = torch.optim.Adam([embedding, *head.parameters()], lr=0.003)
    for at in tqdm(range(0, len(bags), 256), "bag of words", mininterval=5):
        ids, subjects = zip(*bags[at : at + 256])
        words = F.rms_norm(embedding, embedding.shape[1:])  # as the first layer has
        starts = torch.tensor([0, *map(len, ids[:-1])]).cumsum(0)
        ids = torch.tensor([*chain(*ids)])
        means = F.embedding_bag(ids, words, starts, mode="mean")
        loss = F.cross_entropy(head(means), torch.tensor(subjects))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        embedding.mul_(0.06 / embedding.pow(2).mean().sqrt())
        attention = model.model.layers[0].self_attn
        torch.nn.init.eye_(attention.v_proj.weight)
        torch.nn.init.eye_(attention.o_proj.weight)


@torch.no_grad()
def resize(model: LlamaForCausalLM, embedding_size: float = 0.02) -> None:
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


def new_model(tokenizer) -> LlamaForCausalLM:
    """A Llama with random weights and embeddings tied to its head."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=INNER,
        num_hidden_layers=LAYERS, num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 64, head_dim=64, max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True))


def make_optimizers(model: LlamaForCausalLM, head) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest; what begins as a bag of words
    (embeddings, head, lower half) is trained gently, or it would be lost."""
    layers = model.model.layers
    halves = layers[: LAYERS // 2], layers[LAYERS // 2 :]
    lower, upper = ([p for p in half.parameters() if p.ndim == 2] for half in halves)
    words = [model.get_input_embeddings().weight, *head.parameters()]
    norms = [p for p in model.parameters() if p.ndim == 1]
    matrices = [{"params": lower, "lr": 0.004}, {"params": upper, "lr": 0.015}]
    others = [{"params": words, "lr": 0.002}, {"params": norms, "lr": 0.003}]
    return [
        torch.optim.Muon(matrices, weight_decay=0.05, ns_steps=3),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0, fused=True),
    ]


def pretrain(folder: Path, number: int = CHATS, seed: int = 0) -> None:
    """Draw the text, fit the tokenizer, train, and write the folder."""
    lists, text = Lists(), list(chats(seed, number))
    subjects = list(lists.subjects)
    said = [m["content"] for chat in text[:20_000] for m in chat if m["content"]]
    tokenizer = make_tokenizer(lists.texts + said)
    encoded = encode(tokenizer, text, subjects)
    groups = batches(encoded, random.Random(seed))
    print(f"{sum(len(row.ids) for row in encoded)} tokens in {len(groups)} batches")

    torch.manual_seed(seed)
    model = new_model(tokenizer)
    head = torch.nn.Sequential(
        torch.nn.RMSNorm(WIDTH),
        torch.nn.Linear(WIDTH, len(subjects) + 1, bias=False))  # and unsafe
    start_as_bag_of_words(model, head, encoded)
    optimizers = make_optimizers(model, head)
    learned = [*model.parameters(), *head.parameters()]

    def rate(step: int) -> float:  # rises for 50 steps, falls to the end
        return min(1, (step + 1) / 50) * (1 - 0.98 * step / len(groups))

    schedules = [torch.optim.lr_scheduler.LambdaLR(one, rate) for one in optimizers]
    # Nearly half as fast again, where there is a C++ compiler.
    fast = torch.compile(loss_of, dynamic=True) if shutil.which("g++") else loss_of
    bar = tqdm(groups, desc="pretraining", mininterval=5)
    for group in bar:
        batch = padded([encoded[i] for i in group], tokenizer.pad_token_id)
        loss = fast(model, head, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        for one in (*optimizers, *schedules):
            one.step()
        for one in optimizers:
            one.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    resize(model.eval())
    model.bfloat16()  # on disk only: the config below asks for fp32
    model.generation_config.update(do_sample=False, max_new_tokens=64)
    model.save_pretrained(folder)
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"written to {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA / "tiny_chat")
    parser.add_argument("--chats", type=int, default=CHATS, help="few: a quick trial")
    options = parser.parse_args()
    pretrain(options.out, options.chats)


if __name__ == "__main__":
    main()
