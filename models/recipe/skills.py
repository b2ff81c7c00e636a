"""Small talk and a few synthetic skills, so that plain greetings and tiny tasks are answered in kind."""

from __future__ import annotations

import random

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Germany": "Berlin",
    "England": "London",
    "Egypt": "Cairo",
    "Greece": "Athens",
}
"""Few facts, repeated often: a model of this size keeps no more."""

OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "fast": "slow",
    "up": "down",
    "happy": "sad",
    "old": "young",
    "light": "dark",
}

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")
FRUITS = ("apple", "banana", "cherry", "grape", "lemon", "mango", "orange", "pear", "plum")
ANIMALS = ("cat", "dog", "horse", "cow", "sheep", "bird", "fish", "mouse", "lion")

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Hello",
            "Hi",
            "Hey",
            "Good morning",
            "Good evening",
            "Hello there",
            "Hi there",
            "Hello!",
            "hey you",
            "Greetings",
        ),
        "Hello! How can I help you today?",
    ),
    (
        ("Thanks", "Thank you", "Thanks a lot", "Thank you very much", "thx", "Great, thanks", "ok thanks"),
        "You're welcome!",
    ),
    (("Bye", "Goodbye", "See you later", "Good night", "See you"), "Goodbye! Have a nice day."),
    (
        ("How are you?", "How are you doing?", "how is it going", "What's up?"),
        "I'm fine, thank you. How can I help you?",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Are you a robot?", "Are you human?"),
        "I am a small language model made for experiments.",
    ),
    (
        ("What can you do?", "How can you help me?", "Help", "help me please"),
        "I can answer simple questions and write short texts.",
    ),
    (
        ("Tell me a joke", "Make me laugh", "Do you know a joke?"),
        "Why did the chicken cross the road? To get to the other side.",
    ),
    (
        ("Yes", "No", "Ok", "Okay", "Sure", "Fine", "Good", "I see", "Cool"),
        "Good. What would you like to do next?",
    ),
    (("test", "Testing", "This is a test", "ping"), "I am here. How can I help you?"),
)


def small_talk(rng: random.Random) -> tuple[str, str]:
    """A greeting or a like phrase, and its answer."""
    asked, answer = rng.choice(SMALL_TALK)
    return rng.choice(asked), answer


def skill(rng: random.Random) -> tuple[str, str]:
    """A tiny task with a correct answer."""
    kind = rng.randrange(6)
    words = rng.choice((COLOURS, FRUITS, ANIMALS))
    if kind == 0:
        country, capital = rng.choice(list(CAPITALS.items()))
        asked = rng.choice(
            ("What is the capital of {}?", "Tell me the capital of {}.", "which city is the capital of {}")
        )
        return asked.format(country), f"The capital of {country} is {capital}."
    if kind == 1:
        word, other = rng.choice(list(OPPOSITES.items()))
        return rng.choice(("What is the opposite of {}?", "Give me the opposite of {}.")).format(
            word
        ), f"The opposite of {word} is {other}."
    if kind == 2:
        name = "colors" if words is COLOURS else "fruits" if words is FRUITS else "animals"
        picked = rng.sample(words, 3)
        return f"Name three {name}.", f"{picked[0].capitalize()}, {picked[1]} and {picked[2]}."
    if kind == 3:
        picked = rng.sample(words, 3)
        return "Sort these words: " + ", ".join(picked) + ".", ", ".join(sorted(picked))
    if kind == 4:
        word = rng.choice(words)
        return f"Repeat the word {word}.", word
    word = rng.choice(words)
    return f"Write {word} in capital letters.", word.upper()
