"""Benign requests from templates: breadth of subject and wording that the corpora lack.

The harmful corpora are English imperatives and how-to questions; without benign requests of the same form the
form itself would be learned as the sign of harm. `ALARMING` and `DANGERS` give harmless requests with
alarming words.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from models.recipe import vocabulary as v

Maker = Callable[[random.Random], str]


def _how(r: random.Random) -> str:
    frame = r.choice(
        (
            "How do I {}?",
            "How can I {}?",
            "What is the best way to {}?",
            "Can you tell me how to {}?",
            "Give me step by step instructions to {}.",
            "Write a guide on how to {}.",
            "Teach me to {}.",
            "I want to {}. Where do I start?",
            "What do I need to {}?",
            "Explain how to {} without spending much.",
            "Give detailed instructions on how someone could {}.",
            "Help me {}.",
            "Write a tutorial on how to {}.",
            "Is it hard to {}?",
            "What mistakes should I avoid when I {}?",
            "Tips to {} quickly?",
        )
    )
    made = r.random() < 0.35
    return frame.format(
        f"{r.choice(('make', 'build', 'design', 'plan', 'create', 'sell'))} {r.choice(v.THINGS)}"
        if made
        else r.choice(v.TASKS)
    )


def _write(r: random.Random) -> str:
    verb = r.choice(
        ("Write", "Create", "Draft", "Compose", "Please write", "Can you write", "Help me write", "Develop")
    )
    form = r.choice(v.FORMS)
    if r.random() < 0.4:
        article, noun = form.split(" ", 1)
        tone = r.choice(v.TONES)
        form = f"{'an' if tone[0] in 'aeiou' else 'a'} {tone} {noun}" if article in ("a", "an") else form
    link = r.choice(
        ("about", "on", "explaining", "that praises", "in favour of", "criticising", "for people who love")
    )
    end = r.choice(
        ("", "", "", f" in {r.choice(v.PLACES)}", f" for {r.choice(v.ROLES)}", " with three examples")
    )
    return f"{verb} {form} {link} {r.choice(v.TOPICS)}{end}{r.choice(('.', '.', ''))}"


def _alarming(r: random.Random) -> str:
    verb, objects = r.choice(v.ALARMING)
    act = f"{verb} {r.choice(objects.split(', '))}"
    return r.choice(
        (
            "How do I {}?",
            "How can I {}?",
            "What is the best way to {}?",
            "Can you help me {}?",
            "Tell me how to {}.",
            "Give me tips to {}.",
            "What tools do I need to {}?",
            "Why is it so hard to {}?",
            "Explain how to {} step by step.",
            "Write a short guide on how to {}.",
            "What is the fastest way to {}?",
            "Is it safe to {}?",
        )
    ).format(act)


def _danger(r: random.Random) -> str:
    return r.choice(v.SAFE_FRAMES).format(r.choice(v.DANGERS))


def _fact(r: random.Random) -> str:
    person, place, work = r.choice(v.PEOPLE), r.choice(v.PLACES), r.choice(v.WORKS)
    year = r.randrange(1800, 2024)
    return r.choice(
        (
            f"who made {work}",
            f"when was {person} born",
            f"where did {person} live as a child",
            f"who wrote {work}",
            f"what is the capital of {place}",
            f"what is the population of {place}",
            f"when did {place} become independent",
            f"who won the election in {place} in {year}",
            f"In what year did {person} receive the award?",
            f"What is the name of the school that {person} attended?",
            f"who plays the main character in {work}",
            f"what is the meaning of {r.choice(v.TOPICS)}",
            f"How tall is the highest building in {place}?",
            f"On which day, month and year was {work} first shown in {place}?",
            f"who sang the first version of {work}",
            f"Who was the president of the society for {r.choice(v.TOPICS)} in {year}?",
            f"how many people visit {place}",
            f"what river flows through {place}",
            f"who was the first woman to study {r.choice(v.TOPICS)} in {place}",
            f"where is {place} on the map",
            f"What award did {person} win in {year}?",
            f"who killed the king in {work}",
            f"how many seasons of {work} are there",
            f"when did the war between {place} and {r.choice(v.PLACES)} end",
        )
    )


def _feeling(r: random.Random) -> str:
    who, trouble, mood = r.choice(v.RELATIONS), r.choice(v.TROUBLES), r.choice(v.FEELINGS)
    first = f"{who[0].upper()}{who[1:]} {trouble}."
    return r.choice(
        (
            f"{first} I feel {mood}. What should I do?",
            f"I feel so {mood} since {who} {trouble}. How can I cope?",
            f"{first} How can I talk about it?",
            f"I have been {mood} for months and I do not know why.",
            f"Why do I feel {mood} when {who} {trouble}?",
            f"I am {mood} all the time. {first} Is this normal?",
            f"How do I stop feeling {mood}?",
            f"{first} Should I forgive or leave?",
            f"I can't sleep because {who} {trouble}.",
        )
    )


def _explain(r: random.Random) -> str:
    a, b = r.sample(v.TOPICS, 2)
    return r.choice(
        (
            f"What is {a}?",
            f"Explain {a} in simple words.",
            f"What is the difference between {a} and {b}?",
            f"Why is {a} important?",
            f"List five facts about {a}.",
            f"Give me three reasons to study {a}.",
            f"Tell me something interesting about {a}.",
            f"What are the pros and cons of {a}?",
            f"How does {a} work?",
            f"How has {a} changed over the last century?",
            f"Compare {a} with {b}.",
            f"Summarise the debate about {a}.",
            f"Who is a famous expert on {a}?",
            f"What questions do people ask about {a}?",
            f"How does {a} affect {b}?",
            f"Describe the role of {a} in {r.choice(v.PLACES)}.",
            f"What should a beginner know about {a}?",
            f"Give examples of {a} in everyday life.",
            f"What do critics say about {a}?",
            f"Do you like {a}?",
        )
    )


def _code(r: random.Random) -> str:
    language, task = r.choice(v.LANGUAGES), r.choice(v.CODE_TASKS)
    return r.choice(
        (
            f"Write a {language} function to {task}.",
            f"How do I {task} in {language}?",
            f"Develop a {language} program to {task}.",
            f"Write a script that can {task}.",
            f"My {language} code should {task} but it fails. Why?",
            f"Show me {language} code to {task} and explain it.",
            f"What is the fastest way to {task} with {language}?",
            f"Create a tutorial on how to {task} using {language}.",
            f"Write a program that exploits recursion to {task}.",
        )
    )


def _role(r: random.Random) -> str:
    role, topic = r.choice(v.ROLES), r.choice(v.TOPICS)
    return r.choice(
        (
            f"You are {role}. Talk to me about {topic}.",
            f"Act as {role} and explain {topic}.",
            f"Imagine you are {role}. What would you say about {topic}?",
            f"Pretend to be {role} and help me {r.choice(v.TASKS)}.",
            f"What would {role} think about {topic}?",
            f"I want you to act as {role}. My first request is about {topic}.",
            f"Give advice like {role} would on how to {r.choice(v.TASKS)}.",
            f"Interview {r.choice(v.PEOPLE)} about {topic}.",
        )
    )


def _plan(r: random.Random) -> str:
    place, topic = r.choice(v.PLACES), r.choice(v.TOPICS)
    return r.choice(
        (
            f"Plan a weekend trip to {place}.",
            f"Suggest a gift for {r.choice(v.RELATIONS)} who likes {topic}.",
            f"What should I pack for {place}?",
            f"Recommend a book about {topic}.",
            f"Give me ideas for a party about {topic}.",
            f"Can you suggest a name for a shop that sells {r.choice(v.THINGS)[2:]}s?",
            f"Make a shopping list for {topic}.",
            f"What are the best places to see in {place}?",
            f"How much does {r.choice(v.THINGS)} cost in {place}?",
            f"Is {place} a good place for {topic}?",
            f"What is the weather like in {place} in spring?",
        )
    )


FAMILIES: dict[str, tuple[Maker, float]] = {
    "how": (_how, 1.5),
    "write": (_write, 2.0),
    "alarming": (_alarming, 1.5),
    "danger": (_danger, 1.5),
    "fact": (_fact, 1.0),
    "feeling": (_feeling, 1.0),
    "explain": (_explain, 1.5),
    "code": (_code, 0.8),
    "role": (_role, 0.8),
    "plan": (_plan, 0.8),
}
"""Families of templates with the weight at which they are drawn."""


def template_prompt(rng: random.Random) -> tuple[str, str]:
    """Draw a request; returns its text and its family."""
    names = list(FAMILIES)
    name = rng.choices(names, [FAMILIES[n][1] for n in names])[0]
    return FAMILIES[name][0](rng), name


def crime_prompt(rng: random.Random) -> str:
    """A request to commit a crime, in general words: the counterpart of `_danger` with the same nouns."""
    return rng.choice(v.CRIME_FRAMES).format(rng.choice(v.CRIMES))
