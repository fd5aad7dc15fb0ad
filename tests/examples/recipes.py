"One sound call for each public name of foundation.recipes, for the laws and the fuzz"

from foundation.models import card
from foundation.recipes import page

EXAMPLES = {
    "models.card.card_facts": lambda: (card.card_facts, dict(name="vgg_supervised")),
    "recipes.page.card_scores": lambda: (
        page.card_scores,
        dict(scores={"a": [0.5, 0.6], "b": [0.7, 0.6]}, control="b"),
    ),
    "recipes.page.card_curve": lambda: (page.card_curve, dict(name="bert_glosses", alt="falls")),
}
SKIP = {
    "models.card.FACTS": "a constant",
    "recipes.page.recipes": "takes nothing",
    "recipes.page.make": "trains for hours",
}
