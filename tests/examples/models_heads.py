"One sound call for each public name of foundation.models.heads, and text models of outside"

import torch

from foundation.models import heads, outside
from foundation.models.bert import BERT
from foundation.models.convnets import ConvNet


def bert():
    torch.manual_seed(0)
    return BERT(20, context=8, dim=8, depth=1, heads=2)


EXAMPLES = {
    "models.heads.replace_head": lambda: (
        heads.replace_head,
        dict(model=ConvNet(classes=3, widths=(4, 4)), classes=4),
    ),
    "models.heads.TextClassifier": lambda: (
        heads.TextClassifier,
        dict(encoder=bert(), classes=3, padding=0, zero=True),
    ),
    "models.heads.TextClassifier.encode": lambda: (
        heads.TextClassifier(bert(), 2).encode,
        dict(tokens=torch.tensor([[1, 2, 3], [4, 5, 0]])),
    ),
    "models.heads.without_head": lambda: (heads.without_head, dict(model=bert())),
    "models.outside.guess_words": lambda: (
        outside.guess_words,
        dict(
            model=bert(),
            tokens=torch.tensor([[1, 2, 3], [4, 5, 6]]),
            mask=torch.ones(2, 1, 3, 3, dtype=torch.bool),
            positions=torch.tensor([[True, False, True], [False, False, True]]),
        ),
    ),
    "models.outside.text_sizes": lambda: (outside.text_sizes, dict(model=bert())),
}
SKIP = {}
