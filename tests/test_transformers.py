"""Models that people train, as they train them, against the same model in float32 by eager code."""

import dataclasses
from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.utils.data import DataLoader

import equigrad as eg

transformers = pytest.importorskip("transformers", reason="the extra `dev` has it")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
N, LENGTH, WORDS = 16, 8, 20

SIZES = {
    "gpt2": lambda **more: transformers.GPT2Config(
        **{"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, **more},
        vocab_size=WORDS,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=LENGTH,
    ),
    "llama": lambda **more: transformers.LlamaConfig(
        **{"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, **more},
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=LENGTH,
    ),
    "bert": lambda **more: transformers.BertConfig(
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **more},
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_labels=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=LENGTH,
    ),
}
HEADS = {
    "gpt2": transformers.GPT2LMHeadModel,
    "llama": transformers.LlamaForCausalLM,
    "bert": transformers.BertForSequenceClassification,
}


def model(kind, attention: str = "eager", **more: Any):
    torch.manual_seed(0)
    config = SIZES[kind](**more)
    config._attn_implementation = attention
    return HEADS[kind](config).train()


def texts(seed):
    """Words that a rule continues: the next is the last one plus two."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, WORDS, (N, 1), generator=generator)
    ids = (first + 2 * torch.arange(LENGTH)) % WORDS
    noisy = torch.rand(N, generator=generator) < 0.3
    ids[noisy] = torch.randint(0, WORDS, ids[noisy].shape, generator=generator)
    return ids


def each_loss(kind, net, weights, ids):
    """The loss of every text."""
    if kind == "bert":
        logits = net(weights, input_ids=ids).logits
        return cross_entropy(logits.float(), (ids[:, 0] < WORDS // 2).long(), reduction="none")
    logits = net(weights, input_ids=ids, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def example_gradient(kind, net, dtype=None, around: Any = nullcontext, beta=0.3, steps=20):
    """The meta-gradient of a weight for every text."""
    train, valid = texts(0), texts(1)

    def cast(params):
        return params if dtype is None else {n: p.to(dtype) for n, p in params.items()}

    def inner(p, m, batch):
        losses = each_loss(kind, net, cast(p), batch["ids"])
        return (m["weight"].index_select(0, batch["index"]) * losses).mean()

    rows = [{"ids": row, "index": i} for i, row in enumerate(train)]
    problem = eg.Bilevel(
        inner,
        lambda p, m: each_loss(kind, net, cast(p), valid).mean(),
        inner_batches=DataLoader(rows, batch_size=8, shuffle=True),  # pyright: ignore[reportArgumentType]
        modules=(net.model,),
    )
    solver = eg.TorchOptimizer(
        optimizer=torch.optim.AdamW,
        options={"lr": 3e-3, "weight_decay": 0.01},
        max_steps=steps,
        clip_norm=1.0,
        scheduler=lambda o: transformers.get_linear_schedule_with_warmup(o, 4, 10 * steps),
    )
    rule = eg.Contrastive(
        beta=beta, error=False, nudged_solver=dataclasses.replace(solver, max_steps=8)
    )
    params = {n: p.float() for n, p in net.params().items()}
    torch.manual_seed(3)
    with around():
        found = eg.meta_gradient(
            problem, params, {"weight": torch.ones(N)}, solver=solver, estimator=rule
        )
    return found.grads["weight"]


def lower():
    return torch.autocast("cpu", torch.bfloat16)


def alike(one, other):
    return cosine_similarity(one, other, dim=0).item()


@pytest.fixture(scope="module")
def reference():
    """Float32, eager attention, no dropout, no checkpoints."""
    return {kind: example_gradient(kind, eg.nn.Functional(model(kind))) for kind in SIZES}


@pytest.mark.parametrize("kind", SIZES)
def test_fused_attention(kind, reference):
    found = example_gradient(kind, eg.nn.Functional(model(kind, "sdpa")))
    assert alike(found, reference[kind]) > 0.999


@pytest.mark.parametrize("kind", SIZES)
def test_autocast(kind, reference):
    found = example_gradient(kind, eg.nn.Functional(model(kind, "sdpa")), around=lower)
    assert alike(found, reference[kind]) > 0.99


@pytest.mark.parametrize("kind", SIZES)
def test_sixteen_bits_with_master_weights(kind, reference):
    net = eg.nn.Functional(model(kind, "sdpa").bfloat16())
    found = example_gradient(kind, net, dtype=torch.bfloat16)
    assert found.dtype == torch.float32
    assert alike(found, reference[kind]) > 0.99


@pytest.mark.parametrize("kind", SIZES)
def test_gradient_checkpointing(kind, reference):
    module = model(kind, "sdpa")
    module.gradient_checkpointing_enable()
    found = example_gradient(kind, eg.nn.Functional(module))
    assert alike(found, reference[kind]) > 0.999


@pytest.mark.parametrize("kind", SIZES)
def test_dropout_is_the_same_in_every_phase(kind):
    """Without common masks the difference of two phases would be noise, to be divided by β."""
    dropout: Any = {
        "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1},
        "llama": {"attention_dropout": 0.1},
        "bert": {"hidden_dropout_prob": 0.1},
    }[kind]
    found = example_gradient(kind, eg.nn.Functional(model(kind, **dropout)))
    half = example_gradient(kind, eg.nn.Functional(model(kind, **dropout)), beta=0.15)
    assert (half - found).norm() < 0.3 * found.norm()  # noise would double
    assert alike(found, example_gradient(kind, eg.nn.Functional(model(kind)))) < 0.99
    if kind != "llama":  # fused attention drops other entries
        fused = example_gradient(kind, eg.nn.Functional(model(kind, "sdpa", **dropout)))
        assert alike(fused, found) > 0.999


@pytest.mark.parametrize("kind", SIZES)
def test_adapters(kind):
    peft = pytest.importorskip("peft", reason="the extra `dev` has it")
    task = {"bert": "SEQ_CLS"}.get(kind, "CAUSAL_LM")

    def adapted(attention):
        module = model(kind, attention)
        modules = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
        config = peft.LoraConfig(
            task_type=task, r=2, target_modules=modules[kind], fan_in_fan_out=kind == "gpt2"
        )
        torch.manual_seed(0)
        return eg.nn.Functional(peft.get_peft_model(module, config).train())

    net = adapted("sdpa")
    assert all("lora" in name or "classifier" in name for name in net.params())
    exact = example_gradient(kind, adapted("eager"), steps=40)
    assert alike(example_gradient(kind, net, steps=40), exact) > 0.999
    assert alike(example_gradient(kind, net, steps=40, around=lower), exact) > 0.99


@pytest.mark.parametrize("kind", SIZES)
def test_unrolled_by_contrast_with_fused_attention(kind):
    """Against autograd through the same steps of AdamW, by eager attention."""
    found = []
    ways: tuple[tuple[str, Literal["autograd", "contrast"]], ...]
    ways = (("eager", "autograd"), ("sdpa", "contrast"))
    for attention, products in ways:
        net = eg.nn.Functional(model(kind, attention))
        train, valid = texts(0), texts(1)
        problem = eg.Bilevel(
            lambda p, m, net=net, train=train: (
                m["weight"] * each_loss(kind, net, p, train)
            ).mean(),
            lambda p, m, net=net, valid=valid: each_loss(kind, net, p, valid).mean(),
            modules=(net.model,),
        )
        solver = eg.TorchOptimizer(
            optimizer=torch.optim.AdamW, options={"lr": 3e-3}, max_steps=15, tol=None
        )
        result = eg.meta_gradient(
            problem,
            net.params(),
            {"weight": torch.ones(N)},
            solver=solver,
            estimator=eg.Unrolled(products=products),
        )
        found.append(result.grads["weight"])
    assert alike(*found) > 0.99
