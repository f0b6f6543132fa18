"""Block sizes of the TPU kernel for a shape and a chip.

Knows how large VMEM is and how many bytes must be on their way to keep the memory busy. Knows nothing of
what is done with them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

LANES = 128
SUBLANES = 8

# A copy takes about this long from its start to its end when the memory is busy: what a chip transfers in
# this time must be on its way.
_LATENCY_S = 3e-6
# K tokens for which one turn's products hide the latency of each other's.
_TURN_WORK = 2048
_MOST_PAGES = 16
_DEPTHS = (2, 8)
# Scores of one KV head that are computed at once.
_MOST_SCORES = 512 * 256
_MOST_ROWS = 512


class Chip(NamedTuple):
    """What of a chip the kernel depends on. The default suits every one since v4.

    Attributes:
        cores: that one device has.
        vmem_bytes, bytes_per_s: of each core.
        fp8: the 8-bit float that its products take as it is, beside bfloat16; None: they take none.
    """

    cores: int = 1
    vmem_bytes: int = 16 << 20
    bytes_per_s: float = 1.2e12
    fp8: DTypeLike | None = None


class Blocks(NamedTuple):
    """Sizes of one call.

    Attributes:
        tokens: query tokens of a request that are one work item.
        heads: KV heads whose rows share one product.
        rows: of a product: tokens * heads * G, rounded up to whole tiles.
        pages: that one turn brings.
        depth: turns that the ring of buffers holds.
        cores: that share the items.
    """

    tokens: int
    heads: int
    rows: int
    pages: int
    depth: int
    cores: int


def this_chip() -> Chip:
    """The chip that the program is traced for; the default if that is no TPU."""
    if not pltpu.is_tpu_device():
        return Chip()
    info = pltpu.get_tpu_info()
    candidates = (jnp.float8_e4m3fn, jnp.float8_e4m3b11fnuz)
    fp8 = next((dtype for dtype in candidates if info.is_matmul_supported(jnp.bfloat16, dtype)), None)
    return Chip(info.num_cores, info.vmem_capacity_bytes, info.mem_bw_bytes_per_second, fp8)


def choose_blocks(
    chip: Chip,
    *,
    Q: int,
    G: int,
    K: int,
    p: int,
    H: int,
    entries: int,
    itemsize: int,
) -> Blocks:
    """Blocks for Q new tokens per request, with tables of so many entries.

    Args:
        itemsize: bytes of a value in the pages; those of one byte have scales.

    Raises:
        ValueError: pages so large that not even two of the shortest turns fit in VMEM.
    """
    tokens = _query_tokens(chip, Q, G, K, H)
    heads = max(n for n in range(1, K + 1) if K % n == 0 and (n == 1 or n * tokens * G <= SUBLANES))
    rows = round_up(heads * tokens * G, SUBLANES)

    shortest = math.lcm(p, LANES)  # whole pages, and whole vectors of scores
    fewest, most = _DEPTHS
    buffered = _buffered_bytes(K, p, H, itemsize)
    # A quarter is not asked for, an eighth is for what is computed.
    room = chip.vmem_bytes * 5 // 8 - max(tokens * G, SUBLANES) * _row_bytes(K, H)
    longest = int(room // (fewest * buffered)) // shortest * shortest
    if not longest:
        raise ValueError(
            f"page size {p}: {fewest} turns of {shortest} tokens with {K} KV heads of {H} take "
            f"{fewest * shortest * buffered / 2**20:.0f} MiB, but a tpu's kernel has {room / 2**20:.0f} for "
            f"them: choose page size {LANES}"
        )
    turn_tokens = min(
        max(LANES, _TURN_WORK // K), _MOST_PAGES * p, entries * p, max(LANES, _MOST_SCORES // rows)
    )
    turn_tokens = min(round_up(turn_tokens, shortest), longest)
    on_their_way = chip.bytes_per_s * _LATENCY_S
    depth = 1 + math.ceil(on_their_way / (turn_tokens * 2 * K * H * itemsize))
    depth = min(max(depth, fewest), most, int(room // (turn_tokens * buffered)))
    return Blocks(tokens, heads, rows, turn_tokens // p, depth, chip.cores)


def _row_bytes(K: int, H: int) -> int:
    """Of VMEM for a row of every KV head: q and o twice, for the pipeline of items, lse twice, and a sum."""
    return K * (2 * (4 + 4) * round_up(H, LANES) + 3 * 4 * LANES)


def _buffered_bytes(K: int, p: int, H: int, itemsize: int) -> float:
    """Of VMEM that a token's K and V of all heads take in a buffer, whole tiles of scales included."""
    values = 2 * K * itemsize * (H if H % LANES == 0 else round_up(H, SUBLANES * 4 // itemsize))
    scales = 2 * 4 * round_up(K, SUBLANES) * round_up(p, LANES) / p if itemsize == 1 else 0
    return values + scales


def _query_tokens(chip: Chip, Q: int, G: int, K: int, H: int) -> int:
    """As many as let the rows take a quarter of VMEM, in equal tiles."""
    rows = min(chip.vmem_bytes // 4 // _row_bytes(K, H), _MOST_ROWS)
    tiles = math.ceil(Q / max(1, rows // G))
    return math.ceil(Q / tiles)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not less than n."""
    return -(-n // multiple) * multiple
