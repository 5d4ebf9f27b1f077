"""ViT, DeiT and DINOv2 of the transformers library: the same outputs at ratio 1, the paper's masked form below it."""

from __future__ import annotations

import copy
import functools
import math
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn

import idlevit_kernels as ik
from idlevit_kernels.block.context import Context

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 64, "num_labels": 7}
VIT = SMALL | {"intermediate_size": 96}
DINOV2 = SMALL | {"patch_size": 16, "mlp_ratio": 2, "drop_path_rate": 0.3, "layerscale_value": 0.5}
STAGES = {"out_indices": [1, 3, 4], "apply_layernorm": True}

# The model class, its configuration, and how many prefix tokens it has.
MODELS = {
    "ViT": ("ViTModel", "ViTConfig", VIT, 1),
    "ViT, classifier, no biases": ("ViTForImageClassification", "ViTConfig", VIT | {"qkv_bias": False}, 1),
    "ViT, masked images": ("ViTForMaskedImageModeling", "ViTConfig", VIT, 1),
    "DeiT": ("DeiTModel", "DeiTConfig", VIT, 2),
    "DeiT, two heads": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", VIT, 2),
    "DINOv2": ("Dinov2Model", "Dinov2Config", DINOV2, 1),
    "DINOv2, SwiGLU": ("Dinov2ForImageClassification", "Dinov2Config", DINOV2 | {"use_swiglu_ffn": True}, 1),
    "DINOv2, backbone": ("Dinov2Backbone", "Dinov2Config", DINOV2 | STAGES, 1),
    "registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", DINOV2, 5),
    "registers, backbone": ("Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig", DINOV2 | STAGES, 5),
}
BACKBONES = [name for name in MODELS if "backbone" in name]
CLASSIFIERS = ["ViT, classifier, no biases", "DeiT, two heads", "DINOv2, SwiGLU", "registers"]


def make(name: str, **options) -> nn.Module:
    model_class, config_class, config, _ = MODELS[name]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config | options)).eval()
    with torch.no_grad():  # fresh weights are so small that every logit is nearly equal
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2 if p.dim() == 1 else 0.05)
    return model


def tensors(output) -> dict[str, Tensor]:
    """All tensors of a model's output, by name."""
    found = {}
    for key, value in output.items():
        for i, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            found[f"{key}[{i}]"] = tensor
    return found


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == SMALL["num_hidden_layers"])


def assert_equal(found: Tensor, wanted: Tensor, limit: float, what: str) -> None:
    error = float((found - wanted).detach().abs().max())
    assert error <= limit * max(1.0, float(wanted.detach().abs().max())), f"{what}: {error:.1e}"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_keep_ratio_1_equals_transformers(name: str, attention: str) -> None:
    model, image = make(name, attn_implementation=attention), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = tensors(model(image, output_hidden_states=True))
        found = tensors(ik.apply_idle(model, keep_ratio=1.0)(image, output_hidden_states=True))
    assert found.keys() == wanted.keys() and "hidden_states[4]" in found
    for key in wanted:
        assert_equal(found[key], wanted[key], 1e-5, key)


def masked_layer(
    layer: nn.Module, keep_ratio: float, prefix: int, scorer: str, x: Tensor, attention_mask: Tensor | None = None, **_
) -> Tensor:
    """A layer as the paper trains it: over all tokens, idle keys at -1e5, both branches times the 0/1 mask.

    Pairs that the attention mask hides have no weight and do not count in the mean of the logits; nor do the queries
    of padding, which nothing sees.
    """
    attn, dinov2 = layer.attention, hasattr(layer, "norm1")
    norms = (layer.norm1, layer.norm2) if dinov2 else (layer.layernorm_before, layer.layernorm_after)
    scales = (layer.layer_scale1, layer.layer_scale2) if dinov2 else (layer.dropout, layer.dropout)
    drop = layer.drop_path if dinov2 else nn.Identity()

    y = norms[0](x)
    q, k, v = (p(y).unflatten(2, (3, -1)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    logits = q @ k.mT  # [B, H, T, T]
    bias = torch.zeros_like(logits)
    if attention_mask is not None:
        is_bool = attention_mask.dtype == torch.bool
        bias = bias.masked_fill(~attention_mask, -math.inf) if is_bool else bias + attention_mask
        bias = bias.masked_fill(bias == torch.finfo(bias.dtype).min, -math.inf)
    ranked, sees = logits + bias / attn.scaling, bias.isfinite()
    sees = sees & sees.any(2).any(1)[:, None, :, None]
    if scorer == "cls":
        ranked, sees = ranked[:, :, :1], sees[:, :, :1]
    scores = ranked.where(sees, 0).sum((1, 2)) / sees.sum((1, 2))
    scores = scores.where(sees.any(2).any(1), -math.inf)
    kept = scores[:, prefix:].topk(int(keep_ratio * (x.shape[1] - prefix))).indices + prefix
    mask = torch.zeros_like(scores).scatter(1, kept, 1.0)
    mask[:, :prefix] = 1.0
    weights = (logits * attn.scaling + bias).masked_fill(mask[:, None, None] == 0, -1e5).softmax(-1)
    x = x + mask[..., None] * drop(scales[0](attn.o_proj((weights @ v).transpose(1, 2).flatten(2))))
    return x + mask[..., None] * drop(scales[1](layer.mlp(norms[1](x))))


def masked_form(model: nn.Module, schedule: list[float], num_prefix_tokens: int, scorer: str = "cls") -> nn.Module:
    """A copy of a dense model that computes in the masked form."""
    model = copy.deepcopy(model)
    for layer, ratio in zip(layers_of(model), schedule, strict=True):
        if ratio < 1:
            layer.forward = functools.partial(masked_layer, layer, ratio, num_prefix_tokens, scorer)
    return model


def gradients(model: nn.Module, output) -> dict[str, Tensor | None]:
    outputs = [tensor for tensor in tensors(output).values() if tensor.requires_grad]
    loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape)).sum() for t in outputs)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return dict(zip((name for name, _ in model.named_parameters()), grads, strict=True))


def assert_same(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None], limit: float) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert (value is None) == (found[key] is None), key
        if value is not None:
            assert_equal(found[key], value, limit, key)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_the_masked_form(name: str, training: bool) -> None:
    dense = make(name).double().train(training)
    image, ratios = torch.randn(3, 3, 64, 64, dtype=torch.float64), ik.idle_schedule(4, 0.7)
    wanted_model = masked_form(dense, ratios, MODELS[name][3])
    torch.manual_seed(1)  # of stochastic depth
    wanted = wanted_model(image, output_hidden_states=True)

    model = ik.apply_idle(dense, keep_ratio=0.7)
    torch.manual_seed(1)
    found = model(image, output_hidden_states=True)
    assert_same(tensors(found), tensors(wanted), 1e-10)
    assert_same(gradients(model, found), gradients(wanted_model, wanted), 1e-10)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_schedules_scorers_and_backends(attention: str) -> None:
    dense = make("registers", attn_implementation=attention).double()
    image, schedule = torch.randn(2, 3, 64, 64, dtype=torch.float64), [0.25, 1.0, 0.5, 0.1]
    wanted = masked_form(dense, schedule, 5, "mean")(image).logits
    model = ik.apply_idle(dense, schedule=schedule, scorer="mean")
    assert [layer.attention.config._attn_implementation for layer in layers_of(model)] == [attention] * 4
    for backend in ("reference", "cpu"):
        with ik.use_backend(backend), torch.no_grad():
            assert_equal(model(image).logits, wanted, 1e-10, backend)
    with pytest.raises(AssertionError):  # this comparison can fail
        assert_equal(model(image).logits, masked_form(make("registers").double(), schedule, 5)(image).logits, 1e-10, "")


def test_float32() -> None:
    dense, image = make("DINOv2"), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        wanted = masked_form(dense, ik.idle_schedule(4, 0.7), 1).double()(image.double()).last_hidden_state
        found = ik.apply_idle(dense, keep_ratio=0.7)(image).last_hidden_state
    assert_equal(found, wanted, 1e-4, "last_hidden_state")


class Adapted(nn.Linear):
    """A projection that is more than a plain Linear, as low-rank adapters are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.flip(-1)


def test_projections_that_are_not_plain() -> None:
    dense = make("ViT").double()
    for layer in layers_of(dense):
        for name in ("q_proj", "k_proj"):
            adapted = Adapted(48, 48, dtype=torch.float64)
            adapted.load_state_dict(getattr(layer.attention, name).state_dict())
            setattr(layer.attention, name, adapted)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    wanted = masked_form(dense, ik.idle_schedule(4, 0.5), 1)(image).last_hidden_state
    assert_equal(ik.apply_idle(dense, keep_ratio=0.5)(image).last_hidden_state, wanted, 1e-10, "last_hidden_state")


# Dense prediction


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_token_keeps_its_place(name: str) -> None:
    """Between two hidden states, the tokens that idled are the same bit for bit; all others were computed."""
    model, prefix = ik.apply_idle(make(name), keep_ratio=0.5), MODELS[name][3]
    states = model(torch.randn(2, 3, 64, 64), output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(2, prefix + 16, 48)] * 5
    for ratio, before, after in zip(ik.idle_schedule(4, 0.5), states, states[1:], strict=False):
        computed = (before != after).any(-1)
        assert computed[:, :prefix].all()
        assert computed[:, prefix:].sum(1).tolist() == [int(ratio * 16)] * 2


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_feature_maps_are_hidden_states_on_the_grid(name: str) -> None:
    model, prefix = ik.apply_idle(make(name), keep_ratio=0.5), MODELS[name][3]
    out = model(torch.randn(2, 3, 64, 96), output_hidden_states=True)
    for features, state in zip(out.feature_maps, (out.hidden_states[i] for i in (1, 3, 4)), strict=True):
        assert features.shape == (2, 48, 4, 6)
        assert torch.equal(features.flatten(2).mT, model.layernorm(state)[:, prefix:])


@torch.no_grad()
def test_a_backbone_within_a_model() -> None:
    backbone = transformers.Dinov2Config(**DINOV2, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=48, patch_size=16, neck_hidden_sizes=[8] * 4
    )
    model, image = transformers.DepthAnythingForDepthEstimation(config).eval(), torch.randn(1, 3, 64, 64)
    wanted = model(image).predicted_depth
    assert torch.equal(ik.apply_idle(model, keep_ratio=1.0)(image).predicted_depth, wanted)
    ik.apply_idle(ik.remove_idle(model), keep_ratio=0.5)
    assert list(ik.idle_blocks(model)) == [f"backbone.encoder.layer.{i}" for i in (1, 2, 3)]
    assert model(image).predicted_depth.shape == wanted.shape


# There and back, files and copies


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_there_and_back(name: str) -> None:
    model, image = make(name), torch.randn(2, 3, 64, 64)
    wanted, keys = tensors(model(image)), list(model.state_dict())
    modules = {key: id(module) for key, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    layer_class = type(layers_of(model)[0])

    assert ik.apply_idle(model, keep_ratio=0.5) is model
    assert list(model.state_dict()) == keys
    assert all(isinstance(layer, (ik.IdleBlock, layer_class)) for layer in layers_of(model))
    assert tensors(model(image)).keys() == wanted.keys()
    with pytest.raises(ValueError, match="dense; call remove_idle first"):
        ik.apply_idle(model)

    assert ik.remove_idle(model) is model
    assert modules == {key: id(m) for key, m in model.named_modules() if not isinstance(m, nn.ModuleList)}
    found = tensors(model(image))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_files(name: str, tmp_path) -> None:
    model, image = ik.apply_idle(make(name), keep_ratio=0.5), torch.randn(2, 3, 64, 64)
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(ik.apply_idle(again.eval(), keep_ratio=0.5)(image).logits, model(image).logits)
    dense = make(name)
    dense.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(dense.state_dict(), strict=True)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in BACKBONES])  # these do not pickle at all
@torch.no_grad()
def test_copies(name: str) -> None:
    model, image = ik.apply_idle(make(name), keep_ratio=0.5), torch.randn(2, 3, 64, 64)
    wanted = tensors(model(image))
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_same(tensors(again(image)), wanted, 0)
        for p in ik.remove_idle(again).parameters():
            p.zero_()
        assert_same(tensors(model(image)), wanted, 0)


# Training


@pytest.mark.parametrize("name", CLASSIFIERS[:1] + CLASSIFIERS[2:])
def test_training_with_labels_learns(name: str) -> None:
    model = ik.apply_idle(make(name), keep_ratio=0.7).train()
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < losses[0]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing(when: str, reentrant: bool) -> None:
    def step(checkpointing: bool) -> tuple[dict[str, Tensor | None], int]:
        torch.manual_seed(0)
        model, image, calls = make("registers").train(), torch.randn(2, 3, 64, 64), []
        if checkpointing and when == "before":
            enable(model, reentrant)
        ik.apply_idle(model, keep_ratio=0.5)
        if checkpointing and when == "after":
            enable(model, reentrant)
        layers_of(model)[2].mlp.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(1)
        found = gradients_of_loss(model, model(image.requires_grad_()).logits.square().sum())
        assert ik.remove_idle(model).is_gradient_checkpointing == checkpointing
        return found, len(calls)

    wanted, once = step(False)
    found, twice = step(True)
    assert (once, twice) == (1, 2)
    assert_same(found, wanted, 1e-6)


def enable(model: nn.Module, reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


def gradients_of_loss(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


# Other inputs


@torch.no_grad()
def test_other_image_sizes() -> None:
    model = ik.apply_idle(make("ViT"), keep_ratio=0.5)
    states = model(torch.randn(1, 3, 96, 128), interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    computed = [(a != b).any(-1)[:, 1:].sum().item() for a, b in zip(states, states[1:], strict=False)]
    assert computed == [48, 24, 12, 6]


@torch.no_grad()
def test_half_types() -> None:
    for name in CLASSIFIERS:
        model, image = ik.apply_idle(make(name), keep_ratio=0.5), torch.randn(2, 3, 64, 64)
        wanted = model(image).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_equal(model(image).logits.float(), wanted, 0.3, name)
        assert model.bfloat16()(image.bfloat16()).logits.isfinite().all()


@torch.no_grad()
def test_an_attention_mask_of_ones_is_none() -> None:
    model, image = ik.apply_idle(make("ViT"), keep_ratio=0.5), torch.randn(2, 3, 64, 64)
    mask = torch.ones(2, 17, dtype=torch.int64)
    assert_same(tensors(model(image, attention_mask=mask)), tensors(model(image)), 0)
    layer, x = next(iter(ik.idle_blocks(model).values())), torch.randn(2, 17, 48)
    seen = []
    layer.attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((len(args), kwargs)), with_kwargs=True
    )
    wanted = layer(x)
    for mask in (torch.ones(2, 1, 17, 17, dtype=torch.bool), torch.zeros(1, 1, 17, 17)):
        assert torch.equal(layer(x, mask), wanted) and torch.equal(layer(x, attention_mask=mask), wanted)
    assert seen == [(1, {})] * 5, "it reaches nobody"


def padded(B: int) -> Tensor:
    """Masks [B, 17] of a class token and 16 image tokens, of which some are padding."""
    mask = torch.ones(B, 17, dtype=torch.int64)
    mask[0, -3:] = mask[-1, 5:9] = 0
    return mask


@pytest.mark.parametrize("scorer", ["cls", "mean"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_attention_mask_is_that_of_the_kept_tokens(attention: str, scorer: str) -> None:
    limit = 1e-10 if attention == "sdpa" else 1e-6  # transformers' eager softmax is float32
    dense = make("ViT", attn_implementation=attention).double()
    image, ratios = torch.randn(3, 3, 64, 64, dtype=torch.float64), ik.idle_schedule(4, 0.6)
    wanted_model, unmasked = masked_form(dense, ratios, 1, scorer), masked_form(dense, ratios, 1, scorer)
    wanted = wanted_model(image, attention_mask=padded(3))
    model = ik.apply_idle(dense, keep_ratio=0.6, scorer=scorer)
    found = model(image, attention_mask=padded(3))
    assert_same(tensors(found), tensors(wanted), limit)
    assert_same(gradients(model, found), gradients(wanted_model, wanted), limit)
    compiled = torch.compile(model, backend="eager", fullgraph=True)(image, attention_mask=padded(3))
    assert_same(tensors(compiled), tensors(wanted), limit)
    with pytest.raises(AssertionError):  # this comparison can fail
        assert_same(tensors(found), tensors(unmasked(image)), limit)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("kind", ["boolean", "bias"])
@pytest.mark.parametrize("adapted", [False, True])
@torch.no_grad()
def test_any_mask_of_pairs(heads: int, kind: str, adapted: bool) -> None:
    """In which each query sees other keys; some keys are seen by none."""
    layer, x = layers_of(make("ViT").double())[0], torch.randn(2, 17, 48, dtype=torch.float64)
    if adapted:
        layer.attention.q_proj = Adapted(48, 48, dtype=torch.float64)
    mask = torch.rand(2, heads, 17, 17) < 0.7
    mask[..., :2], mask[0, ..., 9:12] = True, False
    if kind == "bias":
        mask = torch.randn(2, heads, 17, 17, dtype=torch.float64).masked_fill(~mask, -math.inf)
    for scorer in ("cls", "mean"):
        wanted = masked_layer(layer, 0.5, 1, scorer, x, mask)
        assert_equal(ik.IdleBlock(layer, 0.5, scorer=scorer)(x, mask), wanted, 1e-10, scorer)
        context = Context(mask=mask)
        assert_equal(ik.idle_block(x, layer, 8, scorer=scorer, context=context), wanted, 1e-10, "idle_block")
    whole = ik.IdleBlock(layer, 1.0)(x, attention_mask=mask)
    assert torch.equal(whole, layer(x, mask)) and torch.equal(whole, ik.idle_block(x, layer, 16, context=context))


@torch.no_grad()
def test_padding_changes_nothing_and_comes_last() -> None:
    layer, x = layers_of(make("ViT"))[0], torch.randn(2, 17, 48)
    mask = padded(2).bool()[:, None, None].expand(-1, 1, 17, -1)
    other = x.where(mask[:, 0, 0, :, None], torch.randn_like(x))
    for scorer in ("cls", "mean", lambda x, block: x[..., 0], "random"):
        block = ik.IdleBlock(layer, num_keep=10, scorer=scorer)
        out = []
        for tokens in (x, other):
            torch.manual_seed(0)
            out.append(block(tokens, mask))
        real = mask[:, 0, 0]
        assert torch.equal(out[0][real], out[1][real]), scorer
        assert torch.equal(out[0][~real], x[~real]), scorer


def test_masks_that_fit_nothing() -> None:
    layer, x = layers_of(make("ViT"))[0], torch.randn(2, 17, 48)
    with pytest.raises(ValueError, match="IdleBlock: attention_mask must be None or a mask .B, 1, T, T. of pairs"):
        ik.IdleBlock(layer, 0.5)(x, padded(2))
    for mask, said in (
        (torch.rand(2, 1, 17, 16), r"IdleBlock: context.mask must be \[2 or 1, 3 or 1, 17, 17\], got"),
        (torch.rand(2, 2, 17, 17), r"IdleBlock: context.mask must be \[2 or 1, 3 or 1, 17, 17\], got"),
        (torch.ones(2, 1, 17, 17, dtype=torch.int64), r"context.mask must be a boolean or float tensor \[B or 1, H or"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            ik.IdleBlock(layer, 0.5)(x, mask)
    block = timm.models.vision_transformer.Block(48, 3)
    with pytest.raises(ValueError, match="context must be without a mask, which the block's attention does not take"):
        ik.idle_block(x, block, 8, context=Context(mask=torch.rand(2, 1, 17, 17)))


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention() -> None:
    """Its masks are functions of two positions."""
    dense, flex = make("ViT"), make("ViT", attn_implementation="flex_attention")
    flex.load_state_dict(dense.state_dict())
    image = torch.randn(2, 3, 64, 64)
    for model in (dense, flex):
        ik.apply_idle(model, keep_ratio=0.5)
    for mask in (None, padded(2)):
        wanted, found = (model(image, attention_mask=mask).last_hidden_state for model in (dense, flex))
        assert_equal(found, wanted, 1e-5, "last_hidden_state")


@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_attentions_are_refused(by: str) -> None:
    model, image = ik.apply_idle(make("DINOv2", attn_implementation="eager"), keep_ratio=0.5), torch.randn(1, 3, 64, 64)
    if by == "configuration":
        model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions must be False, or the model dense .remove_idle."):
        model(image, **({"output_attentions": True} if by == "argument" else {}))
    ik.remove_idle(model)
    assert len(model(image, output_attentions=True).attentions) == 4


def test_what_cannot_idle() -> None:
    class Mine(type(layers_of(make("ViT"))[0])):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
            return hidden_states

    model = make("ViT")
    layers_of(model)[2] = Mine(model.config)
    with pytest.raises(TypeError, match="ViTModel cannot idle: its blocks are Mine, whose forward is not that of ViTL"):
        ik.apply_idle(model)
    beit = transformers.BeitModel(transformers.BeitConfig(**VIT))
    with pytest.raises(TypeError, match="must be one of:.*transformers ViT, DeiT or DINOv2.*got transformers.*BeitM"):
        ik.apply_idle(beit)


def test_there_is_no_token_cut_loss() -> None:
    model = ik.apply_idle(make("ViT, classifier, no biases"), keep_ratio=0.5)
    with pytest.raises(TypeError, match="transformers ViT, DeiT or DINOv2 has no training form.*without the token cut"):
        ik.IdleViTForTraining(model)
    block = next(iter(ik.idle_blocks(model).values()))
    with pytest.raises(TypeError, match="return_cut must be 'none' or None here: transformers' attention has none"):
        block(torch.randn(1, 17, 48), return_cut="both")


def test_macs() -> None:
    model = make("registers")
    dense = ik.count_macs(model).total
    assert dense == ik.count_macs(ik.apply_idle(model, keep_ratio=1.0), (3, 64, 64)).total
    assert ik.count_macs(ik.apply_idle(ik.remove_idle(model), keep_ratio=0.7)).total < 0.9 * dense


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_torch_export(strict: bool) -> None:
    """transformers hands its layers a mask there, whose values nobody can look at."""
    model, image = ik.apply_idle(make("ViT"), keep_ratio=0.5), torch.randn(2, 3, 64, 64)
    batch = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=8)}}
    exported = torch.export.export(model, (image,), dynamic_shapes=batch, strict=strict).module()
    for images in (image, torch.randn(5, 3, 64, 64)):
        assert_equal(exported(images).last_hidden_state, model(images).last_hidden_state, 1e-5, "last_hidden_state")


def test_compile() -> None:
    model, image = ik.apply_idle(make("ViT"), keep_ratio=0.5), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(image).last_hidden_state
        found = torch.compile(model, backend="eager", fullgraph=True)(image).last_hidden_state
    assert_equal(found, wanted, 1e-5, "last_hidden_state")
