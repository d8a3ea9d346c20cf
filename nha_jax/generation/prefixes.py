"""The beginnings of prompts that were read before: what they left in the cache, kept for others."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import jax
import numpy as np

from nha_jax.cache import ModelCache
from nha_jax.config import ModelConfig
from nha_jax.generation import programs


class PrefixStatistics(NamedTuple):
    """What an engine read, and what it needed not read again; since it was made, but where said.

    Fields:
      hits: prompts, and prefixes to be pinned, whose beginning was kept.
      misses: those that were read from their first token on.
      tokens_read: tokens that the model read of all of them.
      tokens_saved: tokens that it did not read, because a snapshot stood for them.
      evicted: snapshots that made room for others.
      snapshots: how many there are now.
      bytes: how much these take now, with their tokens; over all devices where several hold them.
    """

    hits: int
    misses: int
    tokens_read: int
    tokens_saved: int
    evicted: int
    snapshots: int
    bytes: int


class Prefix:
    """A prefix that an engine keeps until it is released; made by `Engine.prefix`.

        with engine.prefix(instructions):
            ...

    Fields:
      num_tokens: how many of its tokens are kept: all whole chunks of them.
    """

    def __init__(self, num_tokens: int, release: Callable[[], None]):
        self.num_tokens = num_tokens
        self._release = release

    def release(self) -> None:
        """Lets the engine forget the prefix when it needs the room; a second time does nothing."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclasses.dataclass(eq=False)
class Node:
    """A prefix in the tree of those that are kept: the one of its parent, and one chunk more.

    Fields:
      depth: its tokens in chunks; 0: the root, the prefix without a token.
      parent: None also once it has been evicted.
      tokens: the bytes of its last chunk, under which its parent has it.
      snapshot: what `programs.take_row` took; None for the root.
      pins: how many pinned prefixes begin with it.
    """

    depth: int = 0
    parent: "Node | None" = None
    tokens: bytes = b""
    snapshot: ModelCache | None = None
    children: dict[bytes, "Node"] = dataclasses.field(default_factory=dict)
    pins: int = 0

    @property
    def forgotten(self) -> bool:
        return self.parent is None and self.depth > 0

    def upwards(self) -> Iterator["Node"]:
        """Yields the node and those above it, without the root."""
        node: Node | None = self
        while node is not None and node.depth:
            yield node
            node = node.parent


class Prefixes:
    """Snapshots of a cache's rows at the ends of chunks, in a tree over the tokens.

    They belong to one engine, and so to one model, its windows and one size of chunks. Rows are
    only ever read on from the end of a chunk, so what follows a snapshot is computed as it would
    be without it: the same program, on the same chunks.

    When there is no room, the prefix that was used longest ago goes, and of those that begin with
    it the longest first. A pinned one stays.
    """

    def __init__(
        self,
        config: ModelConfig,
        cache: ModelCache,
        *,
        chunk: int,
        max_bytes: int,
        on_host: bool,
    ):
        """Measures what a snapshot takes, and compiles what takes one and puts it back.

        Args:
          config: of the model.
          cache: an empty one, of the rows that prompts are read in; it is used up.
          chunk: tokens from one snapshot to the next.
          max_bytes: of all snapshots together; 0 or less than one takes: nothing is kept.
          on_host: keep them in the host's memory.
        """
        self._config, self._chunk, self._on_host = config, chunk, on_host
        self._root = Node()
        # In the order of their last use, and of one use from the longest prefix to the shortest.
        self._nodes: collections.OrderedDict[Node, None] = collections.OrderedDict()
        self._node_bytes = self._capacity = 0
        self._hits = self._misses = self._saved = self._evicted = 0
        self.tokens_read = 0
        if max_bytes:
            snapshot = self._take(cache, row=0, depth=0)
            arrays = sum(array.nbytes for array in jax.tree.leaves(snapshot))
            self._node_bytes = arrays + chunk * np.dtype(np.int32).itemsize
            self._capacity = max_bytes // self._node_bytes
            self._put(cache, 0, Node(1, self._root, snapshot=snapshot))

    @property
    def statistics(self) -> PrefixStatistics:
        return PrefixStatistics(
            hits=self._hits,
            misses=self._misses,
            tokens_read=self.tokens_read,
            tokens_saved=self._saved,
            evicted=self._evicted,
            snapshots=len(self._nodes),
            bytes=len(self._nodes) * self._node_bytes,
        )

    def find(self, tokens: np.ndarray) -> Node:
        """Finds the longest prefix of the tokens [T] that is kept; the root if none is."""
        node = self._root
        for _ in range(len(tokens) // self._chunk):
            child = node.children.get(self._chunk_after(node, tokens))
            if child is None:
                break
            node = child
        return node

    def find_before_last(self, prompt: np.ndarray) -> Node:
        """Finds the same among those that leave a token to read, whose logits are wanted."""
        return self.find(prompt[:-1])

    def grows_by_reading(self, prompt: np.ndarray, others: Sequence[np.ndarray]) -> bool:
        """Says whether more of the prompt [T] is going to be kept once the others were read."""
        kept = self.find_before_last(prompt).depth
        return self._capacity > kept and any(
            shared_length([prompt[:-1], other]) // self._chunk > kept for other in others
        )

    def restore(self, node: Node, cache: ModelCache, row: int) -> ModelCache:
        """Makes an empty row of a cache, which is used up, that of a prefix; and counts its use."""
        self._hits += node.depth > 0
        self._misses += node.depth == 0
        self._saved += node.depth * self._chunk
        self._touch(node)
        nodes = list(node.upwards())
        # Layers with full attention have the entries of one chunk in each snapshot.
        for one in reversed(nodes) if None in self._config.windows else nodes[:1]:
            cache = self._put(cache, row, one)
        return cache

    def save(
        self, node: Node | None, tokens: np.ndarray, cache: ModelCache, row: int
    ) -> Node | None:
        """Keeps a row that has read one chunk since it was at `node`.

        Args:
          node: what this method or `find` returned before the chunk was read; None: the row keeps
            nothing.
          tokens: [T] all of the row's prompt.
          cache: with the chunk read, if there were that many tokens.
          row: of the cache.

        Returns:
          The prefix with the chunk; None, for good, if the prompt ended within it, if there is no
          room, or if what came before has been forgotten.
        """
        if node is None or node.forgotten or len(tokens) < (node.depth + 1) * self._chunk:
            return None
        chunk = self._chunk_after(node, tokens)
        child = node.children.get(chunk)
        if child is None:
            if not self._make_room(node):
                return None
            snapshot = self._take(cache, row, node.depth)
            child = node.children[chunk] = Node(node.depth + 1, node, chunk, snapshot)
        self._touch(child)
        return child

    def check_pinnable(self, tokens: np.ndarray) -> None:
        """Raises ValueError if the whole chunks of tokens [T] are none, or more than find room."""
        wanted = len(tokens) // self._chunk
        if not wanted:
            raise ValueError(
                f"tokens are {len(tokens)}, fewer than prefill_chunk={self._chunk}: only whole "
                "chunks are kept; give the engine a smaller prefill_chunk"
            )
        own = set(self.find(tokens).upwards())
        pinned = sum(1 for node in self._nodes if node.pins and node not in own)
        if wanted + pinned > self._capacity:
            raise ValueError(
                f"tokens are {len(tokens)}, which need {wanted} snapshots of {self._node_bytes} "
                f"bytes; prefix_bytes has room for {self._capacity}, of which {pinned} are pinned: "
                "give the engine more, or release what is pinned"
            )

    def pin(self, node: Node) -> Callable[[], None]:
        """Keeps a prefix, and those it begins with, until the result is called; once counts."""
        nodes = list(node.upwards())
        for one in nodes:
            one.pins += 1

        def unpin() -> None:
            while nodes:
                nodes.pop().pins -= 1

        return unpin

    def _chunk_after(self, node: Node, tokens: np.ndarray) -> bytes:
        return tokens[node.depth * self._chunk :][: self._chunk].tobytes()

    def _touch(self, node: Node) -> None:
        for one in node.upwards():
            self._nodes[one] = None
            self._nodes.move_to_end(one)

    def _make_room(self, parent: Node) -> bool:
        """Makes room for a child of `parent`; says whether there is."""
        if len(self._nodes) < self._capacity:
            return True
        free = (x for x in self._nodes if not x.children and not x.pins and x is not parent)
        if (oldest := next(free, None)) is None:
            return False
        assert oldest.parent is not None
        del self._nodes[oldest], oldest.parent.children[oldest.tokens]
        oldest.parent = oldest.snapshot = None
        self._evicted += 1
        return True

    def _take(self, cache: ModelCache, row: int, depth: int) -> ModelCache:
        start = np.int32(depth * self._chunk)
        snapshot = programs.take_row(
            cache, np.int32(row), start, config=self._config, chunk=self._chunk
        )
        return jax.device_get(snapshot) if self._on_host else snapshot

    def _put(self, cache: ModelCache, row: int, node: Node) -> ModelCache:
        start = np.int32((node.depth - 1) * self._chunk)
        return programs.put_row(cache, np.int32(row), start, node.snapshot, config=self._config)


def shared_length(prompts: Sequence[np.ndarray]) -> int:
    """Counts the tokens with which all prompts, at least one of any lengths, begin."""
    shortest = min(map(len, prompts))
    same = np.ones(shortest, bool)
    for prompt in prompts[1:]:
        same &= prompt[:shortest] == prompts[0][:shortest]
    return shortest if same.all() else int(same.argmin())
