"""``python -m onnx_ocs``."""

import sys

from onnx_ocs.cli import main

sys.exit(main())
