"""The four training steps of `bench/gpu.py`: models at the sizes of their papers, the work of a
step in FLOPs, and the same step by others."""

import math
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from foundation.core.basics import in_order, memory_order
from foundation.models.bert import BERT
from foundation.models.gpt import GPT
from foundation.models.vit import ViT
from foundation.pretraining.contrastive import ContrastiveModel, match_views
from foundation.pretraining.masked_image import MaskedAutoencoder, masked_patches
from foundation.pretraining.masked_text import masked_tokens
from foundation.training.loop import train
from foundation.training.parameter_groups import adamw

from bench.gpu_clock import Place, plain_attention


@dataclass
class Task:
    "A model and what a step of its training does."

    name: str
    unit: str  # what is counted: images or tokens
    items: int  # of them in one example
    model: nn.Module
    objective: Callable  # (model, batch) -> loss, extras
    batch: Callable[[int], Any]  # number of examples -> a batch on the device
    flops: Callable[[int], float]  # number of examples -> FLOPs of a training step
    most: int  # examples of a batch, where memory allows more
    library: str  # the peer's
    peer: Callable  # our model -> their model, their loss of (model, batch)
    proof: Callable | None = None  # our model, theirs, their loss, a batch -> pairs of numbers
    parts: list = field(default_factory=list)  # layers that checkpointing computes again


# The work of a step -------------------------------------------------------------------------------
# Matrix products and convolutions count, 2 FLOPs for each multiplication with its addition; the way
# back costs twice the way there, except that nobody asks for the gradient of pictures. Causal
# attention counts in full, as in PaLM, appendix B. What is computed twice counts once.


def block_flops(n: int, d: int, ratio: float = 4, asked: int | None = None) -> float:
    "The way there through a transformer block: n tokens, of which `asked` ask (all by default)."
    a = n if asked is None else asked
    return 4 * n * d * d + 4 * a * d * d + 4 * a * n * d + 4 * ratio * a * d * d


def mae_flops(b, n, kept, pixels, dim, depth, dim2, depth2) -> float:
    encoder = depth * block_flops(kept, dim) + 2 * kept * dim * dim2
    decoder = depth2 * block_flops(n, dim2) + 2 * n * dim2 * pixels
    return b * (3 * (encoder + decoder) + 2 * 2 * n * pixels * dim)


def gpt_flops(b, n, v, dim, depth) -> float:
    return 3 * b * (depth * block_flops(n, dim) + 2 * n * dim * v)


def bert_flops(b, n, asked, v, dim, depth) -> float:
    "The last block and the head are computed for the hidden words alone."
    body = (depth - 1) * block_flops(n, dim) + block_flops(n, dim, asked=asked)
    return 3 * b * (body + 2 * asked * dim * (dim + v))


def net_flops(net: nn.Module, example: Tensor) -> float:
    "A training step of convolutions and linear layers, for each row of the example."
    found = []

    def count(layer, inputs, output):
        per_value = layer.weight[0].numel()  # products behind each number that comes out
        found.append(2 * output.numel() * per_value / len(example))

    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    was = net.training
    with torch.no_grad():
        net.eval()(example)
    net.train(was)
    for hook in hooks:
        hook.remove()
    return 3 * sum(found) - found[0]


def simclr_flops(b, per_view, dim) -> float:
    return 2 * b * per_view + 3 * 2 * (2 * b) ** 2 * dim


def counted_flops(task: Task, b: int) -> int:
    "What PyTorch's counter sees in one step, with attention written out in products."
    with FlopCounterMode(display=False) as counter, plain_attention():
        task.objective(task.model, task.batch(b))[0].backward()
    task.model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


# The tasks ----------------------------------------------------------------------------------------


def mae(place: Place) -> Task:
    "ViT-B/16, 75 % of the patches hidden, a decoder of 512 × 8 (He et al. 2021)."
    vit = place.pick(dict(dim=768, depth=12, heads=12), dict(dim=32, depth=2, heads=2))
    size, patch = place.pick((224, 16), (32, 8))
    dim2, depth2, heads2 = place.pick((512, 8, 16), (16, 1, 2))
    model = MaskedAutoencoder(ViT(size, patch, 3, **vit), dim2, depth2, heads2).to(place.device)
    n, pixels = (size // patch) ** 2, 3 * patch**2
    sizes = (n, round(n / 4), pixels, vit["dim"], vit["depth"], dim2, depth2)

    def peer(ours):
        from bench.mae import their_loss, their_mae

        theirs = their_mae(ours)
        last = torch.arange(pixels).view(3, patch, patch).permute(1, 2, 0).flatten()
        head = theirs.decoder.decoder_pred  # which paints the channels last
        with torch.no_grad():
            head.weight.copy_(head.weight[last])
            head.bias.copy_(head.bias[last])
        return theirs.to(place.device), their_loss

    def proof(ours, theirs, their_loss, images):
        from bench.mae import equal_losses

        return equal_losses(ours, masked_patches(0.75), theirs, images)

    return Task(
        name="ViT-B/16 MAE",
        unit="images",
        items=1,
        model=model,
        objective=masked_patches(0.75),
        batch=lambda b: torch.randn(b, 3, size, size, device=place.device),
        flops=lambda b: mae_flops(b, *sizes),
        most=512,
        library="transformers",
        peer=peer,
        proof=proof,
        parts=[*model.encoder.blocks, *model.decoder.blocks],
    )


class Trunk(nn.Module):
    "A torchvision ResNet up to its features, as `ContrastiveModel` reads it."

    def __init__(self, net):
        super().__init__()
        self.dim, net.fc, self.net = net.fc.in_features, nn.Identity(), net

    def encode(self, x: Tensor) -> Tensor:
        return self.net(x)


def simclr(place: Place) -> Task:
    "torchvision's ResNet-50 at 224 px, a projector 2048 → 128, channels last (Chen et al. 2020)."
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    trunk = Trunk(ResNet(*place.pick((Bottleneck, [3, 4, 6, 3]), (BasicBlock, [1, 1, 1, 1]))))
    model = ContrastiveModel(trunk, dim=128, hidden=place.pick(2048, 32)).to(place.device)
    order, size = memory_order(model), place.pick(224, 32)
    model = model.to(memory_format=order)

    def views(b):
        return in_order(torch.randn(2 * b, 3, size, size, device=place.device), order)

    def peer(ours):
        from bench.simclr import contrast

        loss = contrast()
        return deepcopy(ours), lambda net, views: loss(net, views.chunk(2))

    per_view = net_flops(model, views(1))
    return Task(
        name="ResNet-50 SimCLR",
        unit="images",
        items=1,
        model=model,
        objective=match_views(0.2),
        batch=views,
        flops=lambda b: simclr_flops(b, per_view, 128),
        most=256,
        library="lightly",
        peer=peer,
        parts=[layer for i in range(1, 5) for layer in getattr(trunk.net, f"layer{i}")],
    )


def bert(place: Place) -> Task:
    """BERT-base, rows of 512 tokens without padding, 77 of each hidden (Devlin et al. 2018); 30,528
    words, a multiple of 64."""
    n, v = place.pick((512, 30_528), (16, 64))
    size = place.pick(dict(dim=768, depth=12, heads=12), dict(dim=32, depth=2, heads=2))
    model, asked = BERT(v, n, **size).to(place.device), round(0.15 * n)

    def batch(b):
        tokens = torch.randint(5, v, (b, n), device=place.device)
        places = torch.rand(b, n, device=place.device).argsort(1) < asked
        return tokens.masked_fill(places, 4), None, places, tokens[places]

    def peer(ours):
        from bench.masked_text import their_bert, their_loss

        return their_bert(ours).to(place.device), their_loss

    return Task(
        name="BERT-base",
        unit="tokens",
        items=n,
        model=model,
        objective=masked_tokens,
        batch=batch,
        flops=lambda b: bert_flops(b, n, asked, v, size["dim"], size["depth"]),
        most=128,
        library="transformers",
        peer=peer,
        parts=[*model.blocks[:-1]],
    )


def next_tokens(model, tokens):
    "Objective: the cross-entropy of each next token; the batch is (b, n + 1)."
    logits = model(tokens[:, :-1]).flatten(0, 1)
    return nn.functional.cross_entropy(logits.float(), tokens[:, 1:].flatten()), {}


def gpt(place: Place) -> Task:
    "GPT-2 small, 1,024 tokens (Radford et al. 2019); 50,304 words, a multiple of 64."
    n, v = place.pick((1024, 50_304), (16, 64))
    size = place.pick(dict(dim=768, depth=12, heads=12), dict(dim=32, depth=2, heads=2))
    model = GPT(v, n, **size).to(place.device)
    return Task(
        name="GPT-2 small",
        unit="tokens",
        items=n,
        model=model,
        objective=next_tokens,
        batch=lambda b: torch.randint(v, (b, n + 1), device=place.device),
        flops=lambda b: gpt_flops(b, n, v, size["dim"], size["depth"]),
        most=64,
        library="transformers",
        peer=lambda ours: (their_gpt(ours).to(place.device), their_next_tokens),
        parts=[*model.blocks],
    )


TASKS = dict(mae=mae, simclr=simclr, bert=bert, gpt=gpt)


# The same step by others --------------------------------------------------------------------------


def their_next_tokens(model, tokens):
    logits = model(tokens[:, :-1], use_cache=False).logits.flatten(0, 1)
    return nn.functional.cross_entropy(logits.float(), tokens[:, 1:].flatten())


@torch.no_grad()
def their_gpt(ours: GPT):
    "The same model of `transformers`, with our weights."
    import transformers

    size, zero = ours.config, dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    config = transformers.GPT2Config(
        vocab_size=size["vocab_size"],
        n_positions=size["context"],
        n_embd=size["dim"],
        n_layer=size["depth"],
        n_head=size["heads"],
        layer_norm_epsilon=size["eps"],
        activation_function="gelu",
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
        **zero,
    )
    theirs = transformers.GPT2LMHeadModel(config).train()
    pairs = [(theirs.transformer.ln_f, ours.norm)]
    for block, mine in zip(theirs.transformer.h, ours.blocks):
        pairs += [(block.ln_1, mine.norm1), (block.ln_2, mine.norm2)]
        pairs += [(block.attn.c_proj, mine.attention.out)]
        pairs += [(block.mlp.c_fc, mine.mlp[0]), (block.mlp.c_proj, mine.mlp[3])]
        three = mine.attention.query, mine.attention.key, mine.attention.value
        block.attn.c_attn.weight.copy_(torch.cat([part.weight.T for part in three], 1))
        block.attn.c_attn.bias.copy_(torch.cat([part.bias for part in three]))
    for other, mine in pairs:  # their matrices stand the other way round
        other.weight.copy_(mine.weight.T if mine.weight.ndim > 1 else mine.weight)
        other.bias.copy_(mine.bias)
    theirs.transformer.wte.weight.copy_(ours.embedding.token.weight)
    theirs.transformer.wpe.weight.copy_(ours.embedding.position.weight)
    return theirs


def equal(task: Task, theirs: nn.Module, their_loss: Callable, b: int = 2) -> dict:
    "Name -> what came out of ours and of theirs in float32, on the same batch."
    batch = task.batch(b)
    if task.proof:
        return task.proof(task.model, theirs, their_loss, batch)
    with torch.no_grad():
        pair = task.objective(task.model, batch)[0].item(), their_loss(theirs, batch).item()
    return dict(loss=pair)


def same(proof: dict) -> bool:
    return all(math.isclose(*pair, rel_tol=1e-3) for pair in proof.values())


def our_steps(task: Task, model: nn.Module, batches: Iterable) -> Iterator:
    "The course's loop over batches that are on the device: a step for each `next`."
    plan = dict(steps=10**9, precision="bf16")
    return train(model, batches, task.objective, adamw(model, 1e-5), **plan)


def plain_steps(place: Place, model: nn.Module, loss_of: Callable, batch) -> Iterator[Tensor]:
    "The loop that one would write, with the same optimizer."
    opt = adamw(model, 1e-5)
    model.train()
    while True:
        with place.autocast():
            loss = loss_of(model, batch)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        yield loss.detach()


def compiled(place: Place, model: nn.Module) -> nn.Module:
    "A copy whose blocks are compiled one for all, or which is compiled as a whole if it has none."
    torch._dynamo.config.recompile_limit = 64  # some layers of others know their number
    model = deepcopy(model)
    rows = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for part in [part for row in rows for part in row] or [model]:
        part.compile(dynamic=False, backend=place.pick("inductor", "eager"))
    return model


def ways_of(place: Place, task: Task, b: int) -> tuple[dict, str]:
    "Name -> a call that takes a step; and what is to be said of the peer."

    def plainly(model, loss_of):
        return plain_steps(place, model, loss_of, task.batch(b)).__next__

    def loss_of(model, batch):
        return task.objective(model, batch)[0]

    ways = {
        "ours": our_steps(task, deepcopy(task.model), repeat(task.batch(b))).__next__,
        "ours, compiled": our_steps(
            task, compiled(place, task.model), repeat(task.batch(b))
        ).__next__,
        "our model, plain loop": plainly(deepcopy(task.model), loss_of),
    }
    try:
        theirs, their_loss = task.peer(task.model)
    except ImportError:
        return ways, f"{task.library} is not installed"
    proof = equal(task, theirs, their_loss)
    said = ", ".join(f"{name} {a:.6g} and {b:.6g}" for name, (a, b) in proof.items())
    ways[f"{task.library}"] = plainly(theirs, their_loss)
    ways[f"{task.library}, compiled"] = plainly(compiled(place, theirs), their_loss)
    verdict = "the same" if same(proof) else "NOT THE SAME"
    return ways, f"{task.library}: {verdict} with equal weights: {said}"


def fitting(total: float, base: float, each: float, most: int, copies: int = 5) -> int:
    """The largest power of two of examples that fits into 85 % of the memory, beside copies of
    weights and moments; `most` at most, 1 at least."""
    room = 0.85 * total - copies * base
    count = min(most, room / each) if each > 0 else most
    return 2 ** int(math.log2(max(count, 1)))


def find_batch(place: Place, task: Task) -> int:
    "By the memory of two small steps."
    if not place.cuda:
        return 2
    peaks = []
    run = our_steps(task, deepcopy(task.model), map(task.batch, (8, 16, 32)))
    for _ in range(3):  # the first makes the optimizer's moments
        torch.cuda.reset_peak_memory_stats()
        next(run)
        peaks.append(torch.cuda.max_memory_allocated())
    each = (peaks[2] - peaks[1]) / 16
    total = torch.cuda.get_device_properties(place.device).total_memory
    return fitting(total, max(peaks[1] - 16 * each, 0), each, task.most)


def started(place: Place, task: Task, b: int) -> tuple[int, dict, str]:
    """All ways after a first step each, with half the batch for all if one is out of memory; one
    that fails otherwise is left out, and that is said."""
    while True:
        try:
            ways, said = ways_of(place, task, b)
            for name, way in [*ways.items()]:
                try:
                    way()
                except RuntimeError as error:  # without a compiler for its kernels, say
                    if name == "ours" or isinstance(error, torch.OutOfMemoryError):
                        raise
                    del ways[name]
                    said += f"; {name} failed: {str(error).partition(chr(10))[0][:120]}"
            return b, ways, said
        except torch.OutOfMemoryError:
            if b == 1:
                raise
            b, ways = b // 2, None
        if place.cuda:
            torch.cuda.empty_cache()
