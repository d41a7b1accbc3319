from onnx_ocs.numerics import assumed as assumed  # registers its rounding
