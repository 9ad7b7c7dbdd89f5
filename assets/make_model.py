"""Pretrain the bundled model from scratch: a tokenizer and a Llama of a million parameters, on word skills.

Run from the repository root: python assets/make_model.py [--output_dir assets/tiny-model]

It takes 12 to 20 minutes on 2 CPU cores. The same machine, torch version and thread count give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assets.word_skills import SKILLS, named_conversation, pretraining_conversation, unnamed_conversation
from open_instruct.data.chat import CHAT_TEMPLATES

VOCABULARY_SIZE = 1024
ROW_LENGTH = 128
CONTEXT_LENGTH = 1024
QUESTION_WEIGHT = 0.1  # random word lists can't be predicted: most of the gradient should come from the answers


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on 20,000 conversations; it encodes any text, and the skills' words as single tokens."""
    rng = random.Random(seed)
    texts = ["\n".join(m["content"] for m in pretraining_conversation(rng)) for _ in range(20_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The three role markers are kept in decoded text: they are part of the chat format, not control tokens.
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in special[3:]])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT_LENGTH,
    )
    fast.chat_template = CHAT_TEMPLATES["tulu"]
    return fast


def pretraining_rows(tokenizer: PreTrainedTokenizerFast, num_rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches [num_rows, ROW_LENGTH + 1] of token ids for ever: conversations one after another, cut anywhere.

    Half of the conversations begin with <s>, so that the model works with and without it.
    """
    rng = random.Random(seed)
    buffer: list[int] = []
    needed = num_rows * (ROW_LENGTH + 1)
    while True:
        while len(buffer) < needed:
            texts = [tokenizer.apply_chat_template(pretraining_conversation(rng), tokenize=False) for _ in range(256)]
            for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                buffer += [tokenizer.bos_token_id, *ids] if rng.random() < 0.5 else ids
        yield torch.tensor(buffer[:needed]).view(num_rows, ROW_LENGTH + 1)
        buffer = buffer[needed:]


def in_answer(batch: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return a mask [B, T]: tokens after an assistant marker, up to and with the end of the answer."""
    position = torch.arange(batch.shape[1]).expand_as(batch)
    opened = torch.where(batch == tokenizer.convert_tokens_to_ids("<|assistant|>"), position, -1).cummax(1).values
    closed = torch.where(batch == tokenizer.eos_token_id, position, -1).cummax(1).values
    just_closed = (batch == tokenizer.eos_token_id) & (opened >= 0)
    return (opened > closed) & (position > opened) | just_closed


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, skill: str, named: bool, num_rows: int = 100
) -> float:
    """Return the share of greedy answers that equal the skill's answer.

    The conversations are drawn from a seed that pretraining does not use. `named`: they name the skill.
    """
    rng = random.Random(f"exact match {skill} {named}")
    num_right = 0
    for _ in range(num_rows):
        messages = (named_conversation if named else unnamed_conversation)(rng, skill)
        text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        num_right += (
            tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == messages[-1]["content"]
        )
    return num_right / num_rows


def warm_cosine(optimizer: torch.optim.Optimizer, num_steps: int, warmup: int = 100) -> LambdaLR:
    """Return a schedule that rises for `warmup` steps and falls with a cosine to a hundredth."""
    return LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps))) + 0.01),
    )


def main() -> None:
    """Train the tokenizer and the model, save both, and record what the model can do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="assets/tiny-model")
    parser.add_argument("--num_steps", type=int, default=5000)
    parser.add_argument("--rows_per_step", type=int, default=24)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(2)

    tokenizer = train_tokenizer(arguments.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = warm_cosine(optimizer, arguments.num_steps)
    rows = pretraining_rows(tokenizer, arguments.rows_per_step, arguments.seed + 1)
    started = time.time()
    for step in range(1, arguments.num_steps + 1):
        batch = next(rows)
        logits, targets = model(input_ids=batch[:, :-1]).logits, batch[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        weights = torch.where(in_answer(batch, tokenizer), 1.0, QUESTION_WEIGHT)[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            print(
                f"step {step}/{arguments.num_steps}  loss {loss.item():.4f}  {time.time() - started:.0f} s", flush=True
            )

    model.eval()
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    skills = {
        skill: {
            "named": exact_match(model, tokenizer, skill, True),
            "unnamed": exact_match(model, tokenizer, skill, False),
        }
        for skill in SKILLS
    }
    record = {
        "command_arguments": {k: v for k, v in vars(arguments).items() if k != "output_dir"},
        "torch": torch.__version__,
        "final_loss": loss.item(),
        "exact_match": skills,
    }
    Path(arguments.output_dir, "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(skills, indent=2))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
