"""One sound call for each public name of foundation.models.pretrained;
the laws and the fuzz start from them"""

import tempfile

import torch

from foundation.models import card, pretrained
from foundation.models.bert import BERT
from foundation.models.convnets import ConvNet


def small():
    torch.manual_seed(0)
    return ConvNet(classes=3, widths=(4,)).eval()


def shelf():
    folder = tempfile.mkdtemp()
    pretrained.save_weights(small(), "it", dict(data="none", steps=0), folder)
    return folder


class Letters:
    "A tokenizer: a letter is its place in the alphabet, padding is 0"

    def encode_batch(self, texts):
        n = max(map(len, texts)) or 1
        return [
            type(
                "Entry",
                (),
                dict(
                    ids=[ord(c) % 27 for c in text] + [0] * (n - len(text)),
                    attention_mask=[1] * len(text) + [0] * (n - len(text)),
                ),
            )
            for text in texts
        ]


def bert():
    torch.manual_seed(0)
    return BERT(30, 16, 16, 1, 2).eval()


EXAMPLES = {
    "models.pretrained.save_weights": lambda: (
        pretrained.save_weights,
        dict(
            model=small(),
            name="it",
            card=dict(data="none", steps=0),
            folder=tempfile.mkdtemp(),
            dtype=torch.float32,
        ),
    ),
    "models.card.write_card": lambda: (
        card.write_card,
        dict(path=f"{shelf()}/it.safetensors", card=dict(steps=1)),
    ),
    "models.card.card_text": lambda: (card.card_text, dict(card=dict(steps=1))),
    "models.pretrained.write_tensors": lambda: (
        pretrained.write_tensors,
        dict(path=f"{tempfile.mkdtemp()}/it", tensors=dict(x=torch.ones(2)), notes=dict(of="twos")),
    ),
    "models.pretrained.read_tensors": lambda: (
        pretrained.read_tensors,
        dict(path=f"{shelf()}/it.safetensors"),
    ),
    "models.card.hardware": lambda: (card.hardware, {}),
    "models.card.read_card": lambda: (card.read_card, dict(name="it", folder=shelf())),
    "models.card.read_file": lambda: (card.read_file, dict(name="it", folder=shelf())),
    "models.pretrained.load_weights": lambda: (
        pretrained.load_weights,
        dict(name="it", model=small(), folder=shelf()),
    ),
    "models.pretrained.BadWeights": lambda: (pretrained.BadWeights, ("they are damaged",), {}),
    "models.pretrained.rename_bert": lambda: (
        pretrained.rename_bert,
        dict(state={"encoder.layer.0.output.dense.bias": torch.ones(2)}),
    ),
    "models.pretrained.embed_texts": lambda: (
        pretrained.embed_texts,
        dict(model=bert(), tokenizer=Letters(), texts=["cab", "a"], batch_size=2),
    ),
    "models.pretrained.imagenet_inputs": lambda: (
        pretrained.imagenet_inputs,
        dict(images=torch.zeros(1, 3, 8, 9, dtype=torch.uint8), size=8),
    ),
}
SKIP = {
    "models.card.WEIGHTS": "a path",
    "models.card.BadWeights": "an error",
    "models.pretrained.load_minilm": "takes nothing, and reads 91 MB",
    "models.pretrained.load_efficientnet_lite0": "takes nothing, and reads 19 MB",
}
