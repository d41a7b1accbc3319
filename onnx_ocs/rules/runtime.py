"""What onnxruntime itself says: whether it loads the model, and what it made of the layers."""

from collections.abc import Iterator

from onnx_ocs.rules.base import Problem, View, rule


@rule("loads", "error")
def loads(view: View) -> Iterator[Problem]:
    """onnxruntime loads the model; it is asked in a process of its own, which may crash."""
    if view.refused is not None:
        yield Problem(None, f"onnxruntime does not load it: {view.refused}", "mend what the message names")


@rule("float-kernel", "warning")
def float_kernel(view: View) -> Iterator[Problem]:
    """What is quantized becomes an integer kernel; here it did not, and no other rule says why (optimized model)."""
    if view.kernels is None:
        return
    for layer in view.quantized_layers:
        kernel = view.kernels.of(layer.node)
        if kernel is not None and not kernel.on_integers and id(layer.node) not in view.explained:
            yield Problem(
                layer.place,
                f"onnxruntime keeps it float ({kernel.op})",
                "compare its quantization with that of layers that become integer kernels",
            )


@rule("saturation", "warning")
def saturation(view: View) -> Iterator[Problem]:
    """On x86 CPUs without VNNI no sum of two products of UINT8 data and INT8 weights exceeds 16 bits.

    The kernels saturate there, in silence (numerics/saturation.py). Whether they can is decided by the weights that
    they got and by the range of the data; what the data really is may never reach it.
    """
    if view.kernels is None:
        return
    for place in view.wiring.places:
        kernel = view.kernels.of(place.node)
        sums = None if kernel is None else view.kernels.pairs(kernel)
        if sums is not None and sums.saturates.any():
            yield Problem(
                place,
                f"{int(sums.saturates.sum())} of {len(sums.saturates)} outputs can saturate 16 bits on x86 CPUs "
                f"without VNNI: two products add up to {int(sums.worst.max())}",
                "use 7-bit weights (--bits 7), or set session.x64quantprecision = 1 where it runs; ignore this rule if "
                "every CPU has VNNI",
            )
