"""How codes become condition channels of the flow, and how a row goes without them."""

from __future__ import annotations

import pytest
import torch
from lada_rt.errors import ParamError
from lada_rt_export.models import flow, vq
from lada_rt_export.models.stages_mucodec import FlowStage
from torch import nn


def test_folded_condition_equals_the_unfolded_one() -> None:
    torch.manual_seed(3)
    config = vq.VQConfig(dim=96, codebook_size=40, codebook_dim=8, condition_dim=512)
    quantiser, linear = vq.VQ(config), vq.condition_linear(config)
    weight, bias = vq.fold_condition(quantiser, linear)
    codes = torch.arange(40).reshape(1, -1)
    unfolded = linear(quantiser.decode(codes).transpose(1, 2))
    torch.testing.assert_close(quantiser.codebook(codes) @ weight + bias, unfolded, rtol=1e-5, atol=1e-6)
    with pytest.raises(ParamError, match="must take 96 features, it takes 95"):
        vq.fold_condition(quantiser, nn.Linear(95, 512))


def test_condition_grid_follows_the_index_formula() -> None:
    vectors = torch.arange(2 * 6 * 512, dtype=torch.float32).reshape(2, 6, 512)
    grid = vq.condition_grid(vectors)
    assert grid.shape == (2, 32, 3, 32)
    c, k, f = torch.meshgrid(torch.arange(32), torch.arange(3), torch.arange(32), indexing="ij")
    assert torch.equal(grid, vectors[:, 2 * k + c // 16, (c % 16) * 32 + f])


def test_unconditional_rows_ignore_the_codes() -> None:
    torch.manual_seed(4)
    config = vq.VQConfig(dim=16, codebook_size=10, codebook_dim=4)
    dit = flow.Flow(flow.FlowConfig(n_layers=1, n_heads=2, head_dim=4, latent_frames=4))
    stage = FlowStage(dit, vq.VQ(config), vq.condition_linear(config))
    x, context = torch.randn(2, 2, 32, 4, 32)
    codes, t = torch.randint(10, (2, 8)), torch.tensor([0.2, 0.7])
    flags = torch.tensor([0.0, 1.0])
    first, second = stage(x, context, codes, flags, t), stage(x, context, (codes + 1) % 10, flags, t)
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1])
    assert not torch.allclose(first[0], stage(x, context, codes, flags.flip(0), t)[0])
