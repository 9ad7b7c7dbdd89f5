"""Plain values of the forward pass, and what follows from them about rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from open_instruct.data.beginnings import common_beginning
from open_instruct.data.dataset import Examples
from open_instruct.errors import InputError

ROW_TOKENS = 4096  # tokens that keep a GPU busy, and make 200 virtual tokens 5 % of a row


@dataclass(frozen=True)
class ForwardSettings:
    """Plain values that decide how micro-batches are computed."""

    packing: bool
    packing_requested: bool  # --packing was given, so falling back to padding is an error
    max_tokens_per_microbatch: int | None
    attn_backend: str | None
    use_flash_attn: bool
    max_length: int  # tokens of a conversation
    num_virtual_tokens: int
    train_batch_size: int
    eval_batch_size: int
    gradient_checkpointing: bool
    compile_layers: bool
    hard_prompt: tuple[int, ...] = ()  # tokens before every example, behind the virtual ones
    share_beginning: bool = True  # what all examples begin with stands in a packed row once
    beginning: tuple[int, ...] = ()  # tokens that all training examples begin with
    held_out_beginning: tuple[int, ...] = ()  # tokens that all held-out examples begin with

    @property
    def num_before(self) -> int:
        """Positions before every example: virtual tokens and hard prompt."""
        return self.num_virtual_tokens + len(self.hard_prompt)

    @property
    def max_row_tokens(self) -> int:
        """Largest number of tokens of a packed row, virtual tokens and hard prompt included.

        Unless it is set: enough to keep the machine busy and to hold the longest example, but no more than the padded
        micro-batch for which the user expects memory to suffice.
        """
        if self.max_tokens_per_microbatch:
            return self.max_tokens_per_microbatch
        padded = self.train_batch_size * self.max_length
        return min(padded, max(ROW_TOKENS, self.max_length)) + self.num_before

    def with_beginnings(self, train: Examples, held_out: Examples | None) -> ForwardSettings:
        """Return the settings with what the examples of each set begin with, where that is to be shared."""
        if not (self.packing and self.share_beginning):
            return self
        return replace(
            self,
            beginning=common_beginning(train),
            held_out_beginning=common_beginning(held_out) if held_out else (),
        )

    def describe_shared(self) -> str:
        """Return words on what is computed once a row beside virtual tokens and hard prompt; "" where nothing is."""
        train, held_out = len(self.beginning), len(self.held_out_beginning)
        parts = [f"the {train:,} tokens that all training examples begin with"] * bool(train)
        parts += [f"the {held_out:,} tokens that all held-out examples begin with"] * bool(held_out)
        return f"; computed once a row: {', and '.join(parts)}" if parts else ""

    def check_rows(self, longest: int) -> None:
        """Refuse rows that can't hold every example.

        Raises:
            InputError: the longest example, of `longest` tokens, does not fit.
        """
        bound = self.max_row_tokens
        needed = longest + self.num_before
        if self.packing and needed > bound:
            virtual = f" and {self.num_virtual_tokens} virtual ones" if self.num_virtual_tokens else ""
            virtual += f" and the hard prompt's {len(self.hard_prompt)}" if self.hard_prompt else ""
            raise InputError(
                f"--max_tokens_per_microbatch {bound} can't hold the longest example, which has {longest} tokens"
                f"{virtual}: raise it to {needed}, or cut examples with --max_seq_length "
                f"{max(bound - self.num_before, 2)}"
            )
