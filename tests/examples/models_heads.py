"One sound call for each public name of foundation.models.heads, for the laws and the fuzz"

import torch

from foundation.models import heads
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
}
SKIP = {}
