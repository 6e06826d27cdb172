"""What kernels are timed and tuned on: shapes, arrays on the device, and the bytes and operations that they cost.

Counts are of what has to happen, not of what a kernel does: each key and value that is visible is read once, each
weight once, half of the square of a causal prompt is computed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.timing import rotations
from pallas_kernels.few_row_matmul.shapes import Product
from pallas_kernels.rotary_page_write.shapes import Shape


def random_array(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal numbers, made on the device; codes over most of their range in types of one byte."""
    return _draw(jax.random.key(seed), tuple(shape), jnp.dtype(dtype).name)


def _draw_unjitted(key, shape, dtype):
    dtype = jnp.dtype(dtype)
    if dtype == jnp.int8:
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    numbers = jax.random.normal(key, shape, jnp.bfloat16 if dtype.itemsize < 4 else dtype)
    return (numbers * 32 if dtype.itemsize == 1 else numbers).astype(dtype)


_draw = jax.jit(_draw_unjitted, static_argnums=(1, 2))


@dataclasses.dataclass(frozen=True)
class Attention:
    """A batch for ragged paged attention.

    Attributes:
        q_lens: queries of each slot.
        kv_lens: keys of each slot, this step's included.
        heads: query heads.
        kv_heads: key heads.
        head_dim: size of a head.
        page_size: keys a page.
        stored: dtype of the pages.
        in_order: whether the pages of a slot follow each other in memory; else they lie anywhere.
        shared: keys that all slots have in common, in the same pages.
    """

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    stored: str = "bfloat16"
    in_order: bool = False
    shared: int = 0

    @property
    def decodes(self) -> bool:
        """Whether no slot has more than one query."""
        return max(self.q_lens) == 1

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values, with their scales; shared ones once for every slot that reads them."""
        width = self.head_dim * jnp.dtype(self.stored).itemsize + (4 if self.is_quantized else 0)
        return 2 * self.kv_heads * width * sum(self.kv_lens)

    @property
    def is_quantized(self) -> bool:
        return jnp.dtype(self.stored).itemsize == 1

    @property
    def bytes(self) -> int:
        """Bytes that have to move: keys, values, queries and output."""
        return self.kv_bytes + 2 * 2 * sum(self.q_lens) * self.heads * self.head_dim

    @property
    def flops(self) -> int:
        """Operations of both products over the pairs of query and key that see each other."""
        seen = sum(q * kv - q * (q - 1) // 2 for q, kv in zip(self.q_lens, self.kv_lens, strict=True))
        return 4 * self.heads * self.head_dim * seen

    def tiny(self) -> "Attention":
        """The same kind of batch, for a rehearsal."""
        group = min(2, self.heads // self.kv_heads)
        lengths = zip(self.q_lens[:2], self.kv_lens[:2], strict=True)
        return dataclasses.replace(
            self,
            q_lens=tuple(min(q, 9) for q in self.q_lens[:2]),
            kv_lens=tuple(min(kv, 9 if kv == q else 40) for q, kv in lengths),
            heads=2 * group,
            kv_heads=2,
            head_dim=16,
            page_size=16,
            shared=min(self.shared, 16),
        )

    def arrays(self) -> tuple[jax.Array, dict[str, Any], list[jax.Array]]:
        """Queries, what all calls share, and page tables that calls take in turn, each over pages of its own."""
        counts = [-(-kv // self.page_size) for kv in self.kv_lens]
        common = self.shared // self.page_size
        per_table = sum(counts) - common * (len(counts) - 1)
        tables = rotations(self.kv_bytes)
        pages = per_table * tables
        order = np.arange(pages) if self.in_order else np.random.default_rng(0).permutation(pages)

        def table(i: int) -> jax.Array:
            rows = np.full((len(counts), max(counts)), pages, np.int32)
            own = order[i * per_table : (i + 1) * per_table]
            first, rest = own[:common], own[common:]
            for row, count in zip(rows, counts, strict=True):
                row[:common] = first
                row[common:count], rest = rest[: count - common], rest[count - common :]
            return jnp.asarray(rows)

        pool = (pages, self.kv_heads, self.page_size, self.head_dim)
        shared: dict[str, Any] = {
            "key_pages": random_array(1, pool, self.stored),
            "value_pages": random_array(2, pool, self.stored),
            "cu_q_lens": jnp.asarray(np.concatenate([[0], np.cumsum(self.q_lens)]), jnp.int32),
            "kv_lens": jnp.asarray(self.kv_lens, jnp.int32),
        }
        if self.is_quantized:
            scales = jnp.full(pool[:3], 1 / 32, jnp.float32)
            shared |= {"key_scales": scales, "value_scales": scales}
        q = random_array(3, (sum(self.q_lens), self.heads, self.head_dim), jnp.bfloat16)
        return q, shared, [table(i) for i in range(tables)]

    @property
    def dense_shape(self) -> tuple[int, int, int]:
        """Slots, queries and keys of a batch without padding.

        Raises:
            ValueError: slots differ in length.
        """
        if len(set(self.q_lens)) > 1 or len(set(self.kv_lens)) > 1:
            raise ValueError("slots differ in length, which a dense batch has no form for")
        return len(self.q_lens), self.q_lens[0], self.kv_lens[0]


def decode(slots: int, context: int, **options: Any) -> Attention:
    """One query in each of so many slots of equal length."""
    return Attention((1,) * slots, (context,) * slots, **options)


def prefill(tokens: int, **options: Any) -> Attention:
    """One prompt."""
    return Attention((tokens,), (tokens,), **options)


def ragged(slots: int, total: int) -> tuple[int, ...]:
    """Lengths that differ by up to 16 times and add up to about `total`, in no order."""
    lengths = np.geomspace(1, 16, slots)
    lengths = np.maximum(1, lengths * total / lengths.sum()).astype(int)
    return tuple(int(length) for length in np.random.default_rng(0).permutation(lengths))


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rows for `rotary_page_write`: heads of a model's layer and a step's tokens."""

    shape: Shape
    tokens: int
    page_size: int = 64

    @property
    def bytes(self) -> int:
        """Bytes that have to move: the projection in, queries out, keys and values into their pages; angles."""
        heads, kv_heads, head_dim, half, *_ = self.shape
        return self.tokens * (2 * 2 * (heads + 2 * kv_heads) * head_dim + 2 * 4 * half)

    def tiny(self) -> "Rotary":
        return Rotary(Shape(4, 2, 16, 8), min(self.tokens, 3), 16)

    def arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The pages, which every call updates; and the rest."""
        heads, kv_heads, head_dim, half, *_ = self.shape
        pages = -(-self.tokens // self.page_size) + 3
        pool = (pages, kv_heads, self.page_size, head_dim)
        places = np.random.default_rng(0).permutation(pages * self.page_size)[: self.tokens]
        angle = jax.random.uniform(jax.random.key(4), (self.tokens, half), jnp.float32, maxval=6.28)
        return {
            "key_pages": random_array(1, pool, jnp.bfloat16),
            "value_pages": random_array(2, pool, jnp.bfloat16),
        }, {
            "qkv": random_array(3, (self.tokens, heads + 2 * kv_heads, head_dim), jnp.bfloat16),
            "page": jnp.asarray(places // self.page_size, jnp.int32),
            "offset": jnp.asarray(places % self.page_size, jnp.int32),
            "cos": jnp.cos(angle),
            "sin": jnp.sin(angle),
        }


@dataclasses.dataclass(frozen=True)
class Norm:
    """Rows for `add_norm`; with `parts`, the update is that many float32 parts of a product, else as the rows."""

    rows: int
    width: int
    parts: int = 0

    @property
    def bytes(self) -> int:
        """Bytes that have to move: rows and update in, sum and norm out."""
        return self.rows * self.width * (2 + (4 * self.parts or 2) + 2 + 2)

    def tiny(self) -> "Norm":
        return Norm(min(self.rows, 2), 48, min(self.parts, 2))

    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rows, update and scale."""
        x = random_array(1, (self.rows, self.width), jnp.bfloat16)
        parts = (self.parts, *x.shape), jnp.float32
        update = random_array(2, *parts) if self.parts else random_array(2, x.shape, x.dtype)
        return x, update, jnp.ones(self.width, jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Logits for `sampling_threshold`, with the same settings in every row."""

    rows: int
    vocab: int
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def bytes(self) -> int:
        """Bytes of the logits."""
        return 4 * self.rows * self.vocab

    def tiny(self) -> "Threshold":
        return dataclasses.replace(self, rows=2, vocab=50, top_k=min(self.top_k, 5))

    def arrays(self) -> tuple[dict[str, jax.Array], jax.Array]:
        """Settings of each row, and logits."""
        settings = {
            "top_p": jnp.full(self.rows, self.top_p, jnp.float32),
            "top_k": jnp.full(self.rows, self.top_k, jnp.int32),
            "min_p": jnp.full(self.rows, self.min_p, jnp.float32),
        }
        return settings, 3 * random_array(1, (self.rows, self.vocab), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Matmul:
    """A product of few rows with a weight."""

    product: Product
    rows: int

    @property
    def bytes(self) -> int:
        """Bytes of the weight, and of rows and result in 16 bits."""
        out, inner, activation, _ = self.product
        columns = out // 2 if activation else out
        return 2 * (out * inner + self.rows * (inner + columns))

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.product.out * self.product.inner

    def tiny(self) -> "Matmul":
        return Matmul(self.product._replace(out=64, inner=64), min(self.rows, 2))

    def arrays(self) -> tuple[jax.Array, list[jax.Array]]:
        """Rows, and weights that calls take in turn."""
        out, inner, *_ = self.product
        count = rotations(2 * out * inner)
        weights = [random_array(2 + i, (out, inner), jnp.bfloat16) * inner**-0.5 for i in range(count)]
        return random_array(1, (self.rows, inner), jnp.bfloat16), weights


@dataclasses.dataclass(frozen=True)
class Dense:
    """A padded batch for `dense_attention`."""

    batch: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    causal: bool = True

    @property
    def bytes(self) -> int:
        """Bytes of queries, keys, values and output."""
        return 2 * self.batch * self.length * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def flops(self) -> int:
        """Operations of both products; half of the square if causal."""
        pairs = self.length * (self.length + 1) // 2 if self.causal else self.length**2
        return 4 * self.batch * self.heads * self.head_dim * pairs

    def tiny(self) -> "Dense":
        return dataclasses.replace(self, batch=2, length=8, heads=4, kv_heads=2, head_dim=16)

    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values."""
        shape = (self.batch, self.length)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (random_array(i, (*shape, n, self.head_dim), jnp.bfloat16) for i, n in enumerate(heads))
        return q, k, v


def described(problem: Any) -> dict[str, Any]:
    """A problem as a result can hold it; lengths that are all alike as how often and what."""

    def short(value: Any) -> Any:
        if hasattr(value, "_asdict"):  # a named tuple
            return value._asdict()
        if isinstance(value, tuple) and len(value) > 4:
            return (
                f"{len(value)} x {value[0]}" if len(set(value)) == 1 else f"{len(value)} of {min(value)}-{max(value)}"
            )
        return value

    return {field.name: short(getattr(problem, field.name)) for field in dataclasses.fields(problem)}
