"""The contrastive loss on 1, 2 and 4 processes is that of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from itc_cases import definition, make_features
from torch import Tensor

from blip2fast.kernels.philox import philox_state
from blip2fast.ops import itc_loss
from blip2fast.stage1.negatives import NegativeExchange

N, Q, D = 8, 3, 16
IDS = torch.tensor([7, 1, 2, 7, 4, 2, 6, 1])
MODES = [(mode, ids) for mode in ("local", "full") for ids in (None, IDS)]
# each rank wants two rows: some twice, some of its own, none of some ranks
WANTED = torch.tensor([3, 3, 0, 7, 2, 2, 7, 1])


def _share(x: Tensor, rank: int, ranks: int) -> Tensor:
    return x.detach().chunk(ranks)[rank].clone().requires_grad_(x.requires_grad)


def _loss(rank: int, ranks: int, mode: str, ids: Tensor | None, impl: str) -> dict[str, Any]:
    image, text, temp = make_features(N, Q, D)
    image, text = _share(image, rank, ranks), _share(text, rank, ranks)
    output = itc_loss(
        image,
        text,
        temp,
        image_ids=None if ids is None else _share(ids, rank, ranks),
        grad_mode=mode,
        philox=philox_state(5, 2),
        # the reference keeps what the sweep saw, the other looks again
        save_budget_bytes=0 if impl == "chunked" else 2**20,
        impl=impl,
        legacy_epsilon=0.5,
    )
    output.loss.backward()
    grads = {"image": image.grad, "text": text.grad, "temp": temp.grad}
    return {"output": [x.detach() for x in output], "grads": grads}


def _exchanges(rank: int, ranks: int) -> dict[str, Any]:
    tokens = torch.arange(N * 6, dtype=torch.float64).view(N, 2, 3).requires_grad_()
    tokens = _share(tokens, rank, ranks)
    wanted = NegativeExchange(_share(WANTED, rank, ranks), N // ranks)
    rows = wanted.rows(tokens)
    (rows * (1 + torch.arange(len(rows)))[:, None, None] * (1 + rank)).sum().backward()
    return {"rows": rows.detach(), "d_tokens": tokens.grad}


def _refusal(rank: int, ranks: int) -> str:
    """An index that one rank alone gets wrong is an error on every rank, not a hang."""
    index = torch.tensor([0, -1 if rank == ranks - 1 else 1])
    with pytest.raises(ValueError) as caught:
        NegativeExchange(index, N // ranks)
    return str(caught.value)


def _results(rank: int, ranks: int) -> dict[str, Any]:
    results = {
        "losses": [
            _loss(rank, ranks, mode, ids, impl)
            for mode, ids in MODES
            for impl in ("reference", "chunked")
        ],
        "exchange": _exchanges(rank, ranks),
        "refusal": _refusal(rank, ranks),
    }
    # a group of its own: this rank alone, whose batch is its own
    alone = [dist.new_group([r]) for r in range(ranks)][rank] if ranks > 1 else None
    image, text, temp = (x.detach() for x in make_features(N, Q, D))
    image, text = _share(image, rank, ranks), _share(text, rank, ranks)
    results["alone"] = itc_loss(image, text, temp, group=alone).loss
    return results


def _worker(rank: int, ranks: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{path}/store", rank=rank, world_size=ranks)
    results = _results(rank, ranks)
    torch.save(results, f"{path}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of the processes found."""
    if request.param == 1:
        return [_results(0, 1)]
    path = tmp_path_factory.mktemp(f"ranks{request.param}")
    mp.spawn(_worker, args=(request.param, str(path)), nprocs=request.param)
    return [torch.load(path / f"rank{r}.pt") for r in range(request.param)]


def test_losses_and_gradients(ranks: list[Any]) -> None:
    """Means over ranks against the definition, computed on the whole batch with autograd."""
    for case, (mode, ids) in enumerate(mode_ids for mode_ids in MODES for _ in range(2)):
        image, text, temp = make_features(N, Q, D)
        loss, i2t, t2i = definition(image, text, temp, ids, mode)
        loss.backward()
        found = [rank["losses"][case] for rank in ranks]
        outputs = [
            torch.stack(x) if x[0].dim() == 0 else torch.cat(x)
            for x in zip(*(f["output"] for f in found), strict=True)
        ]
        torch.testing.assert_close(outputs[0].mean(), loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(outputs[1], i2t.detach().logsumexp(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(outputs[2], t2i.detach().logsumexp(1), rtol=1e-12, atol=0)
        for name, leaf in (("image", image), ("text", text), ("temp", temp)):
            grads = [f["grads"][name] for f in found]
            # a rank's loss is a mean over its own pairs: their sum is ranks times the whole's
            got = (torch.stack(grads).sum(0) if name == "temp" else torch.cat(grads)) / len(ranks)
            torch.testing.assert_close(got, leaf.grad, rtol=1e-9, atol=1e-11)


def test_negatives_and_accuracies_do_not_depend_on_the_number_of_ranks(ranks: list[Any]) -> None:
    for case, (mode, ids) in enumerate(mode_ids for mode_ids in MODES for _ in range(2)):
        whole = _loss(0, 1, mode, ids, "reference")["output"]
        found = [rank["losses"][case]["output"] for rank in ranks]
        for field in (3, 4, 7):
            assert torch.equal(torch.cat([f[field] for f in found]), whole[field])
        for field in (5, 6):
            assert float(torch.stack([f[field] for f in found]).mean()) == pytest.approx(
                float(whole[field])
            )


def test_group_of_one_rank(ranks: list[Any]) -> None:
    image, text, temp = (x.detach() for x in make_features(N, Q, D))
    for rank, found in enumerate(ranks):
        own = (_share(x, rank, len(ranks)) for x in (image, text))
        expected = definition(*own, temp, None, "local")[0]
        torch.testing.assert_close(found["alone"], expected, rtol=1e-12, atol=0)


def test_only_what_is_wanted_travels(ranks: list[Any]) -> None:
    """Rows and their gradients, against indexing the whole batch."""
    tokens = torch.arange(N * 6, dtype=torch.float64).view(N, 2, 3)
    k = N // len(ranks)
    weight = torch.cat([(1 + torch.arange(k)) * (1 + r) for r in range(len(ranks))]).double()
    d_tokens = torch.zeros(N).double().index_add(0, WANTED, weight)
    joined = {
        name: torch.cat([rank["exchange"][name] for rank in ranks]) for name in ("rows", "d_tokens")
    }
    assert torch.equal(joined["rows"], tokens[WANTED])
    assert torch.equal(joined["d_tokens"], d_tokens[:, None, None].expand(N, 2, 3))
    for rank in ranks:
        assert "expected rows 0 to 7 of the batch of all ranks, got -1 to" in rank["refusal"]
