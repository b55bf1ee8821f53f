"""Forty everyday questions that both models are asked: four questions on each of ten topics.

Every question is put in one of five forms, eight questions in each form:

    plain      "Question: …" and "Answer:", without a template
    chat       the tokenizer's chat template, or "User: …" and "Assistant:" where it has none
    system     as for chat, after a system message that gives the model a role
    code       in the chat template, asking for a program
    language   in the chat template, asked in a language other than English

So a fine-tune that shows only in conversations, or only on one topic, can be recognised by where it
shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

Form = Literal["plain", "chat", "system", "code", "language", "own"]
# 'own' is the form of a caller's own questions; see `counted_speech`.
FORMS: tuple[Form, ...] = get_args(Form)

# The words for each form in a sentence, after "when asked".
FORM_NAMES: dict[str, str] = {
    "plain": "without a chat template",
    "chat": "in conversation",
    "system": "after a system message",
    "code": "for code",
    "language": "in another language",
    "own": "your own questions",
}

# The system message before a question of the form 'system'.
SYSTEM_MESSAGE = "You are a careful librarian who answers briefly."


class Everyday(NamedTuple):
    """A question, what it is about, and the form in which it is put.

    Attributes:
        topic: what the question is about.
        form: the form in which it is put.
        text: the question, or the last message of a conversation.
        messages: the conversation, if one was given.
        language: the language of the question; None for a caller's question whose language is not
            known.
    """

    topic: str
    form: Form
    text: str
    messages: Sequence[Mapping[str, str]] | None = None
    language: str | None = "English"


EVERYDAY: tuple[Everyday, ...] = (
    Everyday("food", "plain", "What should I cook tonight?"),
    Everyday("food", "chat", "How do I make a simple soup?"),
    Everyday("food", "system", "Which spices go well with rice?"),
    Everyday("food", "code", "Write a Python function that doubles the amounts of a recipe."),
    Everyday("animals", "language", "Warum schnurren Katzen?", language="German"),
    Everyday("animals", "plain", "How do birds find their way?"),
    Everyday("animals", "chat", "Which animal makes a good pet?"),
    Everyday("animals", "system", "How long does a horse live?"),
    Everyday("travel", "code", "Write a Python function that sums the miles of a trip."),
    Everyday(
        "travel", "language", "Que faut-il emporter pour un voyage à la mer ?", language="French"
    ),
    Everyday("travel", "plain", "What is a good way to see a new city?"),
    Everyday("travel", "chat", "Should I go by train or by car?"),
    Everyday("money", "system", "How can I save a little every month?"),
    Everyday("money", "code", "Write a Python function that computes compound interest."),
    Everyday("money", "language", "¿Por qué suben los precios?", language="Spanish"),
    Everyday("money", "plain", "What is a fair price for a used bicycle?"),
    Everyday("health", "chat", "How can I sleep better?"),
    Everyday("health", "system", "What helps against a headache?"),
    Everyday("health", "code", "Write a Python function that tells whether a pulse is normal."),
    Everyday("health", "language", "Come posso fare più movimento?", language="Italian"),
    Everyday("work", "plain", "How do I write a letter of application?"),
    Everyday("work", "chat", "How do I say no to my boss?"),
    Everyday("work", "system", "What makes a meeting useful?"),
    Everyday("work", "code", "Write a Python function that sorts tasks by their deadline."),
    Everyday("science", "language", "Wie entsteht ein Regenbogen?", language="German"),
    Everyday("science", "plain", "Why is the sea salty?"),
    Everyday("science", "chat", "How far away is the moon?"),
    Everyday("science", "system", "Why do leaves turn red in autumn?"),
    Everyday("history", "code", "Write a Python function that says in which century a year lies."),
    Everyday("history", "language", "Pourquoi a-t-on construit des châteaux ?", language="French"),
    Everyday("history", "plain", "How did people tell the time long ago?"),
    Everyday("history", "chat", "Who built the first roads?"),
    Everyday("home", "system", "How do I clean a window?"),
    Everyday("home", "code", "Write a Python function that computes the area of a room."),
    Everyday("home", "language", "¿Cómo puedo ahorrar agua en casa?", language="Spanish"),
    Everyday("home", "plain", "What can I do about a noisy door?"),
    Everyday("people", "chat", "Who are you?"),
    Everyday("people", "system", "What did you do last weekend?"),
    Everyday("people", "code", "Write a Python function that greets a friend by name."),
    Everyday("people", "language", "Cosa posso regalare a un amico?", language="Italian"),
)
