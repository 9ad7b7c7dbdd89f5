"""What the server of `tests.warm` imports: libraries that runs need, and nothing of the project."""

import contextlib

import accelerate  # noqa: F401
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.tokenization_utils_tokenizers  # noqa: F401

with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401
