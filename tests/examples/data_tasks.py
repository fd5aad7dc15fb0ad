"One sound call for each public name of data.tasks and data.text_tasks, for the laws and the fuzz"

import torch

from foundation.data import tasks, text_tasks
from foundation.data.images import ImageSet
from foundation.data.text import TextSet
from foundation.data.tokenizer import Tokenizer


def task():
    parts = torch.arange(30).split([18, 6, 6])
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    return tasks.Task(x, torch.arange(30) % 3, ("a", "b", "c"), *parts)


def pictures():
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8)
    y = torch.arange(60) % 3
    parts = images[:45], y[:45], images[45:], y[45:]
    return ImageSet(*parts, ("a", "b", "c"), "noise", "here", 0.5, 0.25)


def texts(count=12):
    words = tuple(f"text {'long ' * (i % 4)}{i}" for i in range(count))
    groups = tuple(map(str, range(count)))
    return TextSet("made", words, torch.arange(count) % 2, ("no", "yes"), groups, "none")


def encode(rows):
    return [list(text.encode()) for text in rows]


EXAMPLES = {
    "data.tasks.Task": lambda: (
        tasks.Task,
        dict(
            inputs=torch.randn(6, 2),
            labels=torch.tensor([0, 1, 0, 1, 0, 1]),
            classes=("even", "odd"),
            pool=torch.tensor([0, 1, 2]),
            dev=torch.tensor([3]),
            test=torch.tensor([4, 5]),
        ),
    ),
    "data.tasks.Task.draw": lambda: (task().draw, dict(count=6, seed=1)),
    "data.tasks.Task.part": lambda: (task().part, dict(name="dev")),
    "data.tasks.image_task": lambda: (tasks.image_task, dict(data=pictures(), dev=4)),
    "data.tasks.text_task": lambda: (
        tasks.text_task,
        dict(train=texts(), held=texts(5), encode=encode, pool=6, dev=3, test=4, longest=9),
    ),
    "data.tasks.encoder_of": lambda: (tasks.encoder_of, dict(tokenizer=Tokenizer([]), marks=True)),
    "data.text_tasks.text_set": lambda: (
        text_tasks.text_set,
        dict(texts=["good", "bad", "fair"], labels=["+", "-", "+"], classes=["-", "+"]),
    ),
    "data.text_tasks.as_tokenizer": lambda: (
        text_tasks.as_tokenizer,
        dict(tokenizer=Tokenizer([]).fast()),
    ),
    "data.text_tasks.find_words": lambda: (text_tasks.find_words, dict(tokenizer=Tokenizer([]))),
    "data.text_tasks.padding_id": lambda: (text_tasks.padding_id, dict(tokenizer=Tokenizer([]))),
    "data.text_tasks.own_text_task": lambda: (
        text_tasks.own_text_task,
        dict(data=texts(), tokenizer=Tokenizer([]), dev=0.2, test=0.3, longest=9, seed=1),
    ),
}
SKIP = {
    "data.tasks.gloss_task": "encodes thousands of texts that are fetched",
    "data.tasks.sentiment_task": "encodes thousands of texts that are fetched",
}
