"""Merkle roots, taken leaf by leaf, against their definition level by level."""

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from delia.rng import hash_text
from delia.store.merkle import MerkleTree, merkle_root

LEAVES = st.lists(st.text("ab", min_size=1, max_size=3).map(hash_text), min_size=1, max_size=9, unique=True)


def digest(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data)


def make_leaves(count: int) -> list[str]:
    return [digest(str(index).encode()).hex() for index in range(count)]


def fold(leaves: list[str]) -> str:
    level = [bytes.fromhex(leaf) for leaf in leaves] or [digest(b"")]
    while len(level) > 1:
        level += level[-1:] if len(level) % 2 else []
        level = [digest(level[i] + level[i + 1]) for i in range(0, len(level), 2)]
    return level[0].hex()


@pytest.mark.parametrize("count", [*range(0, 35), 63, 64, 65, 100, 1000, 1023, 1025])
def test_a_root_is_that_of_pairs_joined_level_by_level(count):
    leaves = make_leaves(count)

    assert merkle_root(leaves) == fold(leaves)


def test_reading_a_root_leaves_the_tree_as_it_was():
    tree = MerkleTree()
    for count, leaf in enumerate(make_leaves(20)):
        assert (tree.num_leaves, tree.root) == (count, fold(make_leaves(count)))
        tree.add(leaf)


def test_the_root_of_three_leaves_worked_by_hand():
    """Level 1: hash(a b), hash(c c); an odd level says its last leaf twice."""
    from xxhash import xxh3_128_digest as digest

    a, b, c = (digest(name) for name in (b"a", b"b", b"c"))

    assert merkle_root([a.hex(), b.hex(), c.hex()]) == digest(digest(a + b) + digest(c + c)).hex()
    assert merkle_root([a.hex()]) == a.hex()
    assert merkle_root([]) == digest(b"").hex()


@given(LEAVES, st.data())
def test_a_changed_a_moved_and_a_missing_leaf_each_change_the_root(leaves, data):
    root, place = merkle_root(leaves), data.draw(st.integers(0, len(leaves) - 1))
    changed = [*leaves[:place], hash_text("changed"), *leaves[place + 1 :]]
    moved = [*leaves[:place], *leaves[place + 1 :], leaves[place]]

    assert merkle_root(changed) != root
    assert (merkle_root(moved) == root) is (moved == leaves)
    assert merkle_root(leaves[:-1]) != root


@given(LEAVES)
def test_a_root_does_not_change_the_list_of_leaves(leaves):
    before = list(leaves)
    merkle_root(leaves)

    assert leaves == before
