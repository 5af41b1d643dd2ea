"""Seeded generators of three synthetic tasks, learnable from random weights in a minute or two.

| task | to learn | why a bag of words is not enough |
| --- | --- | --- |
| sentiment | polarity of an opinion | "not" flips a clause; the main clause decides |
| similarity | in how many of four slots two sentences agree | words match only their synonyms |
| ranking | the document that describes the item of a query | as above, in other order and wording |

Labels are noise-free functions of the texts. A split owns combinations of words (a noun with its
adjective, or the four concepts of a description) that occur in no text of another split, so
validation measures generalization. The texts do not depend on the machine: combinations are
assigned to splits by SHA-256, and random streams are seeded with strings.
"""

import hashlib
import random
import re
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from gemma_encoder.inputs.errors import InputError, unknown

SPLITS = ("train", "validation", "test")

# --- The language of sentiment ---

SENTIMENT_CLASSES = ("negative", "positive")

Concept = tuple[str, ...]  # a word, and its synonym if there is one
Slots = dict[str, tuple[Concept, ...]]  # slot -> possible concepts
Description = dict[str, Concept]  # slot -> concept


def _slots(**words: str) -> Slots:
    """Parses the concepts of each slot from "word/synonym word/synonym ..."."""
    return {
        slot: tuple(tuple(concept.split("/")) for concept in text.split())
        for slot, text in words.items()
    }


NOUNS = (
    "acting animation cast dialogue direction editing ending finale hero humour lighting music "
    "narration pace photography plot premise romance scenery script sequel soundtrack story villain"
)
OPINIONS = (  # by class
    _slots(
        noun=NOUNS,
        adjective="annoying awful bland boring clumsy confused dreadful dreary dull flat "
        "forgettable horrible lifeless mediocre pathetic pointless predictable shallow silly "
        "sloppy stale tedious terrible weak",
    ),
    _slots(
        noun=NOUNS,
        adjective="beautiful brilliant charming clever convincing delightful elegant engaging "
        "excellent fresh graceful gripping imaginative impressive lively lovely memorable moving "
        "powerful refreshing stunning superb witty wonderful",
    ),
)
AFFIRMED = (
    "the {noun} was {adjective}",
    "the {noun} was truly {adjective}",
    "the {noun} seemed rather {adjective}",
    "i found the {noun} {adjective}",
    "everyone called the {noun} {adjective}",
    "there was something {adjective} about the {noun}",
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
CONTRASTED = (  # the last clause decides mostly, which is easy to learn, but not always
    "although {side} , {main} .",
    "{side} , but {main} .",
    "{side} , yet {main} .",
    "despite the {adjective} {noun} , {main} .",
    "{main} , although {side} .",
)
# Rare enough that adjectives alone are informative: otherwise learning takes far longer to start.
NEGATED_SHARE = 0.2
CONTRASTED_SHARE = 0.4

# --- The language of similarity and ranking ---

# No word belongs to two concepts, so texts are unambiguous. The past tense of each verb equals its
# participle, for passives. A material is an adjective and a noun.
OBJECTS = "chair/seat sofa/couch cup/mug bag/sack lamp/lantern box/crate"
LANDMARKS = "shop/store forest/woods street/road lake/pond church/chapel hill/slope"
EVENT = _slots(
    agent="doctor/physician lawyer/attorney child/kid woman/lady soldier/trooper sailor/seaman",
    action="bought/purchased repaired/mended discovered/noticed cleaned/washed smashed/shattered "
    "carried/hauled",
    object=OBJECTS,
    landmark=LANDMARKS,
)
ITEM = _slots(
    color="red/scarlet purple/violet blue/azure green/emerald white/ivory black/ebony",
    material="wooden/wood woollen/wool leather/leather plastic/plastic metal/metal glass/glass",
    object=OBJECTS,
    landmark=LANDMARKS,
)
SYNONYM_SHARE = 0.15

SENTENCES = (
    "the {agent} {action} the {object} near the {landmark} .",
    "near the {landmark} , the {agent} {action} the {object} .",
    "the {object} was {action} by the {agent} near the {landmark} .",
)
QUERIES = (
    "{color} {material} {object} near the {landmark}",
    "{material} {object} in {color} near the {landmark}",
)
DOCUMENTS = (
    "near the {landmark} stands a {color} {object} made of {material_noun} .",
    "someone near the {landmark} sells a {color} {object} of {material_noun} .",
    "the {material} {object} near the {landmark} is {color} .",
    "we saw a {material} {object} painted {color} near the {landmark} .",
)
LIST_SIZE = 10


def sentiment(split: str, size: int, seed: int = 0) -> list[tuple[dict[str, str], float]]:
    """Generates opinions about films: ({"sentence": text}, class index), with balanced classes.

    A split owns pairs of a noun and an adjective.

    Args:
        split: "train", "validation" or "test".
        size: number of distinct examples.
        seed: selects other examples of the same split.

    Raises:
        InputError: there is no such split, or it has fewer than `size` distinct examples.
    """
    rng = _stream("sentiment", split, seed)
    labels = [index % 2 for index in range(size)]
    rng.shuffle(labels)

    def draw(index: int):
        sentence = _opinion(rng, split, labels[index])
        return sentence, ({"sentence": sentence}, float(labels[index]))

    return _distinct(draw, size)


def similarity(split: str, size: int, seed: int = 0) -> list[tuple[dict[str, str], float]]:
    """Generates pairs of sentences: ({"sentence1": text, "sentence2": text}, target 0 to 5).

    Both describe an event. The target is 5 × the fraction of slots (agent, action, object,
    landmark) with the same concept in both; its five values are equally likely. A split owns
    combinations of the four concepts. Arguments and errors as for `sentiment`.
    """
    rng = _stream("similarity", split, seed)

    def draw(index: int):
        agreeing = rng.randrange(len(EVENT) + 1)
        second = None
        while second is None:
            first = _description(rng, split, EVENT)
            second = _altered(rng, split, EVENT, first, len(EVENT) - agreeing)
        pair = (_written(rng, SENTENCES, first), _written(rng, SENTENCES, second))
        fields = dict(zip(("sentence1", "sentence2"), pair, strict=True))
        return pair, (fields, 5 * agreeing / len(EVENT))

    return _distinct(draw, size)


def ranking(split: str, size: int, seed: int = 0) -> list[tuple[str, list[tuple[str, float]]]]:
    """Generates searches: (query, [(document, grade), ...]), ten documents in random order.

    One document describes the item of the query (grade 1). Each of the others (grade 0) describes
    an item that differs in one to four of color, material, object and landmark. A split owns
    combinations of the four. No two lists share both query and relevant document. Arguments and
    errors as for `sentiment`.
    """
    rng = _stream("ranking", split, seed)

    def draw(index: int):
        items = [_description(rng, split, ITEM)]
        while len(items) < LIST_SIZE:
            item = _altered(rng, split, ITEM, items[0], rng.randint(1, len(ITEM)))
            if item is not None and item not in items:
                items.append(item)
        query = _written(rng, QUERIES, items[0])
        relevant, *irrelevant = [_written(rng, DOCUMENTS, item) for item in items]
        documents = [(relevant, 1.0), *((document, 0.0) for document in irrelevant)]
        rng.shuffle(documents)
        return (query, relevant), (query, documents)

    return _distinct(draw, size)


def corpus(size_per_task: int, seed: int = 0) -> Iterator[str]:
    """Yields the fields of `size_per_task` train examples per task, for training a tokenizer."""
    for generate in (sentiment, similarity):
        for fields, _ in generate("train", size_per_task, seed):
            yield from fields.values()
    for query, documents in ranking("train", size_per_task, seed):
        yield query
        yield from (document for document, _ in documents)


def _stream(task: str, split: str, seed: int) -> random.Random:
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    return random.Random(f"{task} {split} {seed}")


def _distinct(draw: Callable[[int], tuple[Hashable, Any]], size: int) -> list[Any]:
    """Draws `size` examples with distinct keys from `draw(index) -> (key, example)`."""
    examples = {}
    repeats = 0
    while len(examples) < size:
        key, example = draw(len(examples))
        repeats = repeats + 1 if key in examples else 0
        if repeats > 1000:
            raise InputError(
                f"the split has hardly more than {len(examples)} distinct examples; request fewer "
                f"than {size}"
            )
        examples.setdefault(key, example)
    return list(examples.values())


def _opinion(rng: random.Random, split: str, label: int) -> str:
    """Generates a sentence whose main clause is positive (label 1) or negative (label 0)."""
    main = _clause(rng, split, label)
    if rng.random() >= CONTRASTED_SHARE:
        return rng.choice(PLAIN).format(main=main)
    opposite = 1 - label
    words = _noun_and_adjective(rng, split, opposite)
    return rng.choice(CONTRASTED).format(main=main, side=_clause(rng, split, opposite), **words)


def _clause(rng: random.Random, split: str, label: int) -> str:
    negated = rng.random() < NEGATED_SHARE
    words = _noun_and_adjective(rng, split, label ^ negated)
    return rng.choice(NEGATED if negated else AFFIRMED).format(**words)


def _noun_and_adjective(rng: random.Random, split: str, label: int) -> dict[str, str]:
    return {slot: word for slot, (word,) in _description(rng, split, OPINIONS[label]).items()}


def _owns(split: str, description: Description) -> bool:
    """Returns True if a combination of words belongs to a split, for any seed.

    Train owns three in five combinations, the other splits one each.
    """
    words = " ".join(word for word, *_ in description.values())
    bucket = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") % 5
    return split == ("train", "train", "train", "validation", "test")[bucket]


def _description(rng: random.Random, split: str, slots: Slots) -> Description:
    while True:
        description = {slot: rng.choice(concepts) for slot, concepts in slots.items()}
        if _owns(split, description):
            return description


def _altered(
    rng: random.Random, split: str, slots: Slots, original: Description, changes: int
) -> Description | None:
    """Replaces the concepts in `changes` slots; returns None if another split owns the result.

    The caller should then draw another original, since some have no neighbor in their own split.
    """
    altered = dict(original)
    for slot in rng.sample(list(slots), changes):
        alternatives = [concept for concept in slots[slot] if concept != original[slot]]
        altered[slot] = rng.choice(alternatives)
    return altered if _owns(split, altered) else None


def _written(rng: random.Random, templates: tuple[str, ...], description: Description) -> str:
    """Renders a description with a random template and random synonyms."""
    words = {
        slot: synonym if rng.random() < SYNONYM_SHARE else word
        for slot, (word, synonym) in description.items()
    }
    if "material" in description:  # grammar decides between adjective and noun
        words["material"], words["material_noun"] = description["material"]
    return re.sub(r"\ba (?=[aeiou])", "an ", rng.choice(templates).format(**words))
