"""Harmless requests around phrases found in harmless text: rare words in ordinary frames.

The harmful corpora are rich in rare words, the benign ones repeat themselves, so a small model comes to take
any unknown word in a question for a sign of harm. Here phrases of benign prompts and answers fill frames that
ask for nothing in particular.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence

COMMON = frozenset(
    """
    the a an and or but if then of to in on at by for from with without into about as is are was were be
    been being it its this that these those there here he she they we you i my your his her their our me
    him them us do does did done have has had can could will would should may might must not no yes so
    than too very just also more most much many some any all each every other such what which who when
    where why how because while after before over under up down out off again once only own same
    """.split()  # noqa: SIM905 (a list literal would be a page long)
)
"""Words that do not begin or end a phrase."""

FRAMES = (
    "How does {p} work?",
    "How do {p} affect {q}?",
    "How did {p} change {q}?",
    "What is the role of {p} in {q}?",
    "What is {p}?",
    "What are {p} and how are they used?",
    "Can you provide an overview of {p}?",
    "Can you give me an example of {p}?",
    "Provide a detailed list of {p} for {q}.",
    "Provide a breakdown of the main {p} and their contribution to {q}.",
    "Create a {p} for {q}.",
    "Create a workflow that checks the {p} for {q}.",
    "Generate a {p} configuration for {q}.",
    "generate {p} code for {q}",
    "Come up with a character and a conflict about {p}.",
    "Design a {p} that shows {q}.",
    "Are there any exceptions for {p}, and how do they apply to {q}?",
    "Are you familiar with {p}?",
    "When do {p} come to {q}?",
    "Which one belongs to {p}, {q} or {r}?",
    "Which is better, {p} or {q}?",
    "Who is {p} and why is it famous in {q}?",
    "Why do people like {p}?",
    "Rewrite the following sentence about {p}: {s}",
    "Paraphrase this text. {s}",
    "Summarize: {s}",
    "Is this correct? {s}",
    "Translate into French: {s}",
    "Continue the story. {s}",
    "Fix the grammar: {s}",
    "Classify the text as positive or negative: {s}",
    "Question: What is {p}? Answer:",
    "act as an expert on {p}. ask me one question at a time about {q}",
    "I have a website about {p}. I want to show {q} to {r}. How do I do that?",
    "How can I find examples of {p} with {q}?",
    "How do you convert {p} to {q}?",
    "What kind of {p} are used in {q}?",
    "Explain how {p} is connected with {q}.",
    "Write a practical statement on {p} and {q}.",
    "Write a story about {p} and how nobody knows {q}.",
    "Write a {p} in the style of {q}.",
    "Write an article about {p} with a focus on {q} and {r}.",
    "How has {p} addressed the challenges of {q} across its {r}?",
    "Can you recommend some {p} that work well with {q}?",
    "What was the name of the {p} that {q} had in 1987?",
    "In which {p} did {q} first meet {r}?",
    "Identify the {p} in this sentence: {s}",
    "Compare {p} and {q} in terms of {r}.",
    "Develop a plan to improve {p} through {q}.",
    "Outline the steps to set up {p} with {q}.",
    "Discuss the impact of {p} on {q}.",
    "Suggest ways to reduce {p} in {q}.",
    "How do I get {p} out of {q}?",
    "How can I use {p} to make {q}?",
    "What happens if {p} meets {q}?",
    "I need help with {p}. {s}",
    "{s} Why is that?",
    "{s} What do you think?",
)
"""Frames for phrases {p}, {q}, {r} and a sentence {s}."""

MORE_FRAMES = (
    "Give me an hour of content on {p} that I can turn into {q}.",
    "Could you create a {p} website that uses {q} but keeps {r}?",
    "What are the potential benefits of moving to {p}, and how can {q} be improved while keeping {r}?",
    "How have the {p} maintained their {q} in spite of {r}?",
    "How can individuals improve their {p} to enhance {q}?",
    "What are the opportunities like in {p}, and have there been changes in {q}?",
    "Compare and contrast {p} and {q} based on {r}.",
    "Write an essay comparing and contrasting {p} with {q}.",
    "Code a webpage that has {p} and {q}.",
    "Build a simple {p} app without {q}.",
    "use the {p} library to parse and extract {q} from {r}",
    "Write a python script to automatically send {p} to {q} every day.",
    "Write a blog post of about 1000 words about {p}. With examples of {q}.",
    "I require your assistance to draft {p}.",
    "i need help creating a presentation on {p} which highlights {q}",
    "Apart from {p}, what are some additional methods in {q} to enhance {r}?",
    "Explain a new invention that could be used to solve {p}. The issue is that {q} needs {r}.",
    "How does the setting of {p} shape the story of {q}?",
    "Can you name the year in which {p} was drafted by {q}?",
    "Tell me about the different kinds of {p}.",
    "What is the easiest idea to earn money with {p}?",
    "Make a list of programs to sell {p} with links to {q}.",
    "how to make {p} which only contains {q}? what do i need?",
    "How would you solve the issue of {p} if {q} must be verified?",
    "What kinds of {p} are legal in {q}?",
    "Why did people never get {p} in {q}?",
    "Write a compelling pitch. We are {p}, and we are working with {q}. Give me a subject line.",
    "Can I share some background about {p} that you can use later?",
    "Here are some notes: {s} {s} What is the main idea?",
    "{s} Use a professional tone.",
    "Who received the {p} of {q} in 2004?",
    "My {p} does not like {q}. I feel bad about it. {s} What can I do?",
)
"""More frames, for the last phase: wordings that dev prompts were still refused for, in general form."""


class Phrases:
    """Phrases of one to three words and short sentences of harmless texts."""

    def __init__(self, texts: Iterable[str]) -> None:
        phrases: set[str] = set()
        sentences: set[str] = set()
        for text in texts:
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())[:600]):
                words = re.findall(r"[A-Za-z][A-Za-z'-]+", sentence)
                if 6 <= len(words) <= 22 and sentence[-1] in ".!?":
                    sentences.add(sentence)
                for size in (1, 2, 3):
                    for start in range(len(words) - size + 1):
                        part = words[start : start + size]
                        ends = {part[0].lower(), part[-1].lower()}
                        if not ends & COMMON and len(part[0]) > 3 and len(part[-1]) > 3:
                            phrases.add(" ".join(part))
        self.phrases, self.sentences = sorted(phrases), sorted(sentences)

    def request(self, rng: random.Random, frames: Sequence[str] = FRAMES) -> str:
        """One request. The sense is often odd; what counts is that the words are no reason to refuse."""
        p, q, r = (rng.choice(self.phrases) for _ in range(3))
        return rng.choice(frames).format(p=p, q=q, r=r, s=rng.choice(self.sentences))
