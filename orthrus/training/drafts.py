"""The loss of the diffusion view: at blocks with random anchors, its KL from the AR view's distribution."""

from typing import Any

import torch
from torch import Tensor

from orthrus.training.blocks import DraftBlocks, draft_blocks, random_anchors
from orthrus.training.distill import forward_kl
from orthrus.training.distributed import Processes
from orthrus.training.loop import autocast
from orthrus.training.model import TwoViewModel
from orthrus.training.settings import Settings

_MIN_KL = 0.01
"""In nats. Added to the KL before a power of it is taken, to bound the slope of the power near 0."""


class DraftSettings(Settings):
    """Blocks and loss of a step. The loss of a draft is KL ** kl_power * miss_decay ** (wrong drafts before it in its block).

    With the defaults of the last three settings, the loss is the paper's.
    """

    block_size: int = 32
    # Blocks in each row of tokens.
    anchors: int = 64
    # Share of the blocks that are cut to a random length.
    short_blocks: float = 0.0
    # Below 1, drafts after a wrong one count less, since serving discards them.
    miss_decay: float = 1.0
    # A sampled draft is refused with a chance of at most sqrt(KL / 2) (Pinsker's inequality). A power of 0.5 therefore spends
    # less on drafts that can't be predicted, and more on those that are nearly right.
    kl_power: float = 1.0
    # Weight of a block's first draft, both in the loss and as a wrong draft. Use 0 if the schedule
    # knows the first token of every block before it drafts the block (see `orthrus.schedules.orthrus`).
    first_weight: float = 1.0


class DraftLoss:
    """Blocks, loss and metrics of a run's steps."""

    def __init__(
        self,
        model: TwoViewModel,
        settings: DraftSettings,
        *,
        rows: int,
        length: int,
        seed: int,
        compiled: bool,
    ) -> None:
        """rows: number of rows in a step, each of `length` tokens. compiled: whether torch.compile compiles the loss."""
        assert model.config.mask_token_id is not None
        self._model, self._settings, self._mask = model, settings, model.config.mask_token_id
        self._rows, self._length, self._seed, self._compiled = rows, length, seed, compiled
        size = settings.block_size
        device = model.head_weight.device
        self._share = torch.ones(size, device=device)
        self._share[0] = settings.first_weight
        self._sums = torch.zeros(2 * size + 4, dtype=torch.float64, device=device)
        self._kl, self._agreed, self._counted, self._blocks = self._sums.split([1, size, size, 3])

    def blocks(self, step: int, rows: range, batch: Tensor) -> DraftBlocks:
        """Blocks of the rows `rows` of a step, a function of seed and step. batch int64 [rows, length]: the rows' tokens."""
        settings = self._settings
        generator = torch.Generator().manual_seed((self._seed << 40) + step)
        anchors = random_anchors(self._rows, settings.anchors, self._length, settings.block_size, generator)
        lengths = torch.randint(2, settings.block_size + 1, anchors.shape, generator=generator)
        whole = torch.rand(anchors.shape, generator=generator) >= settings.short_blocks
        lengths = torch.where(whole, settings.block_size, lengths)
        self._live = int(lengths.sum())
        anchors, lengths = (t[rows.start : rows.stop].to(batch.device) for t in (anchors, lengths))
        return draft_blocks(batch, anchors, lengths, settings.block_size, self._mask)

    def __call__(self, hidden: Tensor, drafted: Tensor, blocks: DraftBlocks) -> Tensor:
        """These rows' part of the step's loss, which is the weighted mean over its drafts. Differentiable by `drafted` only.

        hidden [rows, length, hidden_size]: the AR view's final states. drafted [rows, block rows, hidden_size]: the final
        states of `blocks`, which must be the newest result of the method `blocks`.
        """
        settings, size, rows = self._settings, self._settings.block_size, len(hidden)
        index = blocks.positions + torch.arange(rows, device=hidden.device)[:, None] * self._length
        live = blocks.live.flatten(0, 1)

        def weigh(kl: Tensor, agree: Tensor) -> Tensor:
            wrong = ~agree.view(-1, size) * self._share
            weight = settings.miss_decay ** (wrong.cumsum(1) - wrong) * self._share * live / self._live
            # d(kl ** power) = power * kl ** (power - 1) * d(kl)
            return weight.flatten() * settings.kl_power * (kl + _MIN_KL) ** (settings.kl_power - 1)

        with torch.no_grad(), autocast(hidden.device):
            targets = self._model.logits(hidden.flatten(0, 1))
            head = self._model.head_weight.to(targets.dtype)
        loss, kl, agree = forward_kl(
            drafted.flatten(0, 1), targets, index.flatten(), head, weigh, compiled=self._compiled
        )
        self._add(kl.view(-1, size), agree.view(-1, size), live)
        return loss

    def _add(self, kl: Tensor, agree: Tensor, live: Tensor) -> None:
        agree = agree & live
        # Without a lead, the last row's draft is not verified. With one, the lead replaces the first row's draft.
        leading, behind_lead = (part.long().cumprod(1).sum(1) for part in (agree[:, :-1], agree[:, 1:]))
        whole = live.all(1)
        self._kl += (kl * live).sum()
        self._agreed += agree.sum(0)
        self._counted += live.sum(0)
        self._blocks += torch.stack([(leading * whole).sum(), (behind_lead * whole).sum(), whole.sum()])

    def report(self, processes: Processes) -> dict[str, Any]:
        """Metrics since the last call: KL in nats, top-1 agreement by depth, and tokens per cycle without and with a lead.

        Tokens per cycle are those that the drafts would give on the model's own greedy text.
        """
        processes.add([self._sums])
        agreement = self._agreed / self._counted.clamp(min=1)
        leading, behind_lead, blocks = self._blocks.tolist()
        values = {
            "kl": self._kl.item() / max(1.0, self._counted.sum().item()),
            "tokens_per_cycle": 1 + leading / max(1, blocks),
            "tokens_per_cycle_with_lead": 2 + behind_lead / max(1, blocks),
            "agreement": [round(v, 3) for v in agreement.tolist()],
        }
        self._sums.zero_()
        return values
