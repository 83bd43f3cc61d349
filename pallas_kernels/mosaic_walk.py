"""The page walk as a Pallas Mosaic GPU kernel for Hopper: one warpgroup streams pages into shared memory, the others
attend with wgmma. Dense pages only.

The counterpart of `triton_walk`, and what both paged ops' Mosaic kernels are; they differ in how they cut queries into
programs. A program owns one KV head of one row and `W` blocks of up to 64 query vectors, one per compute warpgroup; all
blocks read the same pages.

P goes to the P V product through shared memory: ptxas before 13.3 can miscompile a wgmma whose left operand lies in
registers, and a kernel that is compiled where no GPU is must not depend on that.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.layouts import Dense, Layout
from pallas_kernels.merge import NO_KEY, Attended
from pallas_kernels.triton_walk import LOG2E, page_range

BLOCK = 64
"""Query vectors of a compute warpgroup (the M of wgmma), and tokens of a page."""

STAGES = 3
"""Pages in flight. At head_dim 128 a page is 32 KiB of K and V; with two blocks of queries and outputs 208 KiB of the
227 KiB of shared memory are in use."""

DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
HEAD_DIMS = (64, 128)


def supports(q: jax.Array, pool: Any, layout: Layout) -> bool:
    """Whether the kernel can attend with `q` over `pool`: dense 16-bit pages of 64 tokens, head_dim 64 or 128."""
    if not isinstance(layout, Dense) or layout.page_shape(pool)[2] != BLOCK:
        return False
    return pool.dtype in DTYPES and q.shape[-1] in HEAD_DIMS


def mosaic_walk(
    q: jax.Array,
    positions: jax.Array,
    pool: jax.Array,
    layer: int | jax.Array,
    tables: jax.Array,
    *,
    counts: jax.Array,
    places: jax.Array | None = None,
    q_tokens: int,
    splits: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    name: str,
    interpret: Any = None,
) -> Attended:
    """Causal attention of q [rows, programs, W, M, head_dim], M a multiple of 8 up to 64, over the pages of `tables`.

    Programs of a row are ordered by KV head. Query vector i of a block stands at `positions[row] + i % q_tokens`;
    queries from `counts[row]` on see nothing. Each program's pages are cut into `splits` shares: results are
    [rows, programs, splits, W, M(, head_dim)].
    """
    rows, programs, blocks, vectors, head_dim = q.shape
    pages, layers, _, kv_heads, page_tokens, _ = pool.shape
    dtype = pool.dtype
    columns = tables.shape[1]
    lists = () if places is None else (places,)

    def placed(x: jax.Array, layout: Any) -> jax.Array:
        """x in the registers as `layout` says, which interpret mode knows nothing of."""
        return plgpu.layout_cast(x, layout) if interpret is None else x

    def times_transposed(a: Any, b: Any) -> jax.Array:
        """a @ b.T of two matrices in shared memory. The interpreter of jax 0.10 knows no transposed operand."""
        if interpret is None:
            return _times(a, plgpu.transpose_ref(b, (1, 0)))
        return lax.dot_general(a[...], b[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    def kernel(layer_ref, positions_ref, counts_ref, table_ref, q_ref, pool_ref, *refs):
        place_refs, (o_ref, m_ref, l_ref) = refs[: len(lists)], refs[len(lists) : len(lists) + 3]
        q_smem, k_smem, v_smem, p_smem, o_smem, m_smem, l_smem, q_ready, k_ready, v_ready, k_free, v_free = refs[
            len(lists) + 3 :
        ]
        row, program, split = (lax.axis_index(axis) for axis in ("row", "program", "split"))
        warpgroup = lax.axis_index("warpgroup")
        position, count = positions_ref[row], counts_ref[row]
        first, end = page_range(position, count, window, page_tokens, columns)
        if place_refs:
            first, end = jnp.int32(0), jnp.where(position >= 0, columns, 0)
        share = lax.div(jnp.maximum(end - first, 0) + (splits - 1), jnp.int32(splits))
        begin = first + split * share
        steps = jnp.maximum(jnp.minimum(begin + share, end) - begin, 0)

        def page_at(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            """The page of a table entry, 0 in place of an absent one, and whether it is present."""
            page = table_ref[row, index]
            present = (page >= 0) & (page < pages)
            return jnp.where(present, page, 0), present

        @pl.when(warpgroup == blocks)
        def _stream() -> None:
            if blocks > 1:
                plgpu.set_max_registers(40, action="decrease")
            kv_head = lax.div(program, jnp.int32(programs // kv_heads))

            def fetch(step: jax.Array) -> None:
                slot = lax.rem(step, jnp.int32(STAGES))
                page, _ = page_at(begin + step)
                k_at = ((page * layers + layer_ref[0]) * 2) * kv_heads + kv_head
                plgpu.copy_gmem_to_smem(pool_ref.at[k_at], k_smem.at[slot], k_ready.at[slot])
                plgpu.copy_gmem_to_smem(pool_ref.at[k_at + kv_heads], v_smem.at[slot], v_ready.at[slot])

            def wait(step: jax.Array, _: None = None) -> None:
                """Until the page of STAGES steps before has been read."""
                slot = lax.rem(step, jnp.int32(STAGES))
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

            def fill(step: jax.Array, _: None) -> None:
                fetch(step)

            def refill(step: jax.Array, _: None) -> None:
                wait(step)
                fetch(step)

            full = jnp.maximum(steps, STAGES)
            lax.fori_loop(0, jnp.minimum(steps, STAGES), fill, None)
            lax.fori_loop(STAGES, full, refill, None)
            lax.fori_loop(full, steps + STAGES, wait, None)

        @pl.when(warpgroup < blocks)
        def _attend() -> None:
            if blocks > 1:
                plgpu.set_max_registers(232, action="increase")
            block = (row * programs + program) * blocks + warpgroup
            plgpu.copy_gmem_to_smem(q_ref.at[block], _first(q_smem.at[warpgroup], vectors), q_ready.at[warpgroup])

            per_vector, matrix = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
            scores_shape = (BLOCK, page_tokens)
            token = lax.rem(placed(lax.broadcasted_iota(jnp.int32, scores_shape, 0), matrix), jnp.int32(q_tokens))
            q_pos = jnp.where((token < count) & (position >= 0), token + position, -1)
            in_page = placed(lax.broadcasted_iota(jnp.int32, scores_shape, 1), matrix)
            plgpu.barrier_wait(q_ready.at[warpgroup])

            def step(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                o, m, l = carry  # noqa: E741
                slot = lax.rem(step, jnp.int32(STAGES))
                index = begin + step
                _, present = page_at(index)
                start = (place_refs[0][row, index] if place_refs else index) * page_tokens
                plgpu.barrier_wait(k_ready.at[slot])

                s = times_transposed(q_smem.at[warpgroup], k_smem.at[slot]) * scale
                plgpu.barrier_arrive(k_free.at[slot])
                if softcap is not None:
                    s = softcap * jnp.tanh(s / softcap)
                k_pos = in_page + start
                seen = (k_pos <= q_pos) & present
                if window is not None:
                    seen &= k_pos > q_pos - window
                s = jnp.where(seen, s, NO_KEY)
                m_new = jnp.maximum(m, s.max(axis=1))
                p = jnp.where(seen, jnp.exp2((s - lax.broadcast_in_dim(m_new, s.shape, [0])) * LOG2E), 0.0)
                keep = jnp.exp2((m - m_new) * LOG2E)
                l = l * keep + p.sum(axis=1)  # noqa: E741
                p_smem[warpgroup] = p.astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_wait(v_ready.at[slot])

                mixed = _times(p_smem.at[warpgroup], v_smem.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])
                return o * lax.broadcast_in_dim(keep, o.shape, [0]) + mixed, m_new, l

            nothing = (
                placed(jnp.zeros((BLOCK, head_dim), jnp.float32), matrix),
                placed(jnp.full((BLOCK,), NO_KEY, jnp.float32), per_vector),
                placed(jnp.zeros((BLOCK,), jnp.float32), per_vector),
            )
            o, m, l = lax.fori_loop(0, steps, step, nothing)  # noqa: E741
            o_smem[warpgroup] = o
            m_smem[warpgroup] = m
            l_smem[warpgroup] = l
            plgpu.commit_smem()
            out = ((row * programs + program) * splits + split) * blocks + warpgroup
            for smem, ref in ((o_smem, o_ref), (m_smem, m_ref), (l_smem, l_ref)):
                plgpu.copy_smem_to_gmem(_first(smem.at[warpgroup], vectors), ref.at[out])
            plgpu.wait_smem_to_gmem(0)

    def smem(count: int, width: int, of: Any, elements: int) -> Any:
        """`count` matrices [64, width]; 128-byte rows of `elements` are swizzled, as TMA and wgmma want them."""
        transforms = (plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM((count, BLOCK, width), of, transforms=transforms)

    outs = rows * programs * splits * blocks
    per_block = jax.ShapeDtypeStruct((outs, vectors), jnp.float32)
    call = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((outs, vectors, head_dim), jnp.float32), per_block, per_block),
        scratch_types=(
            smem(blocks, head_dim, dtype, 64),
            smem(STAGES, head_dim, dtype, 64),
            smem(STAGES, head_dim, dtype, 64),
            smem(blocks, page_tokens, dtype, 64),
            smem(blocks, head_dim, jnp.float32, 32),
            plgpu.SMEM((blocks, BLOCK), jnp.float32),
            plgpu.SMEM((blocks, BLOCK), jnp.float32),
            plgpu.Barrier(num_barriers=blocks),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=blocks),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=blocks),
        ),
        grid=(splits, programs, rows),
        grid_names=("split", "program", "row"),
        num_threads=blocks + 1,
        thread_name="warpgroup",
        # The approximate tanh of the GPU is good to three digits only.
        compiler_params=plgpu.CompilerParams(approx_math=softcap is None),
        interpret=interpret,
        kernel_name=name,
    )
    o, m, l = call(  # noqa: E741
        jnp.asarray(layer, jnp.int32).reshape(1),
        positions,
        counts,
        tables,
        q.astype(dtype).reshape(-1, vectors, head_dim),
        pool.reshape(-1, page_tokens, head_dim),
        *lists,
    )
    shape = (rows, programs, splits, blocks, vectors)
    return Attended(o.reshape(*shape, head_dim), m.reshape(shape), l.reshape(shape))


def _times(a: Any, b: Any) -> jax.Array:
    """a @ b of two matrices in shared memory by wgmma, float32 in registers."""

    def product(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _first(ref: Any, vectors: int) -> Any:
    return ref if vectors == BLOCK else ref.at[pl.ds(0, vectors)]
