"""Small kernels as PTX text, each with a fault that the machine of tests/ptx has to see, and the same without it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Faulty:
    """`right` runs; with `what` replaced by `by` it has to end in a fault whose words are `told`."""

    right: str
    what: str
    by: str
    told: str
    threads: int = 64
    early: bool = False  # launched while the kernel before may still run


def kernel(body: str, shared: int = 4096) -> str:
    """An entry of (in, out, work): %r1 is the thread, %rd1 to %rd3 the buffers, %rd4 to %rd6 each thread's word."""
    return f"""
.version 9.0
.target sm_90a
.address_size 64
.entry kernel(.param .u64 in, .param .u64 out, .param .u64 work)
.maxntid 128, 1, 1
{{
  .reg .pred %p<9>;
  .reg .b16 %rs<9>;
  .reg .b32 %r<40>;
  .reg .f32 %f<40>;
  .reg .b64 %rd<20>;
  .shared .align 128 .b8 tile[{shared}];
  ld.param.u64 %rd1, [in];
  ld.param.u64 %rd2, [out];
  ld.param.u64 %rd3, [work];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd7, %r1, 4;
  add.s64 %rd4, %rd1, %rd7;
  add.s64 %rd5, %rd2, %rd7;
  add.s64 %rd6, %rd3, %rd7;
  mov.u32 %r2, tile;
  shl.b32 %r3, %r1, 2;
  add.s32 %r4, %r2, %r3;
  setp.lt.u32 %p1, %r1, 16;
{body}
  ret;
}}
"""


COPY = kernel("ld.global.u32 %r5, [%rd4]; st.global.u32 [%rd5], %r5;")
EXCHANGE = kernel("""
  ld.global.u32 %r5, [%rd4];
  st.shared.u32 [%r4], %r5;
  bar.sync 0;
  xor.b32 %r6, %r4, 4;
  ld.shared.u32 %r7, [%r6];
  st.global.u32 [%rd5], %r7;
""")
WORK = kernel("st.global.u32 [%rd6], %r1; ld.global.u32 %r5, [%rd6]; st.global.u32 [%rd5], %r5;")
# Each thread copies 16 bytes; then reads what its neighbour's thread has copied.
ASYNC = kernel("""
  mul.lo.s32 %r5, %r1, 16;
  add.s32 %r6, %r2, %r5;
  and.b32 %r7, %r5, 255;
  cvt.u64.u32 %rd8, %r7;
  add.s64 %rd9, %rd1, %rd8;
  cp.async.cg.shared.global [%r6], [%rd9], 16, 16;
  cp.async.commit_group;
  cp.async.wait_group 0;
  bar.sync 0;
  xor.b32 %r8, %r6, 16;
  ld.shared.u32 %r9, [%r8];
  st.global.u32 [%rd5], %r9;
""")
EARLY = kernel("griddepcontrol.wait; ld.global.u32 %r5, [%rd4]; st.global.u32 [%rd5], %r5;")
DIVERGED = kernel("""
  mov.u32 %r7, 0;
  @%p1 bra SKIP;
  mov.u32 %r7, 1;
SKIP:
  bar.sync 0;
  shfl.sync.bfly.b32 %r8|%p2, %r7, 1, 31, -1;
  st.global.u32 [%rd5], %r8;
""")
SYNC = kernel("""
  st.shared.u32 [%r4], %r1;
  bar.warp.sync -1;
  xor.b32 %r6, %r4, 4;
  ld.shared.u32 %r7, [%r6];
  bar.warp.sync -1;
  st.shared.u32 [%r4], %r7;
  st.global.u32 [%rd5], %r7;
""")
MATRIX = kernel("""
  mul.lo.s32 %r5, %r1, 16;
  add.s32 %r6, %r2, %r5;
  st.shared.v4.u32 [%r6], {%r1, %r1, %r1, %r1};
  bar.sync 0;
  ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10,%r11,%r12,%r13}, [%r6];
  mov.f32 %f1, 0f00000000;
  mov.u32 %r14, 0xE4E4E4E4;
  mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f2,%f3,%f4,%f5}, {%r10,%r11,%r12,%r13}, {%r10,%r11},
    {%f1,%f1,%f1,%f1};
  mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%f2,%f3,%f4,%f5}, {%r10,%r11,%r12,%r13},
    {%r10,%r11,%r12,%r13}, {%f2,%f3,%f4,%f5}, %r14, 0x0;
  st.global.f32 [%rd5], %f2;
""")

FAULTS = {
    "global_read_beyond": Faulty(COPY, "[%rd4]", "[%rd4+4]", "out of bounds: read"),
    "global_read_before": Faulty(COPY, "[%rd4]", "[%rd4+-4]", "out of bounds: read"),
    "global_write_beyond": Faulty(COPY, "[%rd5]", "[%rd5+4]", "out of bounds: write"),
    "global_misaligned": Faulty(COPY, "[%rd4]", "[%rd4+2]", "misaligned: read"),
    "global_vector_misaligned": Faulty(COPY, "u32 %r5, [%rd4]", "v2.u32 {%r5, %r6}, [%rd4]", "misaligned: read"),
    "operand_written": Faulty(COPY, "st.global.u32 [%rd5]", "st.global.u32 [%rd4]", "write to an operand"),
    "result_written_twice": Faulty(COPY, "[%rd5], %r5;", "[%rd5], %r5; st.global.u32 [%rd5], %r5;", "written twice"),
    "result_of_all_threads": Faulty(COPY, "[%rd5], %r5", "[%rd2], %r5", "written twice"),
    "workspace_unwritten": Faulty(WORK, "st.global.u32 [%rd6], %r1;", "", "read of unwritten global"),
    "workspace_of_another": Faulty(
        WORK, "ld.global.u32 %r5, [%rd6]", "xor.b64 %rd8, %rd6, 4; ld.global.u32 %r5, [%rd8]", "race: global|unwritten"
    ),
    "shared_beyond": Faulty(EXCHANGE, "[%r4], %r5", "[%r4+4096], %r5", "out of bounds: shared write"),
    "shared_misaligned": Faulty(EXCHANGE, "[%r4], %r5", "[%r4+1], %r5", "misaligned: shared write"),
    "shared_unwritten": Faulty(EXCHANGE, "st.shared.u32 [%r4], %r5;", "", "read of unwritten shared"),
    "shared_no_barrier": Faulty(EXCHANGE, "bar.sync 0;", "", "race: shared|unwritten"),
    "shared_in_the_warp": Faulty(SYNC, "bar.warp.sync -1;\n  xor", "xor", "race: shared"),
    "shared_overwritten": Faulty(SYNC, "bar.warp.sync -1;\n  st", "st", "is overwritten without"),
    "shared_written_by_two": Faulty(EXCHANGE, "[%r4], %r5", "[%r2], %r5", "again without a barrier"),
    "copy_without_wait": Faulty(ASYNC, "cp.async.wait_group 0;", "", "read before the wait"),
    "copy_waits_for_less": Faulty(ASYNC, "wait_group 0", "wait_group 1", "read before the wait"),
    "copy_without_commit": Faulty(ASYNC, "cp.async.commit_group;", "", "read before the wait"),
    "copy_without_barrier": Faulty(ASYNC, "bar.sync 0;", "", "race: shared|read before|unwritten"),
    "copy_misaligned": Faulty(ASYNC, "[%rd9], 16", "[%rd9+8], 16", "misaligned: cp.async"),
    "copy_beyond": Faulty(ASYNC, "[%rd9], 16", "[%rd9+16], 16", "out of bounds: read"),
    "copy_to_a_copy": Faulty(ASYNC, "[%r6], [%rd9]", "[%r2], [%rd9]", "two copies"),
    "copy_overwritten": Faulty(ASYNC, "cp.async.commit_group;", "st.shared.u32 [%r6], %r5;", "a copy is on its way"),
    "barrier_in_a_branch": Faulty(DIVERGED, "SKIP:\n  bar.sync 0;", "bar.sync 0;\nSKIP:", "diverged"),
    "barrier_guarded": Faulty(DIVERGED, "bar.sync 0;", "@%p1 bar.sync 0;", "diverged"),
    "shuffle_in_a_branch": Faulty(DIVERGED, "mov.u32 %r7, 1;", "shfl.sync.bfly.b32 %r7, %r7, 1, 31, -1;", "diverged"),
    "shuffle_of_a_part": Faulty(DIVERGED, "1, 31, -1;", "1, 31, 0xFFFF;", "its own mask|elsewhere"),
    "branch_that_is_uniform": Faulty(DIVERGED, "@%p1 bra SKIP", "@%p1 bra.uni SKIP", "diverged: bra.uni"),
    "warps_that_have_ended": Faulty(
        DIVERGED, "mov.u32 %r7, 0;", "setp.lt.u32 %p3, %r1, 32; @%p3 ret;", "waits for ever"
    ),
    "matrix_row_misaligned": Faulty(MATRIX, ", [%r6];", ", [%r6+8];", "misaligned: shared read"),
    "matrix_unwritten": Faulty(MATRIX, ", [%r6];", ", [%r6+2048];", "read of unwritten shared"),
    "matrix_in_a_branch": Faulty(MATRIX, "ldmatrix", "@%p1 bra SKIP; SKIP: @%p1 ldmatrix", "diverged"),
    "product_in_a_branch": Faulty(MATRIX, "mma.sync", "@!%p1 mma.sync", "diverged"),
    "metadata_out_of_order": Faulty(MATRIX, "0xE4E4E4E4", "0xE4E4E4E3", "metadata"),
    "selector": Faulty(MATRIX, "%r14, 0x0", "%r14, 0x2", "selector"),
    "divided_by_nothing": Faulty(
        COPY, "st.global", "mov.u32 %r6, 0; div.s32 %r5, %r5, %r6; st.global", "division by zero"
    ),
    "unknown_opcode": Faulty(COPY, "ld.global.u32", "prefetch.global.L2 [%rd4]; ld.global.u32", "prefetch.global.L2"),
    "unknown_label": Faulty(DIVERGED, "bra SKIP", "bra SKIPPED", "no label SKIPPED"),
    "unknown_register": Faulty(COPY, "[%rd5], %r5", "[%rd5], %q5", "unknown name %q5"),
    "early_read": Faulty(
        EARLY, "griddepcontrol.wait; ld.global.u32 %r5, [%rd4];", "ld.global.u32 %r5, [%rd4]; griddepcontrol.wait;",
        "global memory before griddepcontrol.wait", early=True,
    ),
    "early_copy": Faulty(
        ASYNC.replace("mul.lo.s32 %r5, %r1, 16;", "griddepcontrol.wait; mul.lo.s32 %r5, %r1, 16;"),
        "griddepcontrol.wait;", "", "global memory before griddepcontrol.wait", early=True,
    ),
    "early_end": Faulty(
        EARLY, "griddepcontrol.wait; ld", "@%p1 griddepcontrol.wait; @!%p1 ret; ld", "without griddepcontrol.wait",
        early=True,
    ),
    "too_many_threads": Faulty(COPY, ".maxntid 128", ".maxntid 32", r"\.maxntid is 32"),
}  # fmt: skip
