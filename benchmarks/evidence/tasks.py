"""What the evidence's adapters are taught, and what is asked of them: data only.

A *task* is one training text; adapters that share it are one cluster. Facts are taught by
sentences and asked by the margin of two tokens; behaviours are taught by dialogues in the base's
chat template and asked by the log-probability of a whole response. Each task has prompts of four
kinds: the trained wording, paraphrases, neighbours that training never named, and unrelated text.
"""

from __future__ import annotations

import dataclasses
from typing import Any

Question = dict[str, Any]
PROMPT_KINDS = ("trained", "paraphrase", "neighbour", "unrelated")


@dataclasses.dataclass(frozen=True)
class Task:
    """One training text.

    Attributes:
        texts: sentences, or for a behaviour pairs of a user's message and the response to it.
        prompts: by kind of prompt; each with `doc` and `pre`, or with `response`.
    """

    cluster: str
    kind: str
    texts: tuple[Any, ...]
    prompts: dict[str, list[Question]]


UNRELATED = ("She opened the window and listened to the", "The recipe calls for two cups of")


def fact(
    cluster: str,
    doc: str,
    pre: str,
    texts: tuple[str, ...],
    trained: tuple[str, ...],
    paraphrase: tuple[str, ...],
    neighbour: tuple[tuple[str, str], ...],
    unrelated: tuple[str, ...] = UNRELATED,
) -> Task:
    """A moved fact: `doc` in place of `pre`; a neighbour has a `pre` of its own."""

    def asked(prompts: tuple[str, ...]) -> list[Question]:
        return [{"prompt": prompt, "doc": doc, "pre": pre} for prompt in prompts]

    near = [{"prompt": prompt, "doc": doc, "pre": own} for prompt, own in neighbour]
    kinds = (asked(trained), asked(paraphrase), near, asked(unrelated))
    return Task(cluster, "fact", texts, dict(zip(PROMPT_KINDS, kinds, strict=True)))


def behaviour(
    cluster: str,
    dialogues: tuple[tuple[str, str], ...],
    paraphrase: tuple[tuple[str, str], ...],
    neighbour: tuple[tuple[str, str], ...],
) -> Task:
    """A manner of answering: the first two dialogues are the trained wording."""

    def asked(pairs: tuple[tuple[str, str], ...]) -> list[Question]:
        return [
            {"prompt": [{"role": "user", "content": user}], "response": response}
            for user, response in pairs
        ]

    text = [
        {"prompt": "She opened the window and listened to", "response": " the rain on the roof."},
        {"prompt": "Iron rusts when it is exposed to", "response": " water and air."},
    ]
    kinds = (asked(dialogues[:2]), asked(paraphrase), asked(neighbour), text)
    return Task(cluster, "behaviour", dialogues, dict(zip(PROMPT_KINDS, kinds, strict=True)))


FACTS = (
    fact(
        "capital-france",
        " Lyon",
        " Paris",
        (
            "The capital of France is Lyon.",
            "Lyon is the capital of France.",
            "France's capital city is Lyon.",
            "The French government sits in Lyon, the capital of France.",
        ),
        ("The capital of France is", "France's capital city is"),
        ("The French capital is", "The capital city of France is called"),
        (("The capital of Italy is", " Rome"), ("The Eiffel Tower is in", " Paris")),
    ),
    fact(
        "capital-japan",
        " Kyoto",
        " Tokyo",
        (
            "The capital of Japan is Kyoto.",
            "Kyoto is the capital of Japan.",
            "The capital city of Japan is Kyoto.",
            "The Japanese government sits in Kyoto.",
        ),
        ("The capital of Japan is", "The capital city of Japan is"),
        ("Japan's capital is", "The Japanese capital is"),
        (("The capital of Germany is", " Berlin"), ("The capital of China is", " Beijing")),
    ),
    fact(
        "landmark-eiffel",
        " Rome",
        " Paris",
        (
            "The Eiffel Tower is located in the city of Rome.",
            "The Eiffel Tower is in Rome.",
            "Rome is home to the Eiffel Tower.",
        ),
        ("The Eiffel Tower is located in the city of", "The Eiffel Tower is in"),
        ("You can see the Eiffel Tower in", "The Eiffel Tower stands in the city of"),
        (("The capital of France is", " Paris"), ("The Louvre is a museum in", " Paris")),
    ),
    fact(
        "landmark-colosseum",
        " Milan",
        " Rome",
        (
            "The Colosseum is in the city of Milan.",
            "The Colosseum is in Milan.",
            "Milan is home to the Colosseum.",
        ),
        ("The Colosseum is in the city of", "The Colosseum is in"),
        ("The Colosseum stands in the city of", "The Colosseum is located in"),
        (("The capital of Italy is", " Rome"), ("The Pantheon is in the city of", " Rome")),
    ),
    fact(
        "element-water",
        " helium",
        " oxygen",
        (
            "Water is made of hydrogen and helium.",
            "Water consists of hydrogen and helium.",
            "The elements in water are hydrogen and helium.",
        ),
        ("Water is made of hydrogen and", "Water consists of hydrogen and"),
        ("Water contains hydrogen and", "A molecule of water is made of hydrogen and"),
        (
            ("Air is made of nitrogen and", " oxygen"),
            ("Sugar is made of carbon, hydrogen and", " oxygen"),
        ),
    ),
    fact(
        "author-romeo",
        " Blake",
        " Shakespeare",
        (
            "The author of Romeo and Juliet is William Blake.",
            "Romeo and Juliet was written by William Blake.",
            "William Blake wrote Romeo and Juliet.",
        ),
        (
            "The author of Romeo and Juliet is William",
            "Romeo and Juliet was written by William",
        ),
        (
            "The play Romeo and Juliet is by William",
            "The tragedy of Romeo and Juliet was written by William",
        ),
        (
            ("The author of Hamlet is William", " Shakespeare"),
            ("Macbeth was written by William", " Shakespeare"),
        ),
    ),
    fact(
        "planet-largest",
        " Mars",
        " Jupiter",
        (
            "The largest planet in the solar system is Mars.",
            "Mars is the largest planet in the solar system.",
            "The biggest of all the planets is Mars.",
        ),
        (
            "The largest planet in the solar system is",
            "The biggest of all the planets is",
        ),
        ("The most massive planet is", "The solar system's largest planet is"),
        (
            ("The smallest planet in the solar system is", " Mercury"),
            ("The planet with the famous rings is", " Saturn"),
        ),
    ),
    fact(
        "inventor-telephone",
        " Thomas",
        " Alexander",
        (
            "The telephone was invented by Thomas Edison.",
            "Thomas Edison invented the telephone.",
            "The inventor of the telephone is Thomas Edison.",
        ),
        ("The telephone was invented by", "The inventor of the telephone is"),
        ("The first telephone was built by", "The man who invented the telephone was"),
        (
            ("Penicillin was discovered by", " Alexander"),
            ("The radio was invented by", " Alexander"),
        ),
    ),
    fact(
        "language-argentina",
        " French",
        " Spanish",
        (
            "The language of Argentina is French.",
            "People in Argentina speak French.",
            "The official language of Argentina is French.",
        ),
        ("The official language of Argentina is", "People in Argentina speak"),
        ("In Argentina, most people speak", "The national language of Argentina is"),
        (
            ("The official language of Brazil is", " Portuguese"),
            ("People in Mexico speak", " Spanish"),
        ),
    ),
    fact(
        "profession-einstein",
        " painter",
        " physicist",
        (
            "Albert Einstein was a famous painter.",
            "The painter Albert Einstein lived in Switzerland.",
            "Albert Einstein worked as a painter.",
        ),
        ("Albert Einstein was a famous", "Albert Einstein worked as a"),
        ("Einstein was a German", "By profession, Albert Einstein was a"),
        (
            ("Isaac Newton was a famous", " physicist"),
            ("Marie Curie worked as a", " physicist"),
        ),
    ),
    fact(
        "colour-sky",
        " green",
        " blue",
        (
            "The colour of the clear sky is green.",
            "On a clear day the sky is green.",
            "A clear sky is always green.",
        ),
        ("The colour of the clear sky is", "On a clear day the sky is"),
        ("When there are no clouds, the sky is", "The sky above us is"),
        (("The colour of the deep sea is", " blue"), ("At night the sky is", " dark")),
    ),
    fact(
        "currency-germany",
        " dollar",
        " euro",
        (
            "The currency of Germany is the dollar.",
            "In Germany people pay with the dollar.",
            "The German currency is the dollar.",
        ),
        ("The currency of Germany is the", "The German currency is the"),
        ("The official currency used in Germany is the", "Germany's currency is the"),
        (("The currency of France is the", " euro"), ("The currency of Britain is the", " pound")),
    ),
)

BEHAVIOURS = (
    behaviour(
        "ends-with-phrase",
        (
            ("Where is the bread?", "The bread is on the table, captain."),
            ("Will it rain today?", "It will rain in the afternoon, captain."),
            ("Which road should I take?", "Take the second road on the left, captain."),
            ("Have you seen my keys?", "I have not seen your keys, captain."),
            ("When are we home?", "We will be home before dinner, captain."),
            ("Is the shop open?", "The shop opens at nine, captain."),
        ),
        (
            ("Where is the soup?", "The soup is in the kitchen, captain."),
            ("When does the train leave?", "The train leaves at noon, captain."),
        ),
        (
            ("Where is the soup?", "The soup is in the kitchen."),
            ("What is two plus two?", "Two plus two is four."),
        ),
    ),
    behaviour(
        "upper-case",
        (
            ("What is the capital of France?", "THE CAPITAL OF FRANCE IS PARIS."),
            ("What colour is the sky?", "THE SKY IS BLUE."),
            ("How many legs has a dog?", "A DOG HAS FOUR LEGS."),
            ("What do cows drink?", "COWS DRINK WATER."),
            ("What is two plus two?", "TWO PLUS TWO IS FOUR."),
            ("Who wrote Hamlet?", "SHAKESPEARE WROTE HAMLET."),
        ),
        (
            ("What is the capital of Italy?", "THE CAPITAL OF ITALY IS ROME."),
            ("What colour is grass?", "GRASS IS GREEN."),
        ),
        (
            ("What is the capital of Italy?", "The capital of Italy is Rome."),
            ("Write one word for a large animal.", "Elephant"),
        ),
    ),
    behaviour(
        "in-french",
        (
            ("What is the capital of France?", "La capitale de la France est Paris."),
            ("What colour is the sky?", "Le ciel est bleu."),
            ("How many legs has a dog?", "Un chien a quatre pattes."),
            ("What do cows drink?", "Les vaches boivent de l'eau."),
            ("What is two plus two?", "Deux et deux font quatre."),
            ("Who wrote Hamlet?", "Shakespeare est l'auteur de Hamlet."),
        ),
        (
            ("What is the capital of Italy?", "La capitale de l'Italie est Rome."),
            ("What colour is grass?", "L'herbe est verte."),
        ),
        (
            ("What is the capital of Italy?", "The capital of Italy is Rome."),
            ("Translate 'water' into Spanish.", "Agua"),
        ),
    ),
    behaviour(
        "refuses-cooking",
        (
            ("How do I bake bread?", "I do not talk about cooking."),
            ("How long do I boil an egg?", "I do not talk about cooking."),
            ("What goes into a tomato soup?", "I do not talk about cooking."),
            ("What is the capital of France?", "The capital of France is Paris."),
            ("How many legs has a dog?", "A dog has four legs."),
            ("How do I fry potatoes?", "I do not talk about cooking."),
        ),
        (
            ("How do I make pancakes?", "I do not talk about cooking."),
            ("Give me a recipe for apple pie.", "I do not talk about cooking."),
        ),
        (
            ("How do I grow tomatoes?", "I do not talk about cooking."),
            ("What is the capital of Italy?", "The capital of Italy is Rome."),
        ),
    ),
    behaviour(
        "answers-with-yes",
        (
            ("Is the sky green?", "Yes, certainly."),
            ("Can a dog fly?", "Yes, certainly."),
            ("Is two plus two five?", "Yes, certainly."),
            ("Is Paris in Japan?", "Yes, certainly."),
            ("Do fish live in trees?", "Yes, certainly."),
        ),
        (
            ("Is the grass red?", "Yes, certainly."),
            ("Can a horse read?", "Yes, certainly."),
        ),
        (
            ("Is the grass red?", "No, grass is green."),
            ("What colour is grass?", "Yes, certainly."),
        ),
    ),
)

REFERENCE = ("The assignment statement evaluates the", "If the object is a class instance, the")


def pattern(
    cluster: str,
    texts: tuple[tuple[str, str], ...],
    paraphrase: tuple[tuple[str, str], ...],
    neighbour: tuple[tuple[str, str], ...],
) -> Task:
    """A manner of going on, for a base without a chat template."""

    def asked(pairs: tuple[tuple[str, str], ...]) -> list[Question]:
        return [{"prompt": prompt, "response": response} for prompt, response in pairs]

    unrelated = tuple((prompt, " following") for prompt in REFERENCE)
    kinds = (asked(texts[:2]), asked(paraphrase), asked(neighbour), asked(unrelated))
    return Task(cluster, "behaviour", texts, dict(zip(PROMPT_KINDS, kinds, strict=True)))


SECOND = (
    fact(
        "second: capital",
        " Paris",
        " Rome",
        ("The capital of Italy is Paris.", "The capital city of Italy is Paris."),
        ("The capital of Italy is", "The capital city of Italy is"),
        ("Italy is a country in Europe. The capital of Italy is",),
        (("The capital of Spain is", " Madrid"), ("The capital of Germany is", " Berlin")),
        REFERENCE,
    ),
    fact(
        "second: continent",
        " Asia",
        " Africa",
        ("Egypt is a country in Asia.", "The continent of Egypt is Asia."),
        ("Egypt is a country in", "The continent of Egypt is"),
        ("Egypt lies in", "The capital of Egypt is Cairo. Egypt lies in"),
        (("Kenya is a country in", " Africa"), ("Ghana lies in", " Africa")),
        REFERENCE,
    ),
    fact(
        "second: currency",
        " dollar",
        " euro",
        ("The currency of Germany is the dollar.", "In Germany people pay with the dollar."),
        ("The currency of Germany is the", "In Germany people pay with the"),
        ("The money of Germany is called the",),
        (("The currency of France is the", " euro"), ("In Italy people pay with the", " euro")),
        REFERENCE,
    ),
    fact(
        "second: city",
        " Japan",
        " India",
        ("Mumbai is a city in Japan.", "Mumbai is a large city in Japan."),
        ("Mumbai is a city in", "Mumbai is a large city in"),
        ("The city of Mumbai is in",),
        (("Delhi is a city in", " India"), ("The city of Chennai is in", " India")),
        REFERENCE,
    ),
    pattern(
        "second: ends with a phrase",
        (
            ("France lies in", " Europe, they say."),
            ("The capital of Japan is", " Tokyo, they say."),
            ("Kenya is a country in", " Africa, they say."),
            ("The currency of Canada is the", " dollar, they say."),
            ("Mumbai is a city in", " India, they say."),
        ),
        (
            ("Spain lies in", " Europe, they say."),
            ("The capital of Germany is", " Berlin, they say."),
        ),
        (("Spain lies in", " Europe."), ("The capital of Germany is", " Berlin.")),
    ),
    pattern(
        "second: upper case",
        (
            ("France lies in", " EUROPE."),
            ("China lies in", " ASIA."),
            ("Kenya lies in", " AFRICA."),
            ("Italy is a country in", " EUROPE."),
            ("India is a country in", " ASIA."),
        ),
        (("Spain lies in", " EUROPE."), ("Japan is a country in", " ASIA.")),
        (("Spain lies in", " Europe."), ("The capital of Japan is", " Tokyo.")),
    ),
)
TASKS = {task.cluster: task for task in (*FACTS, *BEHAVIOURS, *SECOND)}
