"""The loss of Medusa heads, against autograd on a formula written out."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from orthrus.models.medusa_config import MedusaConfig
from orthrus.training import medusa
from orthrus.training.distributed import Processes
from orthrus.training.medusa import MedusaLoss, MedusaSettings, initial_heads
from orthrus.training.model import load_ar_view
from tests.checkpoints import make_checkpoint


@pytest.mark.parametrize("own", [True, False], ids=["own projections", "shared"])
def test_the_loss_and_its_gradient_are_those_of_autograd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    monkeypatch.setattr(medusa, "_SLICE_LOGITS", 5 * 96)  # Slices of 5 rows.
    model = load_ar_view(make_checkpoint(tmp_path / "model", vocab_size=96), torch.device("cpu"))
    settings = MedusaSettings(steps=1, num_heads=2, own_projections=own, decay=0.5)
    heads = initial_heads(model, MedusaConfig.of(model.config, 2, own))
    torch.manual_seed(0)
    for head in heads.values():
        head.data += 0.1 * torch.randn_like(head)
    rows = torch.randint(0, 90, (3, 9))
    loss = MedusaLoss(model, heads, settings)
    found = loss(rows)
    gradients = torch.autograd.grad(found, list(heads.values()))

    hidden = model(rows)[0]
    parts, agreed = [], []
    for k in (0, 1):
        # Positions 0 to 6. The first head drafts what the AR view picks one position on, the second two.
        state, target = hidden[:, :7], model.logits(hidden[:, 1 + k : 8 + k])
        state = state + F.silu(state @ heads[f"medusa.{k}.linear.weight"].T)
        logits = F.linear(state, heads[f"medusa.{k}.projection.weight"] if own else model.head_weight)
        kl = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True)
        parts.append(kl.sum(-1).mean())
        agreed.append(logits.argmax(-1) == target.argmax(-1))
    expected = 0.5 * parts[0] + 0.25 * parts[1]
    torch.testing.assert_close(found, expected)
    for gradient, right in zip(gradients, torch.autograd.grad(expected, list(heads.values())), strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-3, atol=1e-6)
    report = loss.report(Processes())
    assert report["kl"] == pytest.approx(torch.stack(parts).detach().mean().item(), rel=1e-5)
    assert report["agreement"] == [round(float(part.float().mean()), 3) for part in agreed]
    chain = agreed[0].double().mean() + (agreed[0] & agreed[1]).double().mean()
    assert report["tokens_per_cycle"] == pytest.approx(1 + float(chain))
