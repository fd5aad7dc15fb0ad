"A step of masked words against `BertForMaskedLM`, which computes the logits of all places."

import torch

from foundation.data.batches import Documents
from foundation.data.tokenizer import Tokenizer
from foundation.models.bert import BERT
from foundation.models.pretrained import rename_bert
from foundation.pretraining.masked_text import masked_stream, masked_tokens

from .duel import Duel, carry, our_steps, outcome, paired, peer, plain_steps, several

SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}


class Sized(Tokenizer):
    "A tokenizer of any size without its merges: the step needs the numbers alone"

    def __init__(self, vocab_size):
        super().__init__([])
        self.size = vocab_size

    @property
    def vocab_size(self):
        return self.size


def masked_text(
    precision: str = "fp32",
    vocab_size: int = 8192,
    context: int = 128,
    dim: int = 256,
    depth: int = 4,
    heads: int = 4,
    batch_size: int = 32,
) -> Duel:
    "Both read the same rows with the same words hidden; only ours spares logits nobody asks for."
    documents = made_up(vocab_size, 2 * batch_size * context)
    tokenizer = Sized(vocab_size)

    def batches():
        return masked_stream(documents, tokenizer, context=context, batch_size=batch_size)

    ours = BERT(vocab_size, context, dim, depth, heads)
    theirs = their_bert(ours)
    batch = next(batches())
    proof = paired(
        outcome(masked_tokens(ours, batch)[0], ours.embedding.token.weight),
        outcome(their_loss(theirs, batch), theirs.bert.embeddings.word_embeddings.weight),
    )
    return Duel(
        unit="tokens/s",
        items=batch_size * context,
        limit=2.7 if precision == "fp32" else None,
        ours=several(our_steps(ours, batches(), masked_tokens, precision)),
        peers={"transformers": several(plain_steps(theirs, batches(), their_loss, precision))},
        proof=proof,
        note=(
            "same weights, batches, hidden words and attention mask on both sides; SDPA, no"
            " dropout, fused AdamW; made-up documents, because a step takes as long whatever the"
            " words are"
        ),
    )


def made_up(vocab_size: int, tokens: int) -> Documents:
    "Documents of 15 words, as long as a dictionary's definitions."
    words = torch.randint(
        len(SPECIAL), vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)
    )
    return Documents(words, torch.arange(15, tokens + 15, 15).clamp(max=tokens))


def their_bert(ours: BERT):
    "The same model of `transformers`, with our weights."
    library, size = peer("transformers"), ours.config
    config = library.BertConfig(
        vocab_size=size["vocab_size"],
        max_position_embeddings=size["context"],
        hidden_size=size["dim"],
        num_hidden_layers=size["depth"],
        num_attention_heads=size["heads"],
        layer_norm_eps=size["eps"],
        intermediate_size=int(size["dim"] * size["mlp_ratio"]),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    theirs = library.BertForMaskedLM(config).train()
    names = rename_bert({name.removeprefix("bert."): name for name in theirs.state_dict()})
    head = {
        "cls.predictions.transform.dense.": "head.0.",
        "cls.predictions.transform.LayerNorm.": "head.2.",
        "cls.predictions.bias": "bias",
    }
    for prefix, mine in head.items():
        names = {name.replace(prefix, mine): other for name, other in names.items()}
    carry(ours, theirs, {name: other for name, other in names.items() if "decoder" not in name})
    return theirs


def their_loss(model, batch):
    "As its page shows it: labels of -100 where nothing is to be guessed."
    inputs, mask, places, targets = batch
    labels = torch.full_like(inputs, -100).masked_scatter(places, targets)
    return model(input_ids=inputs, attention_mask=mask, labels=labels).loss
