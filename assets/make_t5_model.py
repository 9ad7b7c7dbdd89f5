"""Pretrain the bundled encoder–decoder from scratch: a T5 of a million parameters, on word skills.

Run from the repository root: python assets/make_t5_model.py [--output_dir assets/tiny-t5]

It takes about 10 minutes on 2 CPU cores. Its tokenizer is the bundled causal model's, which ends each text with </s>
here. Words are its inputs and outputs, without tags: what `--chat_template_name plain` writes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assets.make_model import train_tokenizer
from assets.word_skills import SKILLS, named_conversation, pretraining_conversation, unnamed_conversation
from open_instruct.data import chat
from open_instruct.data.pairs import pad_pairs, source_ids, tokenize_pairs


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Return the causal model's tokenizer with the end of a text after each."""
    tokenizer = train_tokenizer(seed)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.chat_template = None
    return tokenizer


def as_pairs(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Let a tokenizer write sources as training does."""
    chat.mark_pairs(tokenizer)
    chat.set_chat_template(tokenizer, chat.PLAIN)
    return tokenizer


@torch.no_grad()
def exact_match(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, skill: str, named: bool
) -> float:
    """Return the share of 100 greedy answers that equal the skill's; see `make_model.exact_match`."""
    rng, num_right = random.Random(f"exact match {skill} {named}"), 0
    for _ in range(100):
        messages = (named_conversation if named else unnamed_conversation)(rng, skill)
        ids = torch.tensor(source_ids(tokenizer, [messages[:-1]]))
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        num_right += tokenizer.decode(out[0], skip_special_tokens=True).strip() == messages[-1]["content"]
    return num_right / 100


def main() -> None:
    """Train, save, and record what the model can do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="assets/tiny-t5")
    parser.add_argument("--num_steps", type=int, default=4000)
    parser.add_argument("--pairs_per_step", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.num_threads)
    tokenizer = make_tokenizer(arguments.seed)
    plain = as_pairs(make_tokenizer(arguments.seed))
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        dropout_rate=0.0,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5ForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * min(1.0, step / arguments.num_steps))) + 0.01),
    )
    rng, started, loss = random.Random(arguments.seed + 1), time.time(), torch.tensor(math.nan)
    for step in range(1, arguments.num_steps + 1):
        rows, spans = tokenize_pairs(
            plain, [pretraining_conversation(rng) for _ in range(arguments.pairs_per_step)], 1 << 20
        )
        pairs = [{"input_ids": ids, "spans": list(span[0])} for ids, span in zip(rows, spans, strict=True)]
        batch = pad_pairs(pairs, config.pad_token_id, config.decoder_start_token_id)
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            seconds = time.time() - started
            print(f"step {step}/{arguments.num_steps}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)
    model.eval()
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    skills = {
        skill: {"named": exact_match(model, plain, skill, True), "unnamed": exact_match(model, plain, skill, False)}
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
