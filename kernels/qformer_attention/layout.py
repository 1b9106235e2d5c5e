"""Which rows of a token buffer attend to which: index tensors instead of masks.

A token buffer holds the queries of N blocks (a block is the Q queries of one image, or of one
image-text pair), then texts end to end without padding::

    row      0 .. Q-1   Q .. 2Q-1  ...  (N-1)Q .. NQ-1 | NQ ..
             block 0    block 1         block N-1      | text 0   text 1   ...

Both classes are built once per pass and serve all its layers. Their tensors live on the device;
building them needs no host sync.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class MaskKind(enum.Enum):
    """Which tokens see which in the Q-Former's self-attention (arXiv 2301.12597, Figure 2).

    Rows are queries, columns are keys; `#` is visible, `.` is not::

        UNIMODAL (ITC)        BIDIRECTIONAL (ITM)   MULTIMODAL_CAUSAL (ITG)
              Q Q t t t             Q Q t t t             Q Q t t t
            Q # # . . .           Q # # # # #           Q # # . . .
            Q # # . . .           Q # # # # #           Q # # . . .
            t . . # # #           t # # # # #           t # # # . .
            t . . # # #           t # # # # #           t # # # # .
            t . . # # #           t # # # # #           t # # # # #

    Padding columns are never visible.
    """

    UNIMODAL = "unimodal"
    BIDIRECTIONAL = "bidirectional"
    MULTIMODAL_CAUSAL = "multimodal_causal"


KIND_CODES = {MaskKind.UNIMODAL: 0, MaskKind.BIDIRECTIONAL: 1, MaskKind.MULTIMODAL_CAUSAL: 2}


@dataclass(frozen=True)
class AttentionLayout:
    """The self-attention of one pass: n texts of three kinds and the query blocks they go with.

    Attributes:
        num_blocks: N, number of query blocks; 0 for text alone.
        num_queries: Q, rows of a block.
        num_text_rows: T_total, rows of all texts.
        max_seqlen: Upper bound of the text lengths.
        has_bidirectional: Whether any text may be BIDIRECTIONAL.
        has_causal: Whether any text may be MULTIMODAL_CAUSAL.
        cu_seqlens: `[n+1]` int32, where each text starts, counted from the first text row.
        kinds: `[n]` int32, `KIND_CODES` of each text.
        blocks: `[n]` int32, the block whose queries a text sees; ignored where UNIMODAL.
        block_text: `[N]` int32, the BIDIRECTIONAL text that a block's queries see, or -1.
        order: `[n]` int32, texts sorted by the block that they see, UNIMODAL ones last.
        offsets: `[N+1]` int32, where the texts of each block start in `order`.
    """

    num_blocks: int
    num_queries: int
    num_text_rows: int
    max_seqlen: int
    has_bidirectional: bool
    has_causal: bool
    cu_seqlens: Tensor
    kinds: Tensor
    blocks: Tensor
    block_text: Tensor
    order: Tensor
    offsets: Tensor

    @property
    def num_rows(self) -> int:
        """R, rows of the token buffer."""
        return self.num_blocks * self.num_queries + self.num_text_rows

    @property
    def num_texts(self) -> int:
        """n, number of texts."""
        return self.kinds.shape[0]

    @classmethod
    def build(
        cls,
        num_blocks: int,
        num_queries: int,
        lengths: Sequence[int] | Tensor = (),
        kinds: Sequence[MaskKind] | MaskKind = (),
        blocks: Sequence[int] | Tensor | None = None,
        *,
        num_text_rows: int | None = None,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
    ) -> AttentionLayout:
        """Build the layout of a pass.

        Args:
            num_blocks: N.
            num_queries: Q.
            lengths: `[n]`, tokens of each text; 0 is allowed.
            kinds: Mask kind of each text, or of all.
            blocks: `[n]`, which block's queries each text sees. By default text i sees block i;
                UNIMODAL texts see none, whatever is given here.
            num_text_rows: The sum of `lengths`; pass it if they are on an accelerator.
            max_seqlen: The largest of `lengths`, or an upper bound of them; likewise.
            device: Device of the token buffer; by default that of `lengths`.

        Raises:
            ValueError: lengths, kinds and blocks do not fit together, a block does not exist, or
                two BIDIRECTIONAL texts share a block (a query sees at most one text).
        """
        given = torch.as_tensor(lengths, dtype=torch.int32)
        n = given.shape[0]
        device = given.device if device is None else torch.device(device)
        kinds = (kinds,) * n if isinstance(kinds, MaskKind) else tuple(kinds)
        if len(kinds) != n:
            raise ValueError(f"kinds: expected one for each of {n} texts, got {len(kinds)}")
        if given.device.type == "cpu":
            if n and int(given.min()) < 0:
                raise ValueError(f"lengths: expected 0 or more, got {given.tolist()[:8]}")
            num_text_rows = int(given.sum())
            max_seqlen = max(max_seqlen or 0, int(given.max()) if n else 0)
        elif num_text_rows is None or max_seqlen is None:
            raise ValueError(
                f"lengths are on {given.device}: give num_text_rows and max_seqlen too, so that "
                "the host need not wait for them"
            )
        codes = torch.tensor([KIND_CODES[kind] for kind in kinds], dtype=torch.int32)
        sees = torch.arange(n, dtype=torch.int32) if blocks is None else torch.as_tensor(blocks)
        sees = sees.to(torch.int32)
        if sees.shape != (n,):
            raise ValueError(f"blocks: expected [{n}], one for each text, got {list(sees.shape)}")
        if sees.device.type == "cpu":
            _check_blocks(codes, sees, num_blocks)
        codes, sees, given = (x.to(device, non_blocking=True) for x in (codes, sees, given))
        # UNIMODAL texts see no block: sort them last
        block = torch.where(codes == KIND_CODES[MaskKind.UNIMODAL], num_blocks, sees)
        bidirectional = codes == KIND_CODES[MaskKind.BIDIRECTIONAL]
        block_text = torch.full((num_blocks + 1,), -1, dtype=torch.int32, device=device)
        target = torch.where(bidirectional, sees, num_blocks).long()
        block_text[target] = torch.arange(n, dtype=torch.int32, device=device)
        order, offsets = sort_by_target(block, num_blocks)
        return cls(
            num_blocks=num_blocks,
            num_queries=num_queries,
            num_text_rows=num_text_rows,
            max_seqlen=max_seqlen,
            has_bidirectional=MaskKind.BIDIRECTIONAL in kinds,
            has_causal=MaskKind.MULTIMODAL_CAUSAL in kinds,
            cu_seqlens=_offsets_of(given),
            kinds=codes,
            blocks=sees,
            block_text=block_text[:num_blocks],
            order=order,
            offsets=offsets,
        )


@dataclass(frozen=True)
class KVIndex:
    """Which image's keys and values each query block reads, and the inverse of that.

    Attributes:
        index: `[N]` int32, the image of each block.
        order: `[N]` int32, blocks sorted by image.
        offsets: `[B+1]` int32, where the blocks of each image start in `order`.
    """

    index: Tensor
    order: Tensor
    offsets: Tensor

    @classmethod
    def build(cls, index: Sequence[int] | Tensor, num_images: int) -> KVIndex:
        """Sort blocks by image, so that the backward pass can sum over them in order.

        Args:
            index: `[N]`, the image that each query block reads.
            num_images: B.

        Raises:
            ValueError: an index is not in 0 to B-1 (checked on the CPU only).
        """
        index = torch.as_tensor(index).to(torch.int32)
        if index.dim() != 1:
            raise ValueError(f"kv_index: expected [N], got shape {list(index.shape)}")
        if index.device.type == "cpu" and len(index) and not torch.compiler.is_compiling():
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= num_images:
                raise ValueError(
                    f"kv_index: expected images from 0 to {num_images - 1}, got {low} to {high}"
                )
        order, offsets = sort_by_target(index, num_images)
        return cls(index, order, offsets)


def sort_by_target(target: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Invert an index map `[n]`: members sorted by target, and where each target's start.

    Returns:
        `(order [n], offsets [count+1])`, int32; members whose target is `count` come last.
    """
    order = target.argsort(stable=True).to(torch.int32)
    counts = torch.zeros(count + 1, dtype=torch.int32, device=target.device)
    counts.scatter_add_(0, target.long(), torch.ones_like(target))
    return order, _offsets_of(counts[:count])


def _offsets_of(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _check_blocks(codes: Tensor, blocks: Tensor, num_blocks: int) -> None:
    joint = blocks[codes != KIND_CODES[MaskKind.UNIMODAL]]
    if len(joint) and not (0 <= int(joint.min()) and int(joint.max()) < num_blocks):
        raise ValueError(
            f"blocks: expected 0 to {num_blocks - 1} (num_blocks={num_blocks}), got "
            f"{int(joint.min())} to {int(joint.max())}"
        )
    bidirectional = blocks[codes == KIND_CODES[MaskKind.BIDIRECTIONAL]]
    if len(bidirectional) and int(bidirectional.bincount().max()) > 1:
        raise ValueError(
            "blocks: a block's queries see one BIDIRECTIONAL text at most; several texts share "
            f"blocks {bidirectional.tolist()[:8]}: give each pair a block of its own"
        )


for _container in (AttentionLayout, KVIndex):
    torch.export.register_dataclass(_container)
