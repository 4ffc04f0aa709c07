"""One contract for every selector, and what is special to each."""

import itertools
import pkgutil
from collections import Counter
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from delia.config import MethodConfig, build_method
from delia.curate.embedding import embed_hashed, scale_to_unit
from delia.curate.selection import Columns, Selector, make_columns, select_rows
from delia.errors import ConfigError
from delia.methods import selector
from delia.methods.selector.facility_location import FacilityLocation
from delia.methods.selector.k_center import KCenter
from delia.methods.selector.stratified import Stratified
from delia.schema import Message, Row

METHODS: dict[str, Selector] = {
    "k_center": KCenter(),
    "facility_location": FacilityLocation(),
    "stratified": Stratified(),
}
WORDS = "fox cat owl rose hammer spoon lake hill"


def make_rows(num_rows: int = 60) -> list[Row]:
    pairs = list(itertools.product(("name", "say", "count"), WORDS.split(), WORDS.split()))
    return [
        Row(
            row_id=f"r{index}",
            index=index,
            source="s",
            messages=(
                Message(role="user", content=" ".join(pairs[index * 3 % len(pairs)])),
                Message(role="assistant", content="yes"),
            ),
            num_output_tokens=index % 4,
        )
        for index in range(num_rows)
    ]


@pytest.fixture
def columns() -> Columns:
    return make_columns(make_rows(), embed_hashed)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Selector:
    return METHODS[request.param]


def place_at(vectors: list[tuple[float, float]]) -> dict[str, np.ndarray]:
    return {
        "row_id": np.array([f"r{i}" for i in range(len(vectors))], dtype=object),
        "embedding": scale_to_unit(np.array(vectors)),
    }


def on_circle(*degrees: float) -> dict[str, np.ndarray]:
    return place_at([(float(np.cos(np.radians(d))), float(np.sin(np.radians(d)))) for d in degrees])


# ---- the contract


def test_no_method_is_left_out_of_this_file():
    assert {module.name for module in pkgutil.iter_modules(selector.__path__)} == set(METHODS)


@pytest.mark.parametrize("num_rows", [1, 2, 17, 59, 60])
def test_a_selector_returns_so_many_different_ids_of_the_given_rows(method, columns, num_rows):
    chosen = method(columns, num_rows=num_rows, seed=0)

    assert len(chosen) == len(set(chosen)) == num_rows
    assert set(chosen) <= set(columns["row_id"])
    assert {type(row_id) for row_id in chosen} == {str}


def test_the_same_columns_and_seed_give_the_same_rows(method, columns):
    copies = {name: np.array(values) for name, values in columns.items()}

    assert method(columns, num_rows=20, seed=3) == method(copies, num_rows=20, seed=3)
    assert all(np.array_equal(columns[name], copies[name]) for name in columns)


def test_a_selector_is_a_frozen_value_that_settings_can_build(method):
    cls = type(method)
    knobs = {item.name: getattr(method, item.name) for item in fields(method)}

    assert build_method(MethodConfig(method=f"{cls.__module__}.{cls.__name__}", knobs=knobs)) == method
    with pytest.raises(FrozenInstanceError):
        method.column = "x"


def test_a_column_that_is_not_there_is_named_with_those_that_are(method, columns):
    with pytest.raises(ConfigError, match=r"column 'mood', there are \['embedding', 'num_output_tokens',"):
        replace(method, column="mood")(columns, num_rows=2, seed=0)


def test_what_is_kept_and_what_is_not_are_all_rows(method):
    rows = make_rows()
    kept, dropped = select_rows(rows, method, num_rows=25, seed=0, embed=embed_hashed)

    assert len(kept) == 25
    assert [row.index for row in kept] == sorted(row.index for row in kept)
    assert {item.row_id for item in (*kept, *dropped)} == {row.row_id for row in rows}
    assert {item.reason for item in dropped} == {"not_selected"}


# ---- k-center


def test_k_center_takes_the_farthest_from_all_that_it_has():
    """From 0 degrees: 180 is farthest, then 90 (90 from both), then 40 (40 from 0) before 120 (30 from 90)."""
    columns = on_circle(0, 40, 90, 120, 180)
    seed = next(s for s in range(99) if KCenter()(columns, num_rows=1, seed=s) == ["r0"])

    assert KCenter()(columns, num_rows=5, seed=seed) == ["r0", "r4", "r2", "r1", "r3"]


def test_k_center_starts_anywhere_by_its_seed(columns):
    assert len({KCenter()(columns, num_rows=1, seed=seed)[0] for seed in range(40)}) > 20


def test_k_center_is_within_twice_the_best_radius():
    rng = np.random.default_rng(0)
    vectors_ND = scale_to_unit(rng.standard_normal((12, 3)))
    columns = {"row_id": np.array([str(i) for i in range(12)], dtype=object), "embedding": vectors_ND}
    distances = np.linalg.norm(vectors_ND[:, None] - vectors_ND[None], axis=2)
    best = min(distances[:, list(c)].min(1).max() for c in itertools.combinations(range(12), 4))

    for seed in range(5):
        chosen = [int(row_id) for row_id in KCenter()(columns, num_rows=4, seed=seed)]
        assert distances[:, chosen].min(1).max() <= 2 * best + 1e-6


def test_k_center_takes_equal_rows_last():
    columns = on_circle(0, 0, 0, 90, 180)

    assert {
        columns["embedding"][int(i[1])].round(3).tobytes() for i in KCenter()(columns, num_rows=3, seed=0)
    } == {vector.round(3).tobytes() for vector in columns["embedding"][[0, 3, 4]]}


# ---- facility location


def choose_by_hand(vectors_ND: np.ndarray, num_rows: int) -> list[str]:
    """Every gain measured again at every step; of those equal to five digits the first."""
    similarity = np.maximum(vectors_ND @ vectors_ND.T, 0).astype(np.float64)
    covered, chosen = np.zeros(len(similarity)), []
    for _ in range(num_rows):
        gains = [np.maximum(similarity[:, j] - covered, 0).sum() for j in range(len(similarity))]
        best = max((j for j in range(len(gains)) if j not in chosen), key=lambda j: (round(gains[j], 5), -j))
        chosen.append(best)
        covered = np.maximum(covered, similarity[:, best])
    return [f"r{place}" for place in chosen]


def test_facility_location_is_the_greedy_choice_though_it_is_lazy():
    vectors_ND = scale_to_unit(np.random.default_rng(1).standard_normal((80, 5)))
    columns = {"row_id": np.array([f"r{i}" for i in range(80)], dtype=object), "embedding": vectors_ND}

    assert FacilityLocation()(columns, num_rows=30, seed=0) == choose_by_hand(vectors_ND, 30)


def test_facility_location_takes_the_middle_of_a_crowd_first_and_k_center_its_edge():
    """Five rows around 0 degrees and one at 180."""
    columns = on_circle(-20, -10, 0, 10, 20, 180)

    assert FacilityLocation()(columns, num_rows=2, seed=0) == ["r2", "r5"]
    assert FacilityLocation()(on_circle(-20, -10, 0, 10, 20, 100), num_rows=1, seed=0) == ["r2"]


def test_facility_location_measures_any_number_of_gains_at_a_time(monkeypatch):
    module = "delia.methods.selector.facility_location._GAINS_AT_A_TIME"
    vectors_ND = scale_to_unit(np.random.default_rng(2).standard_normal((50, 4)))
    columns = {"row_id": np.array([f"r{i}" for i in range(50)], dtype=object), "embedding": vectors_ND}
    for size in (1, 7):
        monkeypatch.setattr(module, size)
        assert FacilityLocation()(columns, num_rows=9, seed=0) == choose_by_hand(vectors_ND, 9)


# ---- stratified


def make_strata(**sizes: int) -> dict[str, np.ndarray]:
    names = [name for name, size in sizes.items() for _ in range(size)]
    ids = [f"{name}{index}" for index, name in enumerate(names)]
    return {"row_id": np.array(ids, dtype=object), "kind": np.array(names, dtype=object)}


def count_kinds(columns: Columns, num_rows: int, **knobs: str) -> Counter[str]:
    chosen = Stratified(column="kind", **knobs)(columns, num_rows=num_rows, seed=0)
    return Counter(row_id.rstrip("0123456789") for row_id in chosen)


@pytest.mark.parametrize(
    ("num_rows", "allocation", "counts"),
    [
        (10, "proportional", {"a": 6, "b": 3, "c": 1}),
        (5, "proportional", {"a": 3, "b": 2}),  # quotas 3, 1.5 and 0.5: b and c have equal remainders
        (9, "equal", {"a": 3, "b": 3, "c": 3}),
        (40, "equal", {"a": 17, "b": 17, "c": 6}),
        (60, "equal", {"a": 36, "b": 18, "c": 6}),
        (60, "proportional", {"a": 36, "b": 18, "c": 6}),
    ],
)
def test_strata_give_their_share_or_as_many_each(num_rows: int, allocation: str, counts: dict[str, int]):
    columns = make_strata(a=36, b=18, c=6)

    assert count_kinds(columns, num_rows, allocation=allocation) == counts


def test_within_a_stratum_the_seed_draws(columns):
    by_seed = [Stratified(column="num_output_tokens")(columns, num_rows=20, seed=seed) for seed in range(3)]

    assert len({frozenset(chosen) for chosen in by_seed}) == 3


def test_an_allocation_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="'proportional' or 'equal', got 'all'"):
        build_method(
            MethodConfig(method="delia.methods.selector.stratified.Stratified", knobs={"allocation": "all"})
        )
