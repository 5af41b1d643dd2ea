"""Three seeded toy tasks in plain English, one of each kind, small enough to learn from random weights in a minute.

| task | what has to be learnt | why counting words is not enough |
| --- | --- | --- |
| sentiment | what an opinion comes to, given its adjectives | "not" turns a clause round; of two clauses the main one decides |
| similarity | how many of four slots mean the same in two sentences | a word counts by its twin or synonym in the other sentence |
| ranking | which document describes the thing that the query asks for | the same, and the order and wording of the attributes differ |

Every label follows from its text without exception. What a split is made of (a noun with its adjective, or the four concepts
of a description) belongs to that split alone, so validation and test hold only combinations that training never showed.
Nothing here depends on the machine: combinations are assigned by SHA-256, and the random streams are seeded with strings.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Iterator

from gemma_encoder.inputs.errors import InputError, unknown

SPLITS = ("train", "validation", "test")
SENTIMENT_CLASSES = ("negative", "positive")

# --- words: sentiment ---------------------------------------------------------------------------------------------------

NOUNS = (
    "acting animation cast dialogue direction editing ending finale hero humour lighting music narration pace photography plot "
    "premise romance scenery script sequel soundtrack story villain"
).split()

ADJECTIVES = {
    "negative": (
        "annoying awful bland boring clumsy confused dreadful dreary dull flat forgettable horrible lifeless mediocre "
        "pathetic pointless predictable shallow silly sloppy stale tedious terrible weak"
    ).split(),
    "positive": (
        "beautiful brilliant charming clever convincing delightful elegant engaging excellent fresh graceful gripping "
        "imaginative impressive lively lovely memorable moving powerful refreshing stunning superb witty wonderful"
    ).split(),
}

AFFIRMED = (
    "the {noun} was {adjective}",
    "the {noun} was truly {adjective}",
    "the {noun} seemed rather {adjective}",
    "i found the {noun} {adjective}",
    "everyone called the {noun} {adjective}",
    "it had a very {adjective} {noun}",
)
NEGATED = (
    "the {noun} was not {adjective}",
    "the {noun} was hardly {adjective}",
    "the {noun} was anything but {adjective}",
    "the {noun} never seemed {adjective}",
    "i did not find the {noun} {adjective}",
    "nobody called the {noun} {adjective}",
)
PLAIN = (
    "{main} from start to finish .",
    "in the end , {main} .",
    "to be honest , {main} .",
    "{main} , i thought .",
    "all in all , {main} .",
)
CONTRASTED = (
    "although {side} , {main} .",
    "{side} , but {main} .",
    "{side} , yet {main} .",
    "despite the {adjective} {noun} , {main} .",
    "{main} , although {side} .",
)
NEGATED_SHARE, CONTRASTED_SHARE = 0.2, 0.4  # low enough that adjectives alone say something, and learning has a start

# --- words: similarity and ranking --------------------------------------------------------------------------------------

# A concept is a pair of words for one thing. No word stands in two concepts, so a text has exactly one reading.
AGENTS = (
    ("doctor", "physician"), ("lawyer", "attorney"), ("child", "kid"), ("woman", "lady"),
    ("soldier", "trooper"), ("thief", "robber"),
)  # fmt: skip
ACTIONS = (  # past tense and participle are one word, so that a passive keeps it
    ("bought", "purchased"), ("repaired", "mended"), ("discovered", "noticed"), ("cleaned", "washed"),
    ("smashed", "shattered"), ("carried", "hauled"),
)  # fmt: skip
OBJECTS = (
    ("chair", "seat"), ("sofa", "couch"), ("cup", "mug"), ("bag", "sack"),
    ("lamp", "lantern"), ("box", "crate"),
)  # fmt: skip
PLACES = (
    ("shop", "store"), ("forest", "woods"), ("street", "road"), ("beach", "shore"),
    ("church", "chapel"), ("hill", "slope"),
)  # fmt: skip
COLOURS = (
    ("red", "scarlet"), ("purple", "violet"), ("blue", "azure"), ("green", "emerald"),
    ("white", "ivory"), ("black", "ebony"),
)  # fmt: skip
MATERIALS = (  # adjective, noun
    ("wooden", "wood"), ("woollen", "wool"), ("silken", "silk"), ("leather", "leather"),
    ("plastic", "plastic"), ("metal", "metal"),
)  # fmt: skip
SYNONYM_SHARE = 0.15

EVENT = {"agent": AGENTS, "action": ACTIONS, "object": OBJECTS, "place": PLACES}
SENTENCES = (
    "the {agent} {action} the {object} near the {place} .",
    "near the {place} , the {agent} {action} the {object} .",
    "the {object} was {action} by the {agent} near the {place} .",
    "it was the {agent} who {action} the {object} near the {place} .",
)
ITEM = {"colour": COLOURS, "material": MATERIALS, "object": OBJECTS, "place": PLACES}
QUERIES = (
    "{colour} {material} {object} near the {place}",
    "{material} {object} in {colour} , near the {place}",
    "near the {place} , a {colour} {material} {object}",
)
DOCUMENTS = (
    "near the {place} stands a {colour} {object} made of {material_noun} .",
    "this {object} , {colour} and {material} , was left near the {place} .",
    "we saw a {material} {object} painted {colour} near the {place} .",
    "someone near the {place} sells a {colour} {object} of {material_noun} .",
)


def sentiment(split: str, size: int, seed: int = 0) -> list[tuple[dict[str, str], float]]:
    """Opinions of films: ({"sentence"}, class index in `SENTIMENT_CLASSES`), half of them of each class.

    A split owns pairs of a noun and an adjective. Raises InputError for a split that does not exist, or one too small for
    `size` different texts.
    """
    rng = _stream("sentiment", split, seed)
    labels = [index % 2 for index in range(size)]
    rng.shuffle(labels)

    def draw(index: int):
        sentence = _opinion(rng, split, labels[index])
        return sentence, ({"sentence": sentence}, float(labels[index]))

    return _distinct(draw, size)


def similarity(split: str, size: int, seed: int = 0) -> list[tuple[dict[str, str], float]]:
    """Pairs of sentences about an event: ({"sentence1", "sentence2"}, target from 0 to 5), 5 / 4 for each slot that agrees.

    A split owns combinations of the four concepts, in either sentence. Raises InputError as `sentiment` does.
    """
    rng = _stream("similarity", split, seed)

    def draw(index: int):
        agreeing = rng.randrange(len(EVENT) + 1)
        second = None
        while second is None:
            first = _concepts(rng, split, EVENT)
            second = _altered(rng, split, EVENT, first, len(EVENT) - agreeing)
        sentence1, sentence2 = _describe(rng, SENTENCES, first), _describe(rng, SENTENCES, second)
        return (sentence1, sentence2), ({"sentence1": sentence1, "sentence2": sentence2}, 5 * agreeing / len(EVENT))

    return _distinct(draw, size)


def ranking(split: str, size: int, seed: int = 0, list_size: int = 10) -> list[tuple[str, list[tuple[str, float]]]]:
    """Searches for a thing: (query, [(document, grade), ...]) with one document of grade 1 among `list_size`, in random order.

    The others, of grade 0, differ from the query in one, two or three of its four attributes. A split owns combinations of
    the four. Raises InputError as `sentiment` does.
    """
    rng = _stream("ranking", split, seed)

    def draw(index: int):
        wanted = _concepts(rng, split, ITEM)
        query = _describe(rng, QUERIES, wanted)
        things = [wanted]
        while len(things) < list_size:
            thing = _altered(rng, split, ITEM, wanted, rng.randint(1, 4))
            if thing and thing not in things:
                things.append(thing)
        documents = [(_describe(rng, DOCUMENTS, thing), float(thing is wanted)) for thing in things]
        rng.shuffle(documents)
        return query, (query, documents)

    return _distinct(draw, size)


def corpus(size_per_task: int, seed: int = 0) -> Iterator[str]:
    """Every text of `size_per_task` train examples of each task, to train a tokenizer on."""
    for fields, _ in sentiment("train", size_per_task, seed) + similarity("train", size_per_task, seed):
        yield from fields.values()
    for query, documents in ranking("train", size_per_task, seed):
        yield query
        yield from (document for document, _ in documents)


def _stream(task: str, split: str, seed: int) -> random.Random:
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    return random.Random(f"{task} {split} {seed}")


def _owner(combination: Iterable[str]) -> str:
    """The split that a combination of words belongs to whatever the seed: train has eight in ten, the others one each."""
    digest = hashlib.sha256(" ".join(combination).encode()).digest()
    return {0: "validation", 1: "test"}.get(int.from_bytes(digest[:4]) % 5, "train")


def _distinct(draw, size: int) -> list:
    """`size` examples with different keys, from `draw(index) -> (key, example)`."""
    examples, repeats = {}, 0
    while len(examples) < size:
        key, example = draw(len(examples))
        repeats = repeats + 1 if key in examples else 0
        if repeats > 1000:
            raise InputError(f"this split holds hardly more than {len(examples)} different examples; ask for fewer than {size}")
        examples.setdefault(key, example)
    return list(examples.values())


def _opinion(rng: random.Random, split: str, label: int) -> str:
    """A sentence whose main clause speaks well (label 1) or ill (label 0) of something."""
    main = _clause(rng, split, label)
    if rng.random() >= CONTRASTED_SHARE:
        return rng.choice(PLAIN).format(main=main)
    noun, adjective = _pair(rng, split, 1 - label)
    return rng.choice(CONTRASTED).format(main=main, side=_clause(rng, split, 1 - label), noun=noun, adjective=adjective)


def _clause(rng: random.Random, split: str, label: int) -> str:
    negated = rng.random() < NEGATED_SHARE
    noun, adjective = _pair(rng, split, label ^ negated)
    return _article(rng.choice(NEGATED if negated else AFFIRMED).format(noun=noun, adjective=adjective))


def _pair(rng, split, label):
    while True:
        noun, adjective = rng.choice(NOUNS), rng.choice(ADJECTIVES[SENTIMENT_CLASSES[label]])
        if _owner((noun, adjective)) == split:
            return noun, adjective


def _concepts(rng, split, slots):
    while True:
        chosen = {slot: rng.choice(concepts) for slot, concepts in slots.items()}
        if _owner(words[0] for words in chosen.values()) == split:
            return chosen


def _altered(rng, split, slots, original, count):
    """The same with other concepts in `count` slots."""
    changed = rng.sample(sorted(slots), count)
    altered = original | {slot: rng.choice([c for c in slots[slot] if c != original[slot]]) for slot in changed}
    return altered if _owner(words[0] for words in altered.values()) == split else None


def _describe(rng, templates, concepts):
    words = {slot: pair[rng.random() < SYNONYM_SHARE] for slot, pair in concepts.items()}
    if "material" in concepts:
        words["material"], words["material_noun"] = concepts["material"]
    return _article(rng.choice(templates).format(**words))


def _article(text: str) -> str:
    return re.sub(r"\ba (?=[aeiou])", "an ", text)
