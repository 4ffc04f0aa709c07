"""Mixtures: nested, exact, and an error rather than a smaller one."""

import dataclasses
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from delia.errors import MixtureError
from delia.mix.mixture import MixConfig, count_rows, mix
from delia.schema import Message, Mixture, Row, SeedTask
from delia.store.pools import index_rows

CHAT = (Message(role="user", content="q"), Message(role="assistant", content="a"))


def make_task(num_rows: int) -> list[SeedTask]:
    return [SeedTask(task_id=f"t{place}", messages=CHAT) for place in range(num_rows)]


def make_pool(**num_rows_by_source: int) -> list[Row]:
    return [
        Row(row_id=f"{source}{place}", index=place, source=source, messages=CHAT)
        for source, num_rows in num_rows_by_source.items()
        for place in range(num_rows)
    ]


def draw(num_task_rows: int, pool: list[Row], **settings: object) -> Mixture:
    return name(make_task(num_task_rows), pool, MixConfig(**settings))


def name(task: list[SeedTask], pool: list[Row], config: MixConfig, *, root="p", digest="t") -> Mixture:
    return mix(task, index_rows(pool).group_ids(), config, pool_root=root, task_digest=digest)


def diverse_ids(mixture: Mixture) -> list[str]:
    return [row_id for row_id, is_task in zip(mixture.row_ids, mixture.is_task, strict=True) if not is_task]


def count_sources(mixture: Mixture) -> Counter[str]:
    return Counter(row_id.rstrip("0123456789") for row_id in diverse_ids(mixture))


SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=5).filter(lambda parts: sum(parts) > 0.01)


@st.composite
def shares_by_source(draw_value: st.DrawFn) -> dict[str, float]:
    parts = draw_value(SHARES)
    return {"abcde"[place]: part / sum(parts) for place, part in enumerate(parts)}


# ---- counts


@pytest.mark.parametrize(
    ("total", "shares", "counts"),
    [
        (10, {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 5, "b": 3, "c": 2}),
        (7, {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 4, "b": 2, "c": 1}),  # 3.5, 2.1, 1.4
        (100, {"a": 0.29, "b": 0.71}, {"a": 29, "b": 71}),  # 0.29 * 100 is below 29 in floats
        (1, {"b": 0.5, "a": 0.5}, {"b": 0, "a": 1}),  # a tie goes by name
        (3, {"a": 1.0, "b": 0.0}, {"a": 3, "b": 0}),
        (0, {"a": 1.0}, {"a": 0}),
    ],
)
def test_counts_worked_by_hand(total, shares, counts):
    assert count_rows(total, shares) == counts


@given(st.integers(0, 400), shares_by_source())
def test_counts_sum_to_the_total_and_lie_within_a_row_of_their_share(total, shares):
    counts = count_rows(total, shares)

    assert sum(counts.values()) == total
    assert all(count >= 0 for count in counts.values())
    if len(shares) <= 3:  # with more sources Sainte-Lague's may, rarely, lie further off
        assert all(abs(counts[name] - total * share) < 1 + 1e-9 for name, share in shares.items())


def test_a_larger_total_takes_no_row_from_a_source():
    """Largest remainders would give c 2 of 10 rows and 1 of 11: the Alabama paradox."""
    shares = {"a": 6 / 14, "b": 6 / 14, "c": 2 / 14}

    assert [count_rows(total, shares)["c"] for total in (10, 11)] == [1, 1]
    assert sum(count_rows(1_000_003, {"a": 0.5, "b": 0.5000009}).values()) == 1_000_003


@pytest.mark.parametrize(
    "shares", [{"a": 0.5, "b": 0.4}, {"a": 1.5, "b": -0.5}, {"a": 1.1}, {"a": float("nan")}, {"a": 0.0}]
)
def test_shares_that_are_negative_or_do_not_sum_to_1_are_refused(shares):
    with pytest.raises(MixtureError, match=re.escape(f"must be >= 0 and sum to 1, got {shares}")):
        draw(10, make_pool(a=50, b=50), diverse_ratio=1.0, shares=shares)


# ---- mixtures


@given(
    st.integers(1, 12),
    shares_by_source(),
    st.lists(st.floats(0, 4), min_size=2, max_size=2).map(sorted),
    st.integers(0, 3),
)
def test_a_larger_ratio_holds_every_row_of_a_smaller_one(num_task_rows, shares, ratios, seed):
    pool = make_pool(**dict.fromkeys("abcde", 60))
    small, large = (
        draw(num_task_rows, pool, diverse_ratio=ratio, shares=shares, seed=seed) for ratio in ratios
    )

    assert set(small.row_ids) <= set(large.row_ids)
    for source in shares:
        mine = [[i for i in diverse_ids(mixture) if i[0] == source] for mixture in (small, large)]
        assert mine[1][: len(mine[0])] == mine[0]


def test_a_mixture_is_every_task_row_in_order_and_the_asked_number_of_distinct_diverse_rows():
    mixture = draw(4, make_pool(web=20, self=20), diverse_ratio=2.5, shares={"web": 0.7, "self": 0.3})

    assert mixture.row_ids[:4] == ("t0", "t1", "t2", "t3")
    assert mixture.is_task == (True,) * 4 + (False,) * 10
    assert count_sources(mixture) == {"web": 7, "self": 3}
    assert len(set(mixture.row_ids)) == 14
    assert (mixture.diverse_ratio, mixture.shares) == (2.5, {"web": 0.7, "self": 0.3})


def test_ratio_0_is_plain_tuning_even_without_a_pool():
    mixture = draw(3, [], diverse_ratio=0.0)

    assert mixture.row_ids == ("t0", "t1", "t2")
    assert mixture.is_task == (True, True, True)


def test_with_no_shares_every_source_gives_in_proportion_to_its_rows():
    assert count_sources(draw(5, make_pool(a=30, b=10), diverse_ratio=4.0)) == {"a": 15, "b": 5}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_with_no_shares_a_pool_can_be_used_up_to_its_last_row(num_a, num_b, num_c):
    pool = make_pool(a=num_a, b=num_b, c=num_c)

    assert set(diverse_ids(draw(1, pool, diverse_ratio=float(len(pool))))) == {row.row_id for row in pool}


def test_the_order_in_which_a_pool_is_read_changes_nothing():
    pool = make_pool(a=30, b=10)

    assert draw(5, pool, diverse_ratio=3.0) == draw(5, pool[::-1], diverse_ratio=3.0)


def test_another_seed_draws_other_rows():
    drawn = {tuple(diverse_ids(draw(2, make_pool(a=40), diverse_ratio=3.0, seed=seed))) for seed in range(5)}

    assert len(drawn) == 5
    assert diverse_ids(draw(2, make_pool(a=40), diverse_ratio=3.0)) != [f"a{place}" for place in range(6)]


def test_sources_of_one_size_are_drawn_in_orders_of_their_own():
    ids = diverse_ids(draw(10, make_pool(a=40, b=40), diverse_ratio=8.0))
    places = {source: [int(row_id[1:]) for row_id in ids if row_id[0] == source] for source in "ab"}

    assert sorted(places["a"]) == sorted(places["b"]) == list(range(40))
    assert places["a"] != places["b"]


def test_a_source_that_joins_the_pool_reorders_no_other():
    alone = diverse_ids(draw(10, make_pool(a=40), diverse_ratio=1.0))
    together = draw(10, make_pool(a=40, b=40), diverse_ratio=2.0, shares={"a": 0.5, "b": 0.5})

    assert [row_id for row_id in diverse_ids(together) if row_id.startswith("a")] == alone


# ---- never silently less


def test_a_ratio_that_the_pool_can_not_supply_is_an_error_with_the_numbers_and_the_ways_out():
    shares = {"chat": 0.5, "web": 0.5}
    with pytest.raises(MixtureError) as refused:
        draw(100, make_pool(chat=120, web=400), diverse_ratio=4.0, shares=shares)

    assert str(refused.value) == (
        "source 'chat' must supply 200 rows (ratio 4 x 100 task rows x share 0.5) but the pool holds 120;"
        " lower mix.diverse_ratio to at most 2.4, lower the share, or synthesise more rows"
    )


@given(st.integers(1, 3000), st.integers(1, 60), st.floats(0.05, 1))
def test_the_ratio_that_the_error_names_can_be_supplied(num_task_rows, num_held, share):
    pool, shares = make_pool(a=num_held, b=70), {"a": share, "b": 1 - share}
    with pytest.raises(MixtureError, match="source 'a'") as refused:
        draw(num_task_rows, pool, diverse_ratio=(num_held + 2) / num_task_rows / share, shares=shares)
    found = re.search(r"to at most (\S+),", str(refused.value))
    assert found is not None
    total = round(num_task_rows * float(found[1]))

    assert count_rows(total, shares)["a"] <= num_held


def test_a_source_that_the_pool_does_not_have_holds_no_rows():
    with pytest.raises(MixtureError, match=r"source 'none' must supply 10 rows .* but the pool holds 0"):
        draw(10, make_pool(a=50), diverse_ratio=1.0, shares={"none": 1.0})


def test_num_distinct_repeats_that_many_rows_of_each_source():
    once = draw(10, make_pool(a=50, b=50), diverse_ratio=2.0)
    repeated = draw(10, make_pool(a=50, b=50), diverse_ratio=2.0, num_distinct=4)

    assert count_sources(repeated) == count_sources(once) == {"a": 10, "b": 10}
    times = Counter(diverse_ids(repeated))
    assert sorted(times.values()) == [2, 2, 2, 2, 3, 3, 3, 3]
    assert set(times) <= set(diverse_ids(once))  # the repeated rows are the first of those it stands for


@pytest.mark.parametrize("num_held", [0, 4])
def test_fewer_rows_than_num_distinct_are_an_error_and_not_repeated_more_often(num_held):
    pool = make_pool(a=num_held, b=9)
    with pytest.raises(MixtureError, match=f"but the pool holds {num_held}"):
        draw(10, pool, diverse_ratio=2.0, num_distinct=5, shares={"a": 1.0})


@pytest.mark.parametrize("settings", [{"diverse_ratio": -0.1}, {"num_distinct": 0}, {"ratio": 1.0}])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        MixConfig(**settings)


# ---- the root


def test_any_changed_id_changes_the_root():
    pool, config = make_pool(a=9), MixConfig(diverse_ratio=2.0)
    task = make_task(3)
    used = set(name(task, pool, config).row_ids)
    renamed_task = [dataclasses.replace(task[0], task_id="x"), *task[1:]]
    place = next(place for place, row in enumerate(pool) if row.row_id in used)
    renamed_pool = [*pool[:place], dataclasses.replace(pool[place], row_id="x"), *pool[place + 1 :]]
    roots = [
        name(task, pool, config).root,
        name(renamed_task, pool, config).root,
        name(task, renamed_pool, config).root,
        name(task[::-1], pool, config).root,
        name(task, pool, config, root="q").root,
        name(task, pool, config, digest="u").root,
        name(task, pool, MixConfig(diverse_ratio=2.0, seed=1)).root,
        name(task, pool, MixConfig(diverse_ratio=1.0)).root,
    ]

    assert len(set(roots)) == len(roots)
    assert name(task, pool, config).root == roots[0]
