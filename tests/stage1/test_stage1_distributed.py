"""A stage-1 step on 2 and 4 processes is the step of one process with the whole batch.

Gathered features carry no gradient, on one process as on several; matching takes its negatives from
other processes. Every process has texts of the same lengths, so that means of means are means.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from stage1_cases import SMALL
from torch import Tensor
from torch.overrides import TorchFunctionMode

from blip2fast.ops import collectives
from blip2fast.stage1 import negatives, passes
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage1.negatives import NegativeExchange

pytestmark = pytest.mark.slow

LOSSES = ("loss", "loss_itc", "loss_itm", "loss_itg")
B, S, T = 8, 7, 6
IDS = torch.tensor([7, 1, 2, 7, 4, 2, 6, 1])
# of other processes, of the own one, one twice
NEGATIVES = (torch.tensor([2, 6, 0, 7, 1, 1, 3, 5]), torch.tensor([5, 0, 7, 1, 6, 2, 4, 3]))
# what a step takes besides: nothing, equal images, image tokens that are not all real
EXTRAS = ("plain", "image_ids", "image_attention_mask")


def whole_batch() -> dict[str, Tensor]:
    """Eight pairs; two neighbours have the lengths of every other two."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(T) < torch.tensor([6, 3]).repeat(B // 2)[:, None]
    ids = torch.randint(4, SMALL.vocab_size - 1, (B, T), generator=generator)
    ids[:, 0] = 2
    tokens = torch.randn(B, S, SMALL.encoder_hidden_size, generator=generator, dtype=torch.float64)
    return {
        "image_embeds": tokens,
        "input_ids": ids * mask,
        "attention_mask": mask.long(),
        "negative_image": NEGATIVES[0],
        "negative_text": NEGATIVES[1],
        "image_ids": IDS,
        "image_attention_mask": torch.arange(S) < torch.tensor([7, 2, 5, 1, 6, 3, 4, 7])[:, None],
    }


def step(rank: int, ranks: int, extra: str, trained_images: bool) -> dict[str, Any]:
    """Losses and gradients of one process's share of the batch."""
    torch.manual_seed(0)
    model = Blip2Stage1(SMALL).double()
    share = {name: x.chunk(ranks)[rank] for name, x in whole_batch().items()}
    share["image_embeds"] = share["image_embeds"].clone().requires_grad_(trained_images)
    negatives = share.pop("negative_image"), share.pop("negative_text")
    for name in EXTRAS[1:]:
        if name != extra:
            del share[name]
    out = model(**share, negatives=negatives)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {
        "losses": torch.stack([out[name].detach() for name in LOSSES]),
        "grads": grads,
        "tokens": share["image_embeds"].grad,
    }


def sent_token_rows(rank: int, ranks: int) -> int:
    """Image tokens' rows that this process hands to others in a step; nothing else is as wide."""
    rows = 0
    exchange, gather = dist.all_to_all_single, dist.all_gather

    def is_tokens(x: Tensor) -> bool:
        return x.dim() == 3 and x.shape[1:] == (S, SMALL.encoder_hidden_size)

    def count_exchange(received: Tensor, sent: Tensor, *args: Any, **options: Any) -> Any:
        nonlocal rows
        rows += len(sent) if is_tokens(sent) else 0
        return exchange(received, sent, *args, **options)

    def count_gather(parts: list[Tensor], sent: Tensor, *args: Any, **options: Any) -> Any:
        nonlocal rows
        rows += ranks * len(sent) if is_tokens(sent) else 0
        return gather(parts, sent, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", count_exchange)
        patch.setattr(dist, "all_gather", count_gather)
        step(rank, ranks, "plain", trained_images=False)
    return rows


# on a GPU the host waits for what these return, or for how large it is
WAITS = {"tolist", "item", "cpu", "numpy", "nonzero", "bincount", "unique", "masked_select"}
WAITS |= {"__bool__", "__int__", "__float__", "__index__"}


class Waits(TorchFunctionMode):
    """Notes each time that the code which is for several processes alone looks at a tensor."""

    def __init__(self, happened: list[str]) -> None:
        super().__init__()
        self.happened = happened

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        caller = sys._getframe(1).f_code
        between_ranks = caller.co_filename in (collectives.__file__, negatives.__file__)
        if between_ranks or caller.co_name == "check_ranks_agree":
            name = getattr(func, "__name__", "")
            mask = name == "__getitem__" and getattr(args[1], "dtype", None) == torch.bool
            if name in WAITS or mask:
                self.happened.append("wait")
        return func(*args, **(kwargs or {}))


def events(rank: int, ranks: int) -> list[str]:
    """The collectives of a step, its first pass and the host's waits, as they follow each other."""
    happened: list[str] = []

    def noting(name: str, function: Any) -> Any:
        def noted(*args: Any, **options: Any) -> Any:
            happened.append(name)
            return function(*args, **options)

        return noted

    with pytest.MonkeyPatch.context() as patch, Waits(happened):
        for name in ("all_gather", "all_to_all_single", "all_reduce"):
            patch.setattr(dist, name, noting(name, getattr(dist, name)))
        patch.setattr(passes, "first_pass", noting("first pass", passes.first_pass))
        step(rank, ranks, "plain", trained_images=False)
    return happened


def several_exchanges(rank: int, ranks: int) -> dict[str, Any]:
    """The rows of both lists of negatives, wanted together and one by one; a list that is wrong."""
    lists = [index.chunk(ranks)[rank] for index in NEGATIVES]
    held = torch.arange(B).chunk(ranks)[rank]
    together = NegativeExchange.for_lists(lists, B // ranks)
    alone = [NegativeExchange(index, B // ranks) for index in lists]
    wrong = [lists[0], lists[1] + B if rank == ranks - 1 else lists[1]]
    with pytest.raises(ValueError) as caught:
        NegativeExchange.for_lists(wrong, B // ranks)
    return {
        "together": [exchange.rows(held) for exchange in together],
        "alone": [exchange.rows(held) for exchange in alone],
        "wanted": lists,
        "refusal": str(caught.value),
    }


def _worker(rank: int, ranks: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{path}/store", rank=rank, world_size=ranks)
    results: dict[str, Any] = {
        f"{extra}, {trained}": step(rank, ranks, extra, trained)
        for extra in EXTRAS
        for trained in (False, True)
    }
    results["rows"] = sent_token_rows(rank, ranks)
    results["events"] = events(rank, ranks)
    results["several"] = several_exchanges(rank, ranks)
    torch.save(results, f"{path}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of the processes found."""
    path = tmp_path_factory.mktemp(f"ranks{request.param}")
    mp.spawn(_worker, args=(request.param, str(path)), nprocs=request.param)
    return [torch.load(Path(path) / f"rank{r}.pt") for r in range(request.param)]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("extra", EXTRAS)
def test_losses_and_gradients(ranks: list[Any], extra: str, trained: bool) -> None:
    """Means over processes, as data parallelism takes them; image tokens have their own rows."""
    truth, found = step(0, 1, extra, trained), [rank[f"{extra}, {trained}"] for rank in ranks]
    mean = torch.stack([f["losses"] for f in found]).mean(0)
    torch.testing.assert_close(mean, truth["losses"], rtol=1e-12, atol=0)
    for name, grad in truth["grads"].items():
        got = torch.stack([f["grads"][name] for f in found]).mean(0)
        if not name.endswith("key.bias"):
            assert (got - grad).norm() <= 1e-10 * grad.norm(), name
    if trained:
        # of the sum of the processes' losses
        tokens = torch.cat([f["tokens"] for f in found]) / len(ranks)
        assert (tokens - truth["tokens"]).norm() <= 1e-10 * truth["tokens"].norm()
    else:
        assert all(f["tokens"] is None for f in found)


def test_only_the_tokens_of_sampled_negatives_travel(ranks: list[Any]) -> None:
    """Each process gets as many images as it has negatives, wherever they come from."""
    assert sum(rank["rows"] for rank in ranks) == B


def test_the_host_waits_for_sizes_behind_the_first_pass_and_once_for_both_negatives(
    ranks: list[Any],
) -> None:
    """No collective whose size depends on the batch comes before sizes are known to agree."""
    sizes = ["all_gather", "first pass", "wait"]
    itc = ["all_gather", "all_to_all_single", "all_to_all_single"]
    where_negatives_go = ["all_gather", "wait"]
    words_lengths_images = ["all_to_all_single"] * 3
    backward = ["all_to_all_single", "all_reduce"]
    expected = [*sizes, *itc, *where_negatives_go, *words_lengths_images, *backward]
    assert [rank["events"] for rank in ranks] == [expected] * len(ranks)


def test_exchanges_built_together_are_those_built_alone(ranks: list[Any]) -> None:
    """The batch holds its own row numbers; one process's wrong list is an error on all."""
    for rank in ranks:
        found = rank["several"]
        for name in ("together", "alone"):
            assert all(map(torch.equal, found[name], found["wanted"])), name
        assert f"expected rows 0 to {B - 1} of the batch of all ranks" in found["refusal"]
