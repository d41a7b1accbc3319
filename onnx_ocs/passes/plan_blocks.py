"""Which weights get a scale for each block of input channels, and not only for each output channel."""

from dataclasses import dataclass, replace
from typing import ClassVar

from onnx_ocs.graph.integers import BLOCKS_SINCE
from onnx_ocs.passes.base import Work
from onnx_ocs.plans import LayerPlan, weight_bits

OPS = frozenset({"MatMul", "Gemm"})

FLOAT_DATA = "weights in blocks are for float data"


@dataclass(frozen=True)
class PlanBlocks:
    """A scale for each ``block`` input channels and each output channel of the weights of MatMul and Gemm.

    Runtimes read such weights beside float data (onnxruntime 1.32: MatMulNBits, which rounds the data to 8 bits itself;
    TensorRT: weight-only), so the data of these layers is not quantized. Beside quantized data onnxruntime has float
    kernels for them, or, for MatMul with INT8 blocks, an integer kernel that fails when it runs.
    """

    name: ClassVar[str] = "plan-blocks"

    block: int | None = None
    bits: int = 8
    first: str = "int8"
    containers: frozenset[int] = frozenset()  # bits of the integer types that blocks may have
    whole: bool = False  # blocks are of two dimensions and whole, rows of an even length
    stored: bool = True  # or the weights stay float, and only the step counts
    where: str = ""  # what allows no more, for the report

    def apply(self, work: Work) -> list[LayerPlan]:
        return [self._visit(plan) for plan in work.plans]

    def _visit(self, plan: LayerPlan) -> LayerPlan:
        opset = plan.layer.weight.home.opset
        wanted = self.wanted(plan)
        if wanted.block is None or not self.stored or opset >= BLOCKS_SINCE:
            return wanted
        return replace(plan, block_reason=f"its graph stays at opset {opset}, and blocks need {BLOCKS_SINCE}")

    def wanted(self, plan: LayerPlan) -> LayerPlan:
        """The plan once the opset is as high as blocks need it."""
        if self.block is None or plan.declined:
            return plan
        if (reason := self._refused(plan)) is not None:
            return replace(plan, block_reason=reason)
        turned = plan.layer.node.op == "Gemm" and plan.layer.input_axis == plan.layer.weight_input == 1
        return replace(
            plan,
            block=self.block,
            turned=turned and not self.whole,
            float_data=FLOAT_DATA,
            copied=f"all copies of a channel stand in one block of {self.block}",
        )

    def _refused(self, plan: LayerPlan) -> str | None:
        layer, block = plan.layer, self.block
        assert block is not None
        if layer.node.op not in OPS:
            return f"blocks are for MatMul and Gemm, and not for {layer.node.op}"
        if layer.output_axis is None:  # nor does onnxruntime 1.32 run a block that holds all of it
            return "its weight is a vector, which has one output"
        bits = weight_bits(plan, self.bits, self.first)
        if max(self.containers, default=0) < bits:
            most = max(self.containers, default=0)
            return f"{self.where} allows {f'blocks of at most {most} bits' if most else 'no blocks'}"
        if not self.whole:
            return None
        shape = layer.weight.shape
        if len(shape) != 2:
            return f"{self.where} takes blocks of weights with two dimensions, and not with {len(shape)}"
        if layer.channels % block:
            return f"{self.where} takes whole blocks: {layer.channels} channels do not make blocks of {block}"
        last = block if layer.input_axis == 1 else shape[1]
        return f"{self.where} takes blocks with an even last dimension, and not {last}" if last % 2 else None
