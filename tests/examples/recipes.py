"One sound call for each public name of foundation.recipes, for the laws and the fuzz"

from foundation.recipes import card

EXAMPLES = {
    "recipes.card.card_facts": lambda: (card.card_facts, dict(name="vgg_supervised")),
    "recipes.card.card_scores": lambda: (
        card.card_scores,
        dict(scores={"a": [0.5, 0.6], "b": [0.7, 0.6]}, control="b"),
    ),
    "recipes.card.card_curve": lambda: (card.card_curve, dict(name="bert_glosses", alt="falls")),
}
SKIP = {
    "recipes.card.FACTS": "a constant",
    "recipes.card.recipes": "takes nothing",
    "recipes.card.make": "trains for hours",
}
