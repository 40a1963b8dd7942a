"""Lets torchvision built for CUDA import beside a CPU build of torch (installed into .venv on machines without GPUs).

torchvision registers a fake kernel for `torchvision::nms` at import. Its C++ operators cannot be loaded there, so the
operator's schema does not exist and the import fails, and with it AutoProcessor of the Qwen-VL family. Declaring the
schema is enough.
"""

import importlib.abc
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
                self.library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                torch._hpc_rl_torchvision = self.library  # operators live as long as their library does


sys.meta_path.insert(0, _DeclareOperators())
