"One sound call for each public name of the recipes of this chapter: MiniLM in half, three VGGs"

import tempfile
from pathlib import Path

import torch

from foundation.compression.transformers import keep_layers
from foundation.data.images import ImageSet
from foundation.models.convnets import VGG, ConvNet
from foundation.models.pretrained import save_weights
from foundation.recipes import minilm_sentiment as m
from foundation.recipes import vgg_compressed, vgg_pruned
from foundation.training.loop import classify, load_optimizers

from .compression_1 import draw, encoder, made, whole

load_optimizers()  # PyTorch's late imports take seconds: no call's clock should count them


def texts(count=6):
    tokens = 1 + whole(19, count, 5)
    return tokens.where(torch.arange(5) < 2 + torch.arange(count)[:, None] % 4, 0)


def vgg():
    return made(VGG, widths=(4, 6), depths=(1, 1)).eval()


def tiny():
    return made(ConvNet, widths=(4,))


def pictures():
    images, labels = whole(256, 32, 1, 8, 8).to(torch.uint8), torch.arange(32) % 10
    return ImageSet(images, labels, images, labels, tuple("abcdefghij"), "noise", "here", 0.5, 0.3)


def student_folder():
    folder = Path(tempfile.mkdtemp())
    student = m.sentiment_model(keep_layers(encoder(), [0]))
    card = dict(config={}, layers=[0])
    save_weights(student, "small", card, folder, only="learnt", int8=True)
    return folder


EXAMPLES = {
    "recipes.minilm_sentiment.sentiment_model": lambda: (
        m.sentiment_model,
        dict(encoder=encoder()),
    ),
    "recipes.minilm_sentiment.train_texts": lambda: (
        lambda *given, **options: m.train_texts(*given, **options).losses,
        (m.sentiment_model(encoder()), texts(), whole(2, 6)),
        dict(objective=classify, steps=1, lr=1e-3, batch_size=2, seed=0),
    ),
    "recipes.minilm_sentiment.text_logits": lambda: (
        m.text_logits,
        dict(model=m.sentiment_model(encoder()), tokens=texts()),
    ),
    "recipes.minilm_sentiment.usual_texts": lambda: (
        m.usual_texts,
        dict(tokens=texts(), count=2),
    ),
    "recipes.minilm_sentiment.text_costs": lambda: (
        m.text_costs,
        dict(models=dict(one=m.sentiment_model(encoder())), tokens=texts(2), rounds=1),
    ),
    "recipes.minilm_sentiment.load_student": lambda: (
        m.load_student,
        dict(encoder=encoder(), name="small", folder=student_folder()),
    ),
    "recipes.vgg_pruned.slim_vgg": lambda: (
        vgg_pruned.slim_vgg,
        dict(teacher=vgg(), widths=(2, 3)),
    ),
    "recipes.vgg_pruned.recover": lambda: (
        vgg_pruned.recover,
        dict(model=tiny(), data=pictures(), logits=draw(32, 10), steps=1, lr=1e-3, seed=0),
    ),
    "recipes.vgg_pruned.pruning_arms": lambda: (
        vgg_pruned.pruning_arms,
        dict(teacher=vgg(), steps=4, slim_steps=1),
    ),
    "recipes.vgg_compressed.compress": lambda: (
        vgg_compressed.compress,
        dict(
            dense=tiny(),
            data=pictures(),
            logits=draw(32, 10),
            zeros=0.5,
            size=4,
            steps=2,
            tune=1,
            seed=0,
            checkpoint="",
        ),
    ),
}
SKIP = {
    "recipes.minilm_sentiment.FILES": "a constant",
    "recipes.minilm_sentiment.LAYERS": "a constant",
    "recipes.minilm_sentiment.RATES": "a constant",
    "recipes.minilm_sentiment.SentimentRuns": "needs the reviews",
    "recipes.minilm_sentiment.SentimentRuns.teacher": "minutes, and MiniLM",
    "recipes.minilm_sentiment.SentimentRuns.teacher_logits": "minutes, and MiniLM",
    "recipes.minilm_sentiment.compare_students": "minutes, and MiniLM",
    "recipes.minilm_sentiment.make": "minutes, and MiniLM",
    "recipes.vgg_supervised.FILES": "a constant",
    "recipes.vgg_supervised.make": "minutes, and Fashion-MNIST",
    "recipes.vgg_pruned.FILES": "a constant",
    "recipes.vgg_pruned.SLIM": "a constant",
    "recipes.vgg_pruned.compare_pruning": "trains ten networks",
    "recipes.vgg_pruned.make": "hours",
    "recipes.vgg_compressed.FILES": "a constant",
    "recipes.vgg_compressed.ARMS": "a constant",
    "recipes.vgg_compressed.make": "trains for an hour on the real data",
}
