"""Write a Llama whose heads are filled up with zeros: the same function, for engines that know few sizes of heads.

    python -m tests.wider_heads MODEL OUTPUT [--head_size 32]

vLLM on CPUs takes no heads of fewer than 32 numbers. Pair (i, i + E/2) of a head moves to (fi, fi + fE/2), where f is
the factor of widening: there, rotation has the frequency that it had. Queries grow by sqrt(f), since attention
divides by the root of the size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def places(head_size: int, factor: int) -> torch.Tensor:
    """Return where each number of a head goes: [E]."""
    half = torch.arange(head_size // 2) * factor
    return torch.cat([half, half + factor * head_size // 2])


@torch.no_grad()
def widen(model: LlamaForCausalLM, head_size: int) -> LlamaForCausalLM:
    """Return the model with heads of `head_size` numbers, a multiple of what they have."""
    config = type(model.config)(**model.config.to_dict())
    factor = head_size // config.head_dim
    where = places(config.head_dim, factor)
    config.head_dim = head_size
    wide = LlamaForCausalLM(config)
    state = model.state_dict()
    for name, tensor in state.items():
        part = name.split(".")[-2]
        if part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rows = tensor if part != "o_proj" else tensor.T
            heads = rows.reshape(-1, len(where), rows.shape[-1])
            filled = heads.new_zeros(len(heads), head_size, rows.shape[-1])
            filled[:, where] = heads * (factor**0.5 if part == "q_proj" else 1)
            filled = filled.flatten(0, 1)
            state[name] = filled if part != "o_proj" else filled.T.contiguous()
    wide.load_state_dict(state)
    wide.generation_config = model.generation_config
    return wide.eval()


def main() -> None:
    """Run the command line; the result is compared with the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--head_size", type=int, default=32)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    wide = widen(model, args.head_size)
    ids = torch.randint(model.config.vocab_size, (2, 100))
    torch.testing.assert_close(wide(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    wide.save_pretrained(args.output)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.output)


if __name__ == "__main__":
    main()
