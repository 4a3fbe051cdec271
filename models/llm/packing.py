"""Where the tokens of a batch go: index arithmetic only.

The tokens of all samples, one sample after the other and without padding, make one packed row, which runs through the
layers. Attention alone looks across positions: for it the tokens are laid out in rows as wide as the longest sample, of
which short samples share one.

Two users with the items a b c and d e; targets are asked after b, after c and after e. The response tokens, here r s,
hang behind the history as a branch for each target:

    user 0    a b c | r s | r s       branch 0 follows b, branch 1 follows c
    user 1    d e | r s               branch 0 follows e

    packed    a b c r s r s d e r s   11 tokens, behind those of the prompt prefix
    rows      a b c r s r s           width 7
              d e r s . . .           a row of its own: 7 + 4 > 7

With R = 0 there are no branches: the answer to what follows an item is read at the item itself (--read_out item), and
one pass over a history answers for every position in it.

Beside the prefix, which all see, an item sees its user's items up to itself; a token of a branch sees the items up to
the one that the branch follows, and its branch up to itself. So branch 0 of user 0 sees a b and itself, at the
positions right after b: what a copy of the history cut after b computes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Packed:
    """A batch as one row of tokens, behind the prefix; N targets, in the order of the target mask.

    source (tokens,): the vector of each token: items in the order of the histories, then the R response tokens.
    position (tokens,): its position id. last (N,): the token whose state answers: the last of each branch, or without
    branches the item that the target follows.
    slot (tokens,): its place in the flat (rows, width). mask (rows, 1, width, P + width): additive, keys are the
    prefix, then the row.
    """

    source: torch.Tensor
    position: torch.Tensor
    last: torch.Tensor
    slot: torch.Tensor
    mask: torch.Tensor


def pack(
    histories: torch.Tensor,
    target_mask: torch.Tensor,
    P: int,
    R: int,
    max_length: int,
    dtype: torch.dtype,
    *,
    keep_padding: bool = False,
    share_rows: bool = True,
) -> Packed:
    """Lay out histories (B, T), left-padded, with a branch of R response tokens after each target of the mask (B, T).

    With R = 0 there are no branches. P: tokens of the prefix. Items get the positions that they have in the released
    layout, where every sample is left-padded to `max_length` items. keep_padding: padding goes along, seen by nobody,
    as without packing.
    """
    (B, T), device = histories.shape, histories.device
    row, column = target_mask.nonzero(as_tuple=True)  # (N,)
    branch = (target_mask.cumsum(1) - 1)[row, column]  # which of its history's, (N,)
    n = int(branch.max()) + 1 if R else 0
    follows = torch.full((B, n), -1, device=device)  # the item that a branch follows, -1 where there is no branch
    if R:
        follows[row, branch] = column

    # the batch as a grid (B, L): T items, left-padded, then n branches of R tokens
    L, real = T + n * R, histories != 0
    of_items = real.flatten().cumsum(0).view(B, T) - 1
    of_branches = (int(real.sum()) + torch.arange(R, device=device)).repeat(n).expand(B, -1)
    source = torch.cat([of_items, of_branches], dim=1)
    first = P + max_length - T
    of_items = torch.arange(first, first + T, device=device).expand(B, -1)
    of_branches = first + 1 + follows[:, :, None] + torch.arange(R, device=device)  # (B, n, R)
    position = torch.cat([of_items, of_branches.flatten(1)], dim=1)
    is_token = torch.cat([real, (follows >= 0).repeat_interleave(R, dim=1)], dim=1)
    cells = (torch.ones_like(is_token) if keep_padding else is_token).flatten().nonzero()[:, 0]  # (tokens,)
    last = torch.searchsorted(cells, row * L + (T + branch * R + R - 1 if R else column))
    slot, mask = lay_out(cells, is_token, follows, T, R, P, dtype, share_rows)
    return Packed(source.flatten()[cells], position.flatten()[cells], last, slot, mask)


def lay_out(
    cells: torch.Tensor,
    is_token: torch.Tensor,
    follows: torch.Tensor,
    T: int,
    R: int,
    P: int,
    dtype: torch.dtype,
    share_rows: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot and mask of `Packed`: cells (tokens,) of the grid (B, L) go along, is_token (B, L) are no padding."""
    (B, L), device = is_token.shape, is_token.device
    sample, column = cells // L, cells % L
    lengths = torch.bincount(sample, minlength=B)
    counts = lengths.tolist()
    width = max(counts)
    starts, rows = fit_into_rows(counts) if share_rows else ([row * width for row in range(B)], B)
    before = lengths.cumsum(0) - lengths  # tokens of earlier samples
    slot = torch.arange(len(cells), device=device) + (torch.tensor(starts, device=device) - before)[sample]

    branch = ((column - T) // max(R, 1)).clamp_min(-1)  # -1: an item
    until = torch.cat([torch.arange(T, device=device).expand(B, -1), follows.repeat_interleave(R, dim=1)], dim=1)
    owner = torch.where(is_token.flatten()[cells], sample, -1)  # padding belongs to nobody
    tokens = torch.stack([owner, branch, until.flatten()[cells]])  # (3, tokens)
    laid = tokens.new_full((3, rows * width), -1).index_copy(1, slot, tokens).view(3, rows, width)
    (owner, branch, until), (key_owner, key_branch, key_until) = laid[..., None], laid[:, :, None]
    earlier = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    an_item, own_branch = (key_branch < 0) & (key_until <= until), (key_branch == branch) & earlier
    visible = F.pad((key_owner == owner) & (an_item | own_branch), (P, 0), value=True)  # (rows, width, P + width)
    return slot, torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def fit_into_rows(lengths: list[int]) -> tuple[list[int], int]:
    """Rows as wide as the longest sample, each with as many samples as fit (best fit, the longest first).

    Returns where each sample starts in the flat (rows, width), and the number of rows.
    """
    width, rows = max(lengths), 0
    starts = [0] * len(lengths)
    with_room: list[list[int]] = [[] for _ in range(width + 1)]  # rows, by the places that they have left
    for sample in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[sample]
        room = next((room for room in range(length, width) if with_room[room]), width)
        if room == width:
            with_room[room].append(rows)
            rows += 1
        row = with_room[room].pop()
        starts[sample] = (row + 1) * width - room
        with_room[room - length].append(row)
    return starts, rows
