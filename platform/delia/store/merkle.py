"""The Merkle root over ordered leaves: one hash that changes when any leaf, or their order, does.

    leaf, leaf, ... --MerkleTree.add--> root

A level of an odd number of nodes is made even by its last node once more. So a last leaf said twice can have the root
of the leaf said once: whoever compares roots compares the numbers of leaves too.
"""

from collections.abc import Iterable

import xxhash


class MerkleTree:
    """Takes leaves one by one and keeps a node a level, however many there are."""

    def __init__(self) -> None:
        """Start without leaves."""
        self.num_leaves = 0
        self._open: list[bytes | None] = []
        """By level: the node that waits for its right neighbour."""

    def add(self, leaf: str) -> None:
        """Take the next leaf, in hexadecimal digits."""
        node, level = bytes.fromhex(leaf), 0
        while level < len(self._open) and (left := self._open[level]) is not None:
            self._open[level] = None
            node, level = _join(left, node), level + 1
        if level == len(self._open):
            self._open.append(None)
        self._open[level] = node
        self.num_leaves += 1

    @property
    def root(self) -> str:
        """Return the root of the leaves so far; of none, the hash of nothing."""
        top, last = len(self._open) - 1, None
        for level, left in enumerate(self._open):
            nodes = [node for node in (left, last) if node is not None]
            if level == top and len(nodes) == 1:
                return nodes[0].hex()
            last = _join(nodes[0], nodes[-1]) if nodes else None
        return (last or xxhash.xxh3_128_digest(b"")).hex()


def _join(left: bytes, right: bytes) -> bytes:
    return xxhash.xxh3_128_digest(left + right)


def merkle_root(leaves: Iterable[str]) -> str:
    """Return the Merkle root over ordered leaf hashes."""
    tree = MerkleTree()
    for leaf in leaves:
        tree.add(leaf)
    return tree.root
