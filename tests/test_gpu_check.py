"""Reading GPU programs: bytes, launches and operations of a small one, worked out by hand."""

import pytest

from gpu_check.hlo import Program

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused_slice (param_0: bf16[8,64], param_1: bf16[2,64]) -> bf16[2,64] {
  %param_0 = bf16[8,64]{1,0} parameter(0)
  %convert.1 = f32[8,64]{1,0} convert(%param_0)
  %slice.1 = f32[2,64]{1,0} slice(%convert.1), slice={[0:2], [0:64]}
  %param_1 = bf16[2,64]{1,0} parameter(1)
  %convert.2 = bf16[2,64]{1,0} convert(%slice.1)
  ROOT %add.1 = bf16[2,64]{1,0} add(%convert.2, %param_1)
}

%body (arg: (s32[], bf16[2,64])) -> (s32[], bf16[2,64]) {
  %arg = (s32[], bf16[2,64]{1,0}) parameter(0)
  %step = s32[] get-tuple-element(%arg), index=0
  %values = bf16[2,64]{1,0} get-tuple-element(%arg), index=1
  %copy.1 = bf16[2,64]{1,0} copy(%values)
  ROOT %tuple.1 = (s32[], bf16[2,64]{1,0}) tuple(%step, %copy.1)
}

%condition (arg.1: (s32[], bf16[2,64])) -> pred[] {
  %arg.1 = (s32[], bf16[2,64]{1,0}) parameter(0)
  ROOT %always = pred[] constant(true)
}

ENTRY %main (x: bf16[8,64], y: bf16[2,64], i: bf16[1,6,5,4], k: bf16[3,3,3,4]) -> bf16[2,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  %y = bf16[2,64]{1,0} parameter(1)
  %i = bf16[1,6,5,4]{3,2,1,0} parameter(2)
  %k = bf16[3,3,3,4]{3,2,1,0} parameter(3)
  %fusion = bf16[2,64]{1,0} fusion(%x, %y), kind=kLoop, calls=%fused_slice, metadata={op_name="jit(step)/add"}
  %conv = (bf16[1,6,5,3]{3,2,1,0}, u8[0]{0}) custom-call(%i, %k), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %w = bf16[3,3,4,3]{3,2,1,0} parameter(4)
  %gradients = (bf16[1,6,5,4]{3,2,1,0}, f32[2,9,4,3]{3,2,1,0}) custom-call(%i, %w), \
custom_call_target="__gpu$xla.gpu.triton"
  %start = (s32[], bf16[2,64]{1,0}) tuple(%zero, %fusion)
  %loop = (s32[], bf16[2,64]{1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %result = bf16[2,64]{1,0} get-tuple-element(%loop), index=1
  ROOT %all-reduce.1 = bf16[2,64]{1,0} all-reduce(%result), replica_groups={{0,1}}, to_apply=%condition
}
"""


def test_a_program_is_read_as_on_paper() -> None:
    program = Program(PROGRAM.replace("\\\n", ""))
    found = [(kernel.kind, kernel.times, kernel.bytes, kernel.flops) for kernel in program.kernels]
    row = 2 * 64 * 2  # bytes of bf16[2,64]
    assert found == [
        ("fusion", 1, 3 * row, 0),  # two rows of eight, the other operand, the result
        ("__cudnn$convForward", 1, 2 * (6 * 5 * 4 + 3 * 3 * 3 * 4 + 6 * 5 * 3), 2 * 6 * 5 * 3 * 9 * 4),
        ("__gpu$xla.gpu.triton", 1, 2 * (2 * 6 * 5 * 4 + 9 * 4 * 3) + 4 * 2 * 9 * 4 * 3, 2 * 2 * 6 * 5 * 9 * 4 * 3),
        ("copy", 5, 2 * row, 0),
        ("all-reduce", 1, 2 * row, 0),
    ]
    assert (program.launches, program.bytes) == (9, sum(times * moved for _, times, moved, _ in found))
    assert (program.windows, program.wide_windows, program.all_reduces) == ([3], 0, 1)
    assert dict(program.layouts) == {"b01f_o01i": 1}
    assert program.seconds(1e3, 1e30) == pytest.approx(program.bytes / 1e3)


def test_an_image_in_the_place_of_a_kernel_is_seen() -> None:
    assert Program(PROGRAM.replace("size=3x3", "size=512x512")).wide_windows == 1
