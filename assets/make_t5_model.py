"""Pretrain the bundled encoder–decoder from scratch: a T5 of a million parameters, on word skills.

Run from the repository root: python -m assets.make_t5_model [--output_dir assets/tiny-t5]

It takes 15 to 25 minutes on 2 CPU cores. Its tokenizer is the bundled causal model's, which ends each text with </s>
here. Its inputs are plain text without tags: what `--chat_template_name plain` writes. Adafactor scales its steps by
each weight's size, as in T5's own pretraining; AdamW stalls, because T5's embeddings start a thousand times larger than
its steps.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.optimization import Adafactor

from assets.make_model import train_tokenizer, warm_cosine
from assets.word_skills import SKILLS, named_conversation, pretraining_conversation, unnamed_conversation
from open_instruct.data import chat
from open_instruct.data.packing import IGNORE
from open_instruct.data.pairs import pad_pairs, source_ids, tokenize_pairs

BATCHES_BY_LENGTH = 16  # pairs of a batch are of nearly one length: padding would be half of it otherwise


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Return the causal model's tokenizer with the end of a text after each.

    Bytes leave no token unknown, but engines (CTranslate2) want one to be named.
    """
    tokenizer = train_tokenizer(seed)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.unk_token, tokenizer.chat_template = tokenizer.pad_token, None
    return tokenizer


def for_pairs(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Let a tokenizer write sources as training does."""
    chat.mark_pairs(tokenizer)
    chat.set_chat_template(tokenizer, chat.PLAIN)
    return tokenizer


def pretraining_batches(
    tokenizer: PreTrainedTokenizerFast, config: T5Config, num_pairs: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of `pad_pairs` for ever, each of pairs of nearly one length."""
    rng = random.Random(seed)
    while True:
        conversations = [pretraining_conversation(rng) for _ in range(num_pairs * BATCHES_BY_LENGTH)]
        rows, spans = tokenize_pairs(tokenizer, conversations, config.n_positions)
        pairs = [{"input_ids": ids, "spans": list(span[0])} for ids, span in zip(rows, spans, strict=True)]
        pairs.sort(key=lambda pair: len(pair["input_ids"]))
        batches = [pairs[first : first + num_pairs] for first in range(0, len(pairs), num_pairs)]
        rng.shuffle(batches)
        for batch in batches:
            yield pad_pairs(batch, config.pad_token_id, config.decoder_start_token_id)


@torch.no_grad()
def exact_match(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, skill: str, named: bool, num_rows: int = 100
) -> float:
    """Return the share of greedy answers that equal the skill's; see `make_model.exact_match`."""
    rng, num_right = random.Random(f"exact match {skill} {named}"), 0
    for _ in range(num_rows):
        messages = (named_conversation if named else unnamed_conversation)(rng, skill)
        ids = torch.tensor(source_ids(tokenizer, [messages[:-1]]))
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        num_right += tokenizer.decode(out[0], skip_special_tokens=True).strip() == messages[-1]["content"]
    return num_right / num_rows


def main() -> None:
    """Train, save, and record what the model can do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="assets/tiny-t5")
    parser.add_argument("--num_steps", type=int, default=5000)
    parser.add_argument("--pairs_per_step", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.num_threads)
    tokenizer, plain = make_tokenizer(arguments.seed), for_pairs(make_tokenizer(arguments.seed))
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        n_positions=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5ForConditionalGeneration(config)
    optimizer = Adafactor(model.parameters(), lr=arguments.learning_rate, relative_step=False, warmup_init=False)
    schedule = warm_cosine(optimizer, arguments.num_steps)
    batches = pretraining_batches(plain, config, arguments.pairs_per_step, arguments.seed + 1)
    started, losses = time.time(), []
    for step in range(1, arguments.num_steps + 1):
        batch = next(batches)
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 200 == 0:
            mean = sum(losses[-200:]) / 200
            print(f"step {step}/{arguments.num_steps}  loss {mean:.4f}  {time.time() - started:.0f} s", flush=True)
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
        "final_loss": sum(losses[-200:]) / len(losses[-200:]),
        "exact_match": skills,
    }
    Path(arguments.output_dir, "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(skills, indent=2))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
