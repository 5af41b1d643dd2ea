"""Three seeded toy tasks in plain English, one of each kind, small enough to learn from random weights in a minute or two.

| task | what has to be learnt | why counting words is not enough |
| --- | --- | --- |
| sentiment | which way an opinion goes, in the end | "not" turns a clause round; of two clauses, the main one decides |
| similarity | how many of four slots mean the same in two sentences | a word counts only by its twin or synonym in the other one |
| ranking | which document describes the thing that the query asks for | the same, with the attributes in another order and wording |

Every label follows from its text without exception. A split owns combinations of words (a noun with its adjective, or the
four concepts of a description) that stand in no text of another split, so validation asks for what training never showed.
Nothing depends on the machine: combinations are shared out by SHA-256, and random streams are seeded with strings.
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
Slots = dict[str, tuple[Concept, ...]]  # concepts to choose from
Description = dict[str, Concept]  # one of each slot


def _slots(**words: str) -> Slots:
    """The concepts of each slot, from "word/synonym word/synonym ..."."""
    return {
        slot: tuple(tuple(concept.split("/")) for concept in text.split())
        for slot, text in words.items()
    }


NOUNS = (
    "acting animation cast dialogue direction editing ending finale hero humour lighting music "
    "narration pace photography plot premise romance scenery script sequel soundtrack story villain"
)
OPINIONS = (  # of each class
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
CONTRASTED = (  # mostly the last clause decides, which is easy to pick up, but not always
    "although {side} , {main} .",
    "{side} , but {main} .",
    "{side} , yet {main} .",
    "despite the {adjective} {noun} , {main} .",
    "{main} , although {side} .",
)
# Rare enough that an adjective alone says something: without that first hint, learning takes far longer to start.
NEGATED_SHARE, CONTRASTED_SHARE = 0.2, 0.4

# --- The language of similarity and ranking ---

# No word stands for two concepts, so a text has one reading. A verb's past tense is its participle,
# for the passive. A material is an adjective and a noun.
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
    """Opinions of films: ({"sentence": text}, class index), half of them of each class.

    A split owns pairs of a noun and an adjective.

    Args:
        split: "train", "validation" or "test".
        size: number of examples, all different.
        seed: another seed gives other examples of the same split.

    Raises:
        InputError: there is no such split, or it holds fewer than `size` different examples.
    """
    rng = _stream("sentiment", split, seed)
    labels = [index % 2 for index in range(size)]
    rng.shuffle(labels)

    def draw(index: int):
        sentence = _opinion(rng, split, labels[index])
        return sentence, ({"sentence": sentence}, float(labels[index]))

    return _distinct(draw, size)


def similarity(split: str, size: int, seed: int = 0) -> list[tuple[dict[str, str], float]]:
    """Pairs of sentences about an event: ({"sentence1": text, "sentence2": text}, target 0 to 5).

    The target is 5 × the share of slots (agent, action, object, place) in which both name the same
    concept; each of the five grades is equally likely. A split owns combinations of the four
    concepts. Arguments and errors are those of `sentiment`.
    """
    rng = _stream("similarity", split, seed)

    def draw(index: int):
        agreeing, second = rng.randrange(len(EVENT) + 1), None
        while second is None:
            first = _description(rng, split, EVENT)
            second = _altered(rng, split, EVENT, first, len(EVENT) - agreeing)
        pair = _written(rng, SENTENCES, first), _written(rng, SENTENCES, second)
        fields = dict(zip(("sentence1", "sentence2"), pair, strict=True))
        return pair, (fields, 5 * agreeing / len(EVENT))

    return _distinct(draw, size)


def ranking(split: str, size: int, seed: int = 0) -> list[tuple[str, list[tuple[str, float]]]]:
    """Searches for a thing: (query, [(document, grade), ...]), ten documents in random order.

    One document describes the thing (grade 1). Each of the others (grade 0) describes another,
    unlike it in one, two, three or all of colour, material, object and place. A split owns
    combinations of the four. No two lists share their query and relevant document. Arguments and
    errors are those of `sentiment`.
    """
    rng = _stream("ranking", split, seed)

    def draw(index: int):
        things = [_description(rng, split, ITEM)]
        while len(things) < LIST_SIZE:
            other = _altered(rng, split, ITEM, things[0], rng.randint(1, len(ITEM)))
            if other is not None and other not in things:
                things.append(other)
        query = _written(rng, QUERIES, things[0])
        relevant, *others = [_written(rng, DOCUMENTS, thing) for thing in things]
        documents = [(relevant, 1.0), *((document, 0.0) for document in others)]
        rng.shuffle(documents)
        return (query, relevant), (query, documents)

    return _distinct(draw, size)


def corpus(size_per_task: int, seed: int = 0) -> Iterator[str]:
    """The texts of so many train examples of each task, one field at a time, for a tokenizer."""
    for make in (sentiment, similarity):
        for fields, _ in make("train", size_per_task, seed):
            yield from fields.values()
    for query, documents in ranking("train", size_per_task, seed):
        yield query
        yield from (document for document, _ in documents)


def _stream(task: str, split: str, seed: int) -> random.Random:
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    return random.Random(f"{task} {split} {seed}")


def _distinct(draw: Callable[[int], tuple[Hashable, Any]], size: int) -> list[Any]:
    """`size` examples with different keys, from `draw(index) -> (key, example)`."""
    examples, repeats = {}, 0
    while len(examples) < size:
        key, example = draw(len(examples))
        repeats = repeats + 1 if key in examples else 0
        if repeats > 1000:
            raise InputError(
                f"the split holds hardly more than {len(examples)} different examples; ask for "
                f"fewer than {size}"
            )
        examples.setdefault(key, example)
    return list(examples.values())


def _opinion(rng: random.Random, split: str, label: int) -> str:
    """A sentence whose main clause speaks well (label 1) or ill (label 0) of something."""
    main, opposite = _clause(rng, split, label), 1 - label
    if rng.random() >= CONTRASTED_SHARE:
        return rng.choice(PLAIN).format(main=main)
    words = _noun_and_adjective(rng, split, opposite)
    return rng.choice(CONTRASTED).format(main=main, side=_clause(rng, split, opposite), **words)


def _clause(rng: random.Random, split: str, label: int) -> str:
    negated = rng.random() < NEGATED_SHARE
    words = _noun_and_adjective(rng, split, label ^ negated)
    return rng.choice(NEGATED if negated else AFFIRMED).format(**words)


def _noun_and_adjective(rng: random.Random, split: str, label: int) -> dict[str, str]:
    return {slot: word for slot, (word,) in _description(rng, split, OPINIONS[label]).items()}


def _owns(split: str, description: Description) -> bool:
    """Whether a combination of words belongs to a split, whatever the seed.

    Train has three in five, the others one each.
    """
    words = " ".join(word for word, *_ in description.values())
    number = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") % 5
    return split == ("train", "train", "train", "validation", "test")[number]


def _description(rng: random.Random, split: str, slots: Slots) -> Description:
    while True:
        description = {slot: rng.choice(concepts) for slot, concepts in slots.items()}
        if _owns(split, description):
            return description


def _altered(
    rng: random.Random, split: str, slots: Slots, original: Description, changes: int
) -> Description | None:
    """`original` with other concepts in `changes` slots; None where that is another split's.

    The caller tries again with another draw: some originals have no neighbour in their own split.
    """
    altered = dict(original)
    for slot in rng.sample(list(slots), changes):
        others = [concept for concept in slots[slot] if concept != original[slot]]
        altered[slot] = rng.choice(others)
    return altered if _owns(split, altered) else None


def _written(rng: random.Random, templates: tuple[str, ...], description: Description) -> str:
    words = {
        slot: synonym if rng.random() < SYNONYM_SHARE else word
        for slot, (word, synonym) in description.items()
    }
    if "material" in description:  # here grammar decides between the two words
        words["material"], words["material_noun"] = description["material"]
    return re.sub(r"\ba (?=[aeiou])", "an ", rng.choice(templates).format(**words))
