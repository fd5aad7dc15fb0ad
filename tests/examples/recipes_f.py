"One sound call for each public name of foundation.recipes.minilm_glosses_lora"

import torch

from foundation.data.tasks import Task
from foundation.models.bert import BERT
from foundation.recipes import minilm_glosses_lora as recipe


def bert():
    torch.manual_seed(0)
    return BERT(20, 8, 8, 1, 2).eval()


class Few(Task):
    "One that draws what it has"

    def draw(self, count, seed):
        return self.pool


def nouns():
    tokens = torch.randint(1, 20, (12, 5), generator=torch.Generator().manual_seed(0))
    parts = torch.arange(12).split([6, 3, 3])
    texts = ("a cat", "an owl", "the sea") * 4
    return Few(tokens, torch.arange(12) % 3, ("x", "y", "z"), *parts, texts)


def optimizer_after_a_step():
    model = torch.nn.Linear(3, 2)
    opt = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).square().mean().backward()
    opt.step()
    return opt


EXAMPLES = {
    "recipes.minilm_glosses_lora.prepared": lambda: (
        recipe.prepared,
        dict(encoder=bert(), method="BitFit", task=nouns(), seed=0),
    ),
    "recipes.minilm_glosses_lora.method_score": lambda: (
        recipe.method_score,
        dict(
            encoder=bert(),
            task=nouns(),
            method="BitFit",
            seed=0,
            rate=2**-10,
            part="dev",
            steps=1,
        ),
    ),
    "recipes.minilm_glosses_lora.optimizer_bytes": lambda: (
        recipe.optimizer_bytes,
        dict(opt=optimizer_after_a_step()),
    ),
}
SKIP = {
    "recipes.minilm_glosses_lora.FILES": "a constant",
    "recipes.minilm_glosses_lora.METHODS": "a constant",
    "recipes.minilm_glosses_lora.VARIANTS": "a constant",
    "recipes.minilm_glosses_lora.RATES": "a constant",
    "recipes.minilm_glosses_lora.BEYOND": "a constant",
    "recipes.minilm_glosses_lora.LABELS": "a constant",
    "recipes.minilm_glosses_lora.PICKED_ON": "a constant",
    "recipes.minilm_glosses_lora.method_arms": "gives functions, which tests/test_lora.py calls",
    "recipes.minilm_glosses_lora.compare_methods": "trains many networks, minutes",
    "recipes.minilm_glosses_lora.step_costs": "measures seconds, other ones at each call",
    "recipes.minilm_glosses_lora.make": "a recipe, a quarter of an hour",
    "recipes.minilm_glosses_lora.load_adapter": "needs MiniLM from the network",
}
