"""init="cover", "columns": a sweep covers the input space once, by (seed, restart_index, name) alone."""

import numpy as np
import pytest
import torch

from loops import Loop, adamw, batch, tiny_model
from relora import ReLoRAConfig
from relora.method.cover import column_rows, cover_rows


def sweep(rank, width, *, number=0, key=(0, "layer")):
    blocks = -(-width // rank)
    return [
        cover_rows(rank, width, index=number * blocks + i, key=key).double().numpy() for i in range(blocks)
    ]


@pytest.mark.parametrize(("rank", "width"), [(3, 12), (1, 5), (7, 7), (3, 13), (5, 8), (64, 300), (6, 257)])
def test_the_rows_of_every_block_are_orthonormal(rank, width):
    for rows in sweep(rank, width):
        assert rows.shape == (rank, width)
        np.testing.assert_allclose(rows @ rows.T, np.eye(rank), atol=3e-6)


@pytest.mark.parametrize(("rank", "width"), [(3, 12), (1, 5), (4, 264), (50, 300)])
def test_a_sweep_sees_every_direction_exactly_once(rank, width):
    for number in (0, 1):
        energy = sum(rows.T @ rows for rows in sweep(rank, width, number=number))
        np.testing.assert_allclose(energy, np.eye(width), atol=1e-5)


@pytest.mark.parametrize(("rank", "width"), [(3, 13), (5, 8), (6, 257)])
def test_where_the_rank_does_not_divide_the_width_a_few_directions_come_twice_and_none_is_missed(rank, width):
    energy = np.linalg.eigvalsh(sum(rows.T @ rows for rows in sweep(rank, width)))
    twice = rank * -(-width // rank) - width
    np.testing.assert_allclose(energy, [1.0] * (width - twice) + [2.0] * twice, atol=1e-5)


def test_sweeps_seeds_and_layers_have_matrices_and_orders_of_their_own():
    first = np.concatenate(sweep(3, 12))
    for other in (sweep(3, 12, number=1), sweep(3, 12, key=(1, "layer")), sweep(3, 12, key=(0, "other"))):
        # Entries of a product of two unrelated rotations are about 1/sqrt(12) in size, none is 1.
        assert np.abs(first @ np.concatenate(other).T).max() < 0.99


def test_blocks_come_in_an_order_of_each_sweep_and_seed():
    def order(seed):
        whole = cover_rows(8, 8, index=0, key=(seed, "layer"))  # one block: the matrix itself
        taken = torch.cat([cover_rows(1, 8, index=i, key=(seed, "layer")) for i in range(8)])
        return (whole @ taken.T).abs().argmax(0).tolist()

    orders = [order(seed) for seed in range(4)]
    assert all(sorted(positions) == list(range(8)) for positions in orders)
    assert len({tuple(positions) for positions in [*orders, list(range(8))]}) == 5


def test_directions_are_uniformly_distributed():
    # A uniformly random unit vector in 8 dimensions has E[x_i^4] = 3 / (8 * 10), and mean square 1/8.
    rows = torch.cat([cover_rows(2, 8, index=0, key=(seed, "layer")) for seed in range(1500)]).double()
    torch.testing.assert_close(rows.square().mean(0), torch.full((8,), 1 / 8).double(), rtol=0.1, atol=0)
    torch.testing.assert_close(rows.pow(4).mean(0), torch.full((8,), 3 / 80).double(), rtol=0.2, atol=0)


@pytest.mark.parametrize(("rank", "width"), [(3, 12), (1, 5), (7, 7), (3, 13), (6, 257)])
def test_columns_select_every_input_once_a_sweep(rank, width):
    blocks = -(-width // rank)
    for number in (0, 1):
        taken = [column_rows(rank, width, index=number * blocks + i, key=(0, "layer")) for i in range(blocks)]
        for rows in taken:
            assert rows.shape == (rank, width) and rows.dtype == torch.float32
            assert (rows.count_nonzero(1) == 1).all() and (rows.sum(1) == 1).all()
            assert rows.count_nonzero(0).max() == 1
        counts = torch.stack(taken).sum((0, 1))
        assert counts.min() == 1 and (counts == 2).sum() == rank * blocks - width


def test_columns_come_in_an_order_of_each_sweep_seed_and_layer():
    def order(number=0, key=(0, "layer")):
        blocks = [column_rows(4, 12, index=3 * number + i, key=key) for i in range(3)]
        return tuple(torch.cat(blocks).argmax(1).tolist())

    orders = {order(), order(number=1), order(key=(1, "layer")), order(key=(0, "other")), tuple(range(12))}
    assert len(orders) == 5
    assert order() == order()


@pytest.mark.parametrize("init", ["cover", "columns"])
def test_a_run_takes_the_blocks_in_order_and_covers_the_space(init):
    loop = Loop(ReLoRAConfig(rank=3, factors="B", init=init, restart_every=2, reset="none"), seed=5)
    seen = [loop.model.up.lora_A.detach().double().clone()]
    for step in range(1, 5):
        loop.run(step, step)
        if step % 2 == 0:
            seen.append(loop.model.up.lora_A.detach().double().clone())
    # up has 7 inputs: 3 blocks of 3 rows, two directions twice.
    energy = torch.linalg.eigvalsh(sum(a.T @ a for a in seen))
    torch.testing.assert_close(energy, torch.tensor([1.0] * 5 + [2.0] * 2).double(), rtol=0, atol=1e-5)


def test_the_matched_scale_is_that_of_orthonormal_rows():
    cover, columns, plain = (
        Loop(ReLoRAConfig(rank=3, factors="B", init=init, scaling_rule="matched")).model.up.fixed_scaling
        for init in ("cover", "columns", "orthonormal")
    )
    assert cover == columns == plain == pytest.approx((7 / 3) ** 0.5)


def test_the_callers_default_device_and_dtype_do_not_matter():
    wanted = cover_rows(3, 13, index=4, key=(0, "layer"))
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            drawn = cover_rows(3, 13, index=4, key=(0, "layer"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(drawn, wanted)


def test_a_cycle_of_columns_at_scaling_1_is_full_ranks_adam_on_those_columns():
    def plain_adam(model):
        return adamw(model, weight_decay=0.0)

    config = ReLoRAConfig(
        rank=3,
        factors="B",
        scaling_rule="alpha/r",
        init="columns",
        targets=("up",),
        restart_every=100,
        reset="none",
    )
    loop = Loop(config, tiny_model(torch.float64), plain_adam)
    chosen = loop.model.up.lora_A.detach().argmax(1).tolist()
    others = [column for column in range(7) if column not in chosen]
    loop.run(1, 6)

    full = tiny_model(torch.float64)
    start = full.up.weight.detach().clone()
    optimizer = plain_adam(full)
    for step in range(1, 7):
        x, y = batch(step)
        optimizer.zero_grad()
        (full(x.double()) - y).square().mean().backward()
        full.up.weight.grad[:, others] = 0
        optimizer.step()
    merged = loop.model.up.weight + loop.model.up.scaling * loop.model.up.lora_B @ loop.model.up.lora_A
    assert not torch.equal(merged[:, chosen], start[:, chosen])
    torch.testing.assert_close(merged, full.up.weight, rtol=1e-6, atol=1e-7)
