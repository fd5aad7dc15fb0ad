"One sound call for each public name of foundation.data; the laws and the fuzz start from them"

import tempfile
from pathlib import Path

import torch

from foundation.data import augment, batches, images, own_texts, tasks, text, tokenizer, views

WORDNET = '00001740 03 n 02 entity 0 whole_thing 0 001 ~ 00001930 n 0000 | a thing; "it is"\n'
TEXTS = ["the cat sat on the mat", "a mat for the cat", "the owl sat"]


def pixels(n=6):
    return torch.randint(
        256, (n, 1, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def table():
    path = Path(tempfile.mkdtemp()) / "texts.csv"
    path.write_text("text,label\ngood,a\nbad,b\n")
    return path


def shares():
    return pixels() / 255


def labels(n=6):
    return torch.arange(n) % 3


def seeded():
    return torch.Generator().manual_seed(0)


def place(name, content=None):
    path = Path(tempfile.mkdtemp()) / name
    if content is not None:
        path.write_bytes(content)
    return path


def rows():
    return [[5, 6], [7], [8, 9, 10], [11, 12]]


def documents():
    return batches.join(rows())


def first(stream):
    "What a stream gives first, as a function of the same arguments"

    def call(*args, **options):
        return next(stream(*args, **options))

    call.__name__ = stream.__name__
    return call


def some_texts():
    names = tuple(f"text {i}" for i in range(30))
    return text.TextSet("some", names, labels(30), ("a", "b", "c"), names)


def shift(x, generator):
    return x + torch.rand(x.shape, generator=generator)


def stored():
    return batches.store(place("x.npy"), [torch.arange(6).view(2, 3)])


def image_set(**change):
    parts = dict(
        train_images=pixels(), train_labels=labels(), test_images=pixels(3), test_labels=labels(3)
    )
    about = dict(classes=("a", "b", "c"), name="tiny", source="here", mean=0.5, std=0.25)
    return parts | about | change


EXAMPLES = {
    "data.augment.sample_boxes": lambda: (
        augment.sample_boxes,
        dict(images=shares(), centers=torch.zeros(6, 2), halves=torch.full((6, 2), 0.5), size=5),
    ),
    "data.augment.Augment": lambda: (
        augment.Augment,
        dict(
            area=(0.3, 1.0),
            aspect=1.5,
            flip=0.5,
            contrast=0.4,
            brightness=0.4,
            erase=0.1,
            mean=0.3,
            std=0.5,
        ),
    ),
    "data.augment.Augment.__call__": lambda: (
        augment.Augment(erase=0.5),
        dict(images=shares(), generator=seeded()),
    ),
    "data.augment.PerImage": lambda: (
        augment.PerImage,
        dict(transform=torch.flipud, mean=0.3, std=0.4),
    ),
    "data.augment.PerImage.__call__": lambda: (
        augment.PerImage(torch.flipud),
        dict(images=shares(), generator=seeded()),
    ),
    "data.batches.epoch_order": lambda: (batches.epoch_order, dict(count=9, seed=3, epoch=2)),
    "data.batches.endless": lambda: (
        first(batches.endless),
        (pixels(), labels()),
        dict(batch_size=2, seed=1, start=4),
    ),
    "data.batches.augmented": lambda: (
        first(batches.augmented),
        (shares(), labels()),
        dict(augment=shift, batch_size=2, seed=1, start=4, views=2),
    ),
    "data.views.two_views": lambda: (
        first(views.two_views),
        dict(images=shares(), augment=shift, batch_size=2, seed=0, start=1),
    ),
    "data.batches.by_length": lambda: (
        first(batches.by_length),
        dict(tokens=batches.pad(rows())[0], batch_size=2, seed=0),
    ),
    "data.batches.Documents": lambda: (
        batches.Documents,
        dict(tokens=torch.arange(6), ends=torch.tensor([2, 3, 6])),
    ),
    "data.batches.Documents.__getitem__": lambda: (documents().__getitem__, (1,), {}),
    "data.batches.join": lambda: (batches.join, dict(rows=rows())),
    "data.batches.pad": lambda: (batches.pad, dict(rows=rows(), value=0, longest=2)),
    "data.batches.padded": lambda: (
        first(batches.padded),
        (rows(), labels(4)),
        dict(batch_size=2, value=0, longest=2, seed=1, start=3, pool=2),
    ),
    "data.batches.packed": lambda: (
        first(batches.packed),
        dict(documents=documents(), context=3, batch_size=2, value=0, seed=1, start=3),
    ),
    "data.batches.same_document": lambda: (
        batches.same_document,
        dict(owner=torch.tensor([[0, 0, 1], [2, 2, -1]])),
    ),
    "data.batches.store": lambda: (
        batches.store,
        dict(path=place("x.npy"), parts=[torch.zeros(2, 3), torch.ones(1, 3)]),
    ),
    "data.batches.mapped": lambda: (batches.mapped, dict(path=stored())),
    "data.batches.store_documents": lambda: (
        batches.store_documents,
        dict(folder=place("d"), rows=rows(), vocab_size=13),
    ),
    "data.batches.open_documents": lambda: (
        batches.open_documents,
        dict(folder=batches.store_documents(place("d"), rows(), 13)),
    ),
    "data.images.ImageSet": lambda: (images.ImageSet, image_set()),
    "data.images.ImageSet.floats": lambda: (
        images.ImageSet(**image_set()).floats,
        dict(images=pixels()),
    ),
    "data.images.ImageSet.test_sample": lambda: (
        images.ImageSet(**image_set()).test_sample,
        dict(count=2, seed=1),
    ),
    "data.images.check_set": lambda: (
        images.check_set,
        dict(images=pixels(), labels=labels(), classes=3),
    ),
    "data.images.to_float": lambda: (images.to_float, dict(images=pixels(), mean=0.5, std=0.25)),
    "data.images.read_idx": lambda: (
        images.read_idx,
        dict(path=place("x", b"\0\0\x08\x02\0\0\0\2\0\0\0\2abcd")),
    ),
    "data.images.load_images": lambda: (images.load_images, dict(name="digits", fallback=False)),
    "data.images.by_channel": lambda: (images.by_channel, dict(value=(0.1, 0.2), name="mean")),
    "data.images.as_column": lambda: (images.as_column, dict(value=0.5, images=pixels())),
    "data.images.standard_of": lambda: (images.standard_of, dict(images=pixels())),
    "data.own_texts.read_texts": lambda: (
        own_texts.read_texts,
        dict(source=table(), text="text", label="label", classes=["a", "b"]),
    ),
    "data.tasks.cut_row": lambda: (tasks.cut_row, dict(row=[2, 7, 8, 3], longest=3)),
    "data.tasks.few_labels": lambda: (
        tasks.few_labels,
        dict(labels=labels(30), count=7, seed=1),
    ),
    "data.images.split": lambda: (
        images.split,
        dict(count=12, parts=(0.5, 0.5), seed=1, groups=torch.arange(12) // 2),
    ),
    "data.images.duplicates": lambda: (
        images.duplicates,
        dict(images=pixels(), others=pixels()[2:4]),
    ),
    "data.images.ImageDataset": lambda: (
        images.ImageDataset,
        dict(images=pixels(), labels=labels(), transform=torch.Tensor.float),
    ),
    "data.text.Gloss": lambda: (
        text.Gloss,
        dict(words=("a",), field="noun.food", definition="x", examples=()),
    ),
    "data.text.read_glosses": lambda: (
        text.read_glosses,
        dict(path=place("data.noun", WORDNET.encode())),
    ),
    "data.text.TextSet": lambda: (
        text.TextSet,
        dict(
            name="x",
            texts=("a", "b"),
            labels=torch.tensor([0, 1]),
            classes=("c", "d"),
            groups=("1", "2"),
            licence="",
        ),
    ),
    "data.text.TextSet.take": lambda: (some_texts().take, dict(indices=torch.tensor([3, 0, -1]))),
    "data.text.Snippet": lambda: (text.Snippet, dict(text="x", valence=0.5, document=None)),
    "data.text.read_snippets": lambda: (
        text.read_snippets,
        dict(path=place("r.txt", b"1_1\t0.5\tfine\n2\t-1\tdull\n")),
    ),
    "data.text.split_texts": lambda: (
        text.split_texts,
        dict(data=some_texts(), test=0.4, seed=1),
    ),
    "data.tokenizer.show_token": lambda: (tokenizer.show_token, dict(token=b"na ve")),
    "data.tokenizer.split_words": lambda: (tokenizer.split_words, dict(text="The fox's 3 foxes")),
    "data.tokenizer.find_merges": lambda: (
        tokenizer.find_merges,
        dict(counts={"sand": 9, "hand": 7}, size=259),
    ),
    "data.tokenizer.Tokenizer": lambda: (
        tokenizer.Tokenizer,
        dict(merges=[(b"a", b"b"), (b"ab", b"c")], special=("[PAD]", "[MASK]")),
    ),
    "data.tokenizer.Tokenizer.encode": lambda: (
        tokenizer.Tokenizer([(b"a", b"b")]).encode,
        dict(text="abba [MASK]", special=True),
    ),
    "data.tokenizer.Tokenizer.decode": lambda: (
        tokenizer.Tokenizer([(b"a", b"b")]).decode,
        dict(ids=torch.tensor([3, 70, 261]), special=True),
    ),
    "data.tokenizer.Tokenizer.save": lambda: (
        tokenizer.Tokenizer([(b"a", b"b")]).save,
        dict(path=place("t.json")),
    ),
    "data.tokenizer.Tokenizer.load": lambda: (
        tokenizer.Tokenizer.load,
        dict(path=tokenizer.Tokenizer([(b"a", b"b")]).save(place("t.json"))),
    ),
    "data.tokenizer.Tokenizer.fast": lambda: (
        tokenizer.Tokenizer([(b"a", b"b")]).fast,
        dict(special=False),
    ),
    "data.tokenizer.train_bpe": lambda: (
        tokenizer.train_bpe,
        dict(texts=TEXTS, vocab_size=263, special=("[PAD]",)),
    ),
}
SKIP = {
    "data.images.FASHION": "a constant",
    "data.text.FIELDS": "a constant",
    "data.tokenizer.SPECIAL": "a constant",
    "data.text.glosses": "fetches its files",
    "data.text.reviews": "fetches its files",
}
