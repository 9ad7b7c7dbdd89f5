"""Packed or padded, for encoder–decoders: which forward pass a run takes, and whether it may."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from open_instruct.data import packing
from open_instruct.data.pairs import PairPacking, PairPadding, pack_pairs, pad_pairs
from open_instruct.errors import BUGS, InputError, one_line
from open_instruct.methods import Feature, Method
from open_instruct.model.encoder_decoder import PackedPairModel, PaddedPairModel, decoder_start_of, position_table
from open_instruct.model.evaluation_mode import evaluating
from open_instruct.model.precision import autocast
from open_instruct.model.shared_prefix import CannotPack
from open_instruct.model.training_model import causal_of
from open_instruct.training import engines, forward
from open_instruct.training.faults import is_out_of_memory
from open_instruct.training.forward import Forward
from open_instruct.training.forward_settings import ForwardSettings

# T5 makes a bias for each two tokens of a row: at 1,024 and 12 heads 50 MB in float32.
ROW_TOKENS = 1024


def choose_pair_forward(
    model: Any,
    method: Method,
    settings: ForwardSettings,
    accelerator: Accelerator,
    dtype: torch.dtype,
    pad_token_id: int,
) -> Forward:
    """Choose the packed forward pass if it is exact for this encoder–decoder, else PEFT's padded one.

    Args:
        model: base with adapter; on the meta device where another process holds it, or none does.
        method: the method that wrapped it.
        settings: plain values of the forward pass.
        accelerator: joins the run's processes.
        dtype: precision in which attention is computed.
        pad_token_id: token that fills padded rows.

    Raises:
        InputError: packing, or a feature that needs it, was requested and is not possible; or nothing runs.
    """
    base = causal_of(model)
    decoder_start = decoder_start_of(base.config)
    reason = "--packing False"
    if settings.packing:
        packed, reason = None, "weights are sharded"
        if not engines.is_sharded(engines.engine_of(accelerator)):
            with autocast(accelerator.device.type, dtype):
                try_it = assume_packed if base.device.type == "meta" else try_packed
                packed, reason = try_it(model, method, decoder_start, dtype)
        if packed is not None:
            bound = row_bound(base, settings.max_tokens_per_microbatch)
            before_each = settings.num_virtual_tokens if method.prompt_kind == "embeddings" else 0
            rows = PairPacking(bound, decoder_start, before_each)
            ready = forward.in_precision(packed, accelerator, dtype)
            description = f"packed pairs of source and target, rows of at most {bound:,} tokens"
            return Forward(ready, rows, rows, "packed pairs", description)
        if settings.packing_requested:
            raise InputError(f"--packing is not possible ({reason}): use --packing False")
    elif base.device.type != "meta":
        with evaluating(model), autocast(base.device.type, dtype):
            own_pair_loss(model, probe_pairs(base), decoder_start)
    if settings.gradient_checkpointing and method.obstacles.get(Feature.PADDED_CHECKPOINTING):
        raise InputError(
            f"--gradient_checkpointing with {method.title} needs the packed forward pass, which is not possible "
            f"({reason}): drop one of the flags"
        )
    why = f"the packed one would not be exact for this model: {reason}" if settings.packing else "PEFT's own"
    return Forward(
        forward.in_precision(PaddedPairModel(model), accelerator, dtype),
        PairPadding(settings.train_batch_size, pad_token_id, decoder_start=decoder_start),
        PairPadding(settings.eval_batch_size, pad_token_id, decoder_start=decoder_start),
        f"padded, by {base.config._attn_implementation}",
        f"padded, {settings.train_batch_size} pairs; {why}",
    )


def row_bound(base: Any, wanted: int | None) -> int:
    """Return how many tokens the sources and targets of a row have at most together.

    Args:
        base: the model.
        wanted: value of --max_tokens_per_microbatch; None: as many as are useful.

    Raises:
        InputError: the model has fewer positions.
    """
    tables = [position_table(stack) for stack in (base.get_encoder(), base.get_decoder())]
    positions = min((len(table[0]) - table[1] for table in tables if table), default=None)
    if positions is None:
        return wanted or ROW_TOKENS
    if wanted and wanted > positions:
        raise InputError(
            f"--max_tokens_per_microbatch {wanted}: a row of this model has at most {positions} positions: lower it, "
            "or use --packing False"
        )
    return min(wanted or ROW_TOKENS, positions)


def assume_packed(
    model: Any, method: Method, decoder_start: int, dtype: torch.dtype
) -> tuple[PackedPairModel | None, str]:
    """Return the packed model of a base without values, which can't be probed; else what in its structure forbids it.

    Arguments are those of `try_packed`.
    """
    try:
        return PackedPairModel(model, partial(method.soft_prompt, model), None, head=None), ""
    except CannotPack as obstacle:
        return None, str(obstacle)


def try_packed(
    model: Any, method: Method, decoder_start: int, dtype: torch.dtype
) -> tuple[PackedPairModel | None, str]:
    """Return the packed model if it is exact, else the reason against it.

    The probe is a row of three pairs: its loss must be that of each pair alone, and the last two pairs' loss must not
    change at all with the first pair's tokens, but change with their own sources.

    Raises:
        InputError: PEFT can't run this method on this model at all.
    """
    base = causal_of(model)
    pairs = probe_pairs(base)
    with evaluating(model):
        own = own_pair_loss(model, pairs, decoder_start)
        try:
            packed = PackedPairModel(model, partial(method.soft_prompt, model), None)
            with packed, torch.no_grad():
                together = row_loss(packed, pairs, decoder_start)
                rest = [{**pairs[0], "spans": []}, *pairs[1:]]
                others = [{"input_ids": pairs[0]["input_ids"][::-1], "spans": []}, *pairs[1:]]
                alone, leaked = (row_loss(packed, rows, decoder_start) for rows in (rest, others))
                ids = pairs[1]["input_ids"]
                turned = [rest[0], {**pairs[1], "input_ids": [*ids[6::-1], *ids[7:]]}, pairs[2]]
                within = row_loss(packed, turned, decoder_start)
        except CannotPack as obstacle:
            return None, str(obstacle)
        except (InputError, *BUGS):
            raise
        except Exception as error:  # whatever an unusual structure raises, the padded way is still there
            if is_out_of_memory(error):
                raise
            return None, f"it does not run on this {base.config.model_type} model ({one_line(error, 200)})"
    if not abs(together - own) < forward.tolerance(base, dtype) * own:
        return None, f"its packed loss on a probe differs from its own by {together / own - 1:+.1%}"
    if abs(leaked - alone) > 1e-5 * alone or within == alone:
        return None, "a pair's loss depends on the pair before it"
    return packed, ""


def probe_pairs(base: Any) -> list[dict[str, Any]]:
    """Return three short pairs of random tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(base.get_input_embeddings().weight.shape[0], base.config.vocab_size)
    pairs = []
    for source, target in ((4, 3), (7, 9), (12, 5)):
        ids = torch.randint(vocabulary, (source + target,), generator=generator).tolist()
        pairs.append({"input_ids": ids, "spans": [source, source + target]})
    return pairs


def row_loss(packed: PackedPairModel, pairs: list[dict[str, Any]], decoder_start: int) -> float:
    """Return the summed loss in nats of pairs in one row."""
    batch = packing.to_device(pack_pairs(pairs, decoder_start), packed.causal.device)
    return float(packed(**batch)[0])


@torch.no_grad()
def own_pair_loss(model: Any, pairs: list[dict[str, Any]], decoder_start: int) -> float:
    """Return the summed loss in nats of pairs, each computed alone by PEFT's forward pass.

    Raises:
        InputError: PEFT can't run this method on this model at all.
    """
    padded, base = PaddedPairModel(model), causal_of(model)
    try:
        batches = [packing.to_device(pad_pairs([pair], 0, decoder_start), base.device) for pair in pairs]
        return sum(padded(**batch)[0].item() for batch in batches)
    except BUGS:
        raise
    except Exception as error:  # models and PEFT refuse each other in many ways
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"the adapter does not run on a {base.config.model_type} model ({one_line(error, 200)}): choose another "
            "method"
        ) from error
