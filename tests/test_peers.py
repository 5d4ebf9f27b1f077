"""The methods in bench/peers/ do what their papers define; `idlevit bench --peers` puts them beside IdleViT."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import idlevit_kernels as ik
from idlevit_kernels.cli import app, bench

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import peers  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--model", "deit_tiny_patch16_224", "--image-size", "64", "--seconds", "0.1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def deit() -> nn.Module:
    """Twelve layers, 64 image tokens; weights large enough that no two tokens score alike."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=128, num_classes=10).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.2 if p.dim() == 1 else 0.05)
    return model


def images(batch: int = 2, size: int = 128) -> Tensor:
    return torch.randn(batch, 3, size, size)


def tokens_of_each_mlp(peer: nn.Module) -> list[int]:
    counts: list[int] = []
    handles = [
        block.norm2.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
        for block in peer.model.blocks
    ]
    peer(images())
    for handle in handles:
        handle.remove()
    return counts


def attention_map(block: nn.Module, x: Tensor) -> Tensor:
    """[B, H, T, T]"""
    B, T, _ = x.shape
    q, k, _ = block.attn.qkv(block.norm1(x)).reshape(B, T, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(2, 3) * block.attn.scale).softmax(-1)


@pytest.mark.parametrize("name", ["EViT", "EvoViT", "DynamicViT", "ReleasedIdleViT", "ToMe"])
def test_a_peer_that_drops_nothing_is_the_dense_model(deit: nn.Module, name: str) -> None:
    image = images()
    peer = getattr(peers, name)(deit, 0.0 if name == "ToMe" else 1.0).eval()
    if name == "DynamicViT":  # it puts the tokens in order of their scores, which attention does not see
        assert tokens_of_each_mlp(peer) == [65] * 12
    torch.testing.assert_close(peer(image), deit(image), rtol=1e-4, atol=1e-4)
    assert all(peer.model.get_parameter(name) is p for name, p in deit.named_parameters())


def test_evit_keeps_its_share_and_one_fused_token(deit: nn.Module) -> None:
    """ceil(0.7 * 64) = 45, then a fused token counts as any other: ceil(0.7 * 46) = 33, ceil(0.7 * 34) = 24."""
    counts = tokens_of_each_mlp(peers.EViT(deit, 0.7))
    assert counts == [65] * 3 + [1 + 45 + 1] * 3 + [1 + 33 + 1] * 3 + [1 + 24 + 1] * 3


def test_evit_fuses_by_the_class_tokens_attention(deit: nn.Module) -> None:
    block, x = deit.blocks[3], torch.randn(2, 65, 192)
    found = peers.EViT(deit, 0.7).attend_and_fuse(block, x)
    after = x + block.attn(block.norm1(x))
    weight = attention_map(block, x)[:, :, 0, 1:].mean(1)  # [B, 64]
    for b in range(2):
        order = weight[b].argsort(descending=True).tolist()
        kept, dropped = order[:45], order[45:]
        fused = sum(weight[b, j] * after[b, 1 + j] for j in dropped)
        torch.testing.assert_close(found[b, 0], after[b, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[b, -1], fused, rtol=1e-4, atol=1e-4)
        wanted = after[b, [1 + j for j in sorted(kept)]]
        nearest = torch.cdist(found[b, 1:-1], wanted).argmin(0)  # in whatever order they stand
        assert nearest.unique().numel() == 45
        torch.testing.assert_close(found[b, 1:-1][nearest], wanted, rtol=1e-4, atol=1e-4)


def naive_merge(x: Tensor, size: Tensor, metric: Tensor, r: int) -> dict[frozenset[int], tuple[Tensor, float]]:
    """One image, token by token: the mean and size of each group of tokens that are one afterwards."""
    T = len(x)
    metric = metric / metric.norm(dim=1, keepdim=True)
    edges = []
    for a in range(2, T, 2):  # the class token, 0, draws none
        similar = [(float(metric[a] @ metric[b]), b) for b in range(1, T, 2)]
        edges.append((*max(similar), a))
    groups: dict[int, list[int]] = {i: [i] for i in range(T)}
    for _, b, a in sorted(edges, reverse=True)[:r]:
        groups[b] += groups.pop(a)
    merged = {}
    for members in groups.values():
        total = sum(float(size[i]) for i in members)
        merged[frozenset(members)] = (sum(float(size[i]) * x[i] for i in members) / total, total)
    return merged


@pytest.mark.parametrize(("tokens", "r"), [(17, 5), (16, 7), (9, 1), (65, 20)])
def test_tome_merges_as_a_naive_loop_does(tokens: int, r: int) -> None:
    x, metric = torch.randn(2, tokens, 8, dtype=torch.float64), torch.randn(2, tokens, 4, dtype=torch.float64)
    size = torch.randint(1, 5, (2, tokens, 1)).double()
    found, sizes = peers.tome.merge(x, size, metric, r)
    assert found.shape == (2, tokens - r, 8) and sizes.shape == (2, tokens - r, 1)
    torch.testing.assert_close(found[:, 0], x[:, 0])  # the class token is first and alone
    torch.testing.assert_close(sizes.sum(1), size.sum(1))
    for b in range(2):
        wanted = naive_merge(x[b], size[b], metric[b], r)
        assert len(wanted) == tokens - r
        values = torch.stack([torch.cat([mean, mean.new_tensor([total])]) for mean, total in wanted.values()])
        rows = torch.cat([found[b], sizes[b]], dim=1)
        assert torch.cdist(values, rows, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max() < 1e-9


def test_tome_merges_r_tokens_in_each_layer(deit: nn.Module) -> None:
    assert tokens_of_each_mlp(peers.ToMe(deit, 3)) == [65 - 3 * i for i in range(1, 13)]
    uneven = peers.ToMe(deit, 2.5)
    assert uneven.merges == [3] * 6 + [2] * 6 and uneven.r == 2.5
    halving = tokens_of_each_mlp(peers.ToMe(deit, 100))  # no layer can merge more than half
    assert halving == [33, 17, 9, 5, 3, *[2] * 7]


def test_tome_counts_a_token_as_often_as_it_stands_for_a_patch(deit: nn.Module) -> None:
    """Equation 1: attention with log(size) added is attention to each token repeated size times."""
    block, x = deit.blocks[0], torch.randn(1, 6, 192)
    size = torch.tensor([1, 3, 1, 2, 1, 4])
    q, k, v = peers.vit.queries_keys_values(block.attn, block.norm1(x))
    found = peers.vit.attend(block, q, k, v, size.log()[None, None, None])
    repeated = x.repeat_interleave(size, dim=1)
    wanted = block.attn(block.norm1(repeated))[:, size.cumsum(0) - size]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_evovit_computes_a_representative_token_beside_the_slow_ones(deit: nn.Module) -> None:
    assert tokens_of_each_mlp(peers.EvoViT(deit, 0.5)) == [65] * 4 + [1 + 32 + 1] * 8


def test_evovit_updates_slow_and_fast(deit: nn.Module) -> None:
    """Section 3.3, token by token: two layers of a stage."""
    stage, x = deit.blocks[4:6], torch.randn(2, 65, 192)
    importance = torch.rand(2, 64)
    found, found_importance = peers.evovit.slow_fast(stage, x, importance, 20)
    for b in range(2):
        order = importance[b].argsort(descending=True).tolist()
        kept, others = sorted(order[:20]), order[20:]
        total = sum(importance[b, j] for j in others)
        representative = sum(importance[b, j] / total * x[b, 1 + j] for j in others)
        y = torch.stack([x[b, 0], *(x[b, 1 + j] for j in kept), representative])[None]
        seen = importance[b].clone()
        gained = torch.zeros(192)
        for block in stage:
            attended = attention_map(block, y)[0, :, 0].mean(0)
            for place, j in enumerate(kept):
                seen[j] = 0.5 * seen[j] + 0.5 * attended[1 + place]
            for branch in (
                lambda y, block=block: block.attn(block.norm1(y)),
                lambda y, block=block: block.mlp(block.norm2(y)),
            ):
                residual = branch(y)
                y, gained = y + residual, gained + residual[0, -1]
        wanted = x[b] + gained
        wanted[[0, *(1 + j for j in kept)]] = y[0, :-1]
        torch.testing.assert_close(found[b], wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found_importance[b], seen, rtol=1e-4, atol=1e-5)


def test_evovit_chooses_by_the_attention_of_the_layers_before(deit: nn.Module) -> None:
    image, peer = images(), peers.EvoViT(deit, 0.5)
    x = peer.embed(image)
    for block in deit.blocks[:3]:
        x = block(x)
    importance = attention_map(deit.blocks[3], x)[:, :, 0, 1:].mean(1)
    x = deit.blocks[3](x)
    for stage in (deit.blocks[4:8], deit.blocks[8:]):
        x, importance = peers.evovit.slow_fast(stage, x, importance, 32)
    torch.testing.assert_close(peer(image), peer.classify(x), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="EvoViT: model must have at least 3 layers, got 2"):
        peers.EvoViT(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32), 0.5)


def test_dynamicvit_keeps_the_best_of_each_predictor(deit: nn.Module) -> None:
    peer = peers.DynamicViT(deit, 0.7).eval()
    kept = [int(64 * 0.7**stage) for stage in (1, 2, 3)]
    assert tokens_of_each_mlp(peer) == [65] * 3 + [1 + n for n in kept for _ in range(3)]

    seen: list[Tensor] = []
    handles = [deit.blocks[i].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for i in (3, 6)]
    before = deit.blocks[2].norm2.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    peer(images())
    for handle in (*handles, before):
        handle.remove()
    x = seen[0] + deit.blocks[2].mlp(deit.blocks[2].norm2(seen[0]))
    best = peer.predictors[0](x[:, 1:]).topk(kept[0]).indices
    torch.testing.assert_close(seen[1][:, 1:], peers.vit.gather(x[:, 1:], best), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[1][:, 0], x[:, 0], rtol=1e-4, atol=1e-4)


def test_dynamicvit_predicts_from_local_and_global_features(deit: nn.Module) -> None:
    """Section 3.2, token by token."""
    predictor, x = peers.DynamicViT(deit, 0.7).predictors[0], torch.randn(2, 9, 192)
    z = nn.functional.gelu(predictor.embed(predictor.norm(x)))
    for b in range(2):
        everywhere = sum(z[b, j, 96:] for j in range(9)) / 9
        for j in range(9):
            h = torch.cat([z[b, j, :96], everywhere])
            for layer in predictor.hidden:
                h = nn.functional.gelu(layer(h))
            keep, drop = predictor.decide(h).exp()
            found = predictor(x)[b, j].exp()
            torch.testing.assert_close(found, keep / (keep + drop), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep_ratio", [0.7, 0.5])
def test_the_released_order_gives_the_logits_of_idlevit(deit: nn.Module, keep_ratio: float) -> None:
    image = images()
    idle = ik.apply_idle(copy.deepcopy(deit), keep_ratio)
    torch.testing.assert_close(peers.ReleasedIdleViT(deit, keep_ratio)(image), idle(image), rtol=1e-4, atol=1e-4)


def test_multiply_accumulates_of_the_papers() -> None:
    """DeiT-S at 0.7 and 0.5: EViT's table 1 (3.0 and 2.3 G), DynamicViT's table 1 (2.9 G), the released IdleViT."""
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224").eval()

    def giga(name: str, setting: float) -> float:
        return ik.count_macs(getattr(peers, name)(model, setting)).total / 1e9

    assert [round(giga("EViT", r), 1) for r in (0.7, 0.5)] == [3.0, 2.3]
    assert giga("DynamicViT", 0.7) == pytest.approx(2.9, rel=0.03)
    assert [round(giga("ReleasedIdleViT", r), 3) for r in (0.9, 0.7, 0.5)] == [3.965, 3.007, 2.333]
    assert giga("ToMe", 13) == pytest.approx(2.7, rel=0.02)  # ToMe's table 4


def test_peers_are_set_to_equal_macs() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=4, img_size=128).eval()
    macs = ik.count_macs(ik.apply_idle(copy.deepcopy(model), 0.5)).total
    found = peers.peers_of(model, 0.5, macs)
    for name, (peer, setting) in found.items():
        assert setting
        if name.endswith("equal MACs"):
            assert ik.count_macs(peer).total == pytest.approx(macs, rel=0.02)  # a token more or less
        peer.eval()(images())


@pytest.mark.full
@pytest.mark.parametrize("name", ["EViT", "EvoViT", "DynamicViT", "ReleasedIdleViT", "ToMe"])
def test_peers_compile(deit: nn.Module, name: str) -> None:
    image, peer = images(), getattr(peers, name)(deit, 3 if name == "ToMe" else 0.5).eval()
    compiled = torch.compile(peer, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(image), peer(image), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}], ids=["no class token", "registers"]
)
def test_peers_need_a_class_token_alone(options: dict) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=32, **options)
    with pytest.raises(TypeError, match="EViT: model must be .* class token"):
        peers.EViT(model, 0.5)


def test_bench_puts_the_peers_beside_idlevit(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = CliRunner(env={"COLUMNS": "100"}).invoke(
        app, ["bench", *SMALL, "--batch", "1", "--keep-ratio", "0.5", "--peers", "--json", str(path)]
    )
    assert result.exit_code == 0, result.output
    rows = {row["method"]: row for row in json.loads(path.read_text())["models"]}
    names = ["released order", "EViT"]
    names += [f"{method}, equal MACs" for method in ("EViT", "ToMe", "DynamicViT", "Evo-ViT")]
    assert list(rows) == ["dense", "IdleViT", *names]
    for name in names:
        assert name in result.stdout
        assert rows[name]["keep_ratio"] == 0.5 and rows[name]["setting"] in " ".join(result.stdout.split())
        assert math.isclose(rows[name]["speedup"], rows[name]["images_per_second"] / rows["dense"]["images_per_second"])
    assert not rows["IdleViT"]["setting"] and not rows["dense"]["setting"]


def test_bench_says_where_peers_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "idlevit_kernels" / "cli" / "bench.py"))
    result = CliRunner().invoke(app, ["bench", *SMALL, "--peers"])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("idlevit: bench: --peers needs") and "checkout" in line


@pytest.mark.full
def test_bench_compiles_dense_and_idlevit_beside_peers_and_a_schedule(tmp_path: Path) -> None:
    schedule, path = tmp_path / "schedule.json", tmp_path / "bench.json"
    schedule.write_text(json.dumps({"schedule": [1.0] * 4 + [0.4] * 8}))
    options = ["--batch", "1", "--keep-ratio", "0.5", "--schedule", str(schedule), "--peers", "--compile"]
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["bench", *SMALL, *options, "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "\N{HORIZONTAL ELLIPSIS}" not in result.stdout
    rows = json.loads(path.read_text())["models"]
    compiled = {(row["method"], row["keep_ratio"]) for row in rows if row["compiled"]}
    assert compiled == {("dense", None), ("IdleViT", 0.5), ("IdleViT", None)}
    assert len(rows) == 3 + 6 + 3 and all(row["speedup_compiled"] > 0 for row in rows)
