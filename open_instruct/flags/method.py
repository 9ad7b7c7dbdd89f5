"""Flags that choose a fine-tuning method, and those that belong to one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from open_instruct.flags import combinations as checks
from open_instruct.flags import lora as lora_checks
from open_instruct.flags.declare import flag

PROMPT_INITS = Literal["screened", "text", "sample_vocab", "random"]
PLACES = Literal["encoder", "decoder", "cross"]
PREFIX_INITS = Literal["screened", "text", "zero", "random"]
SOFT_PROMPTS = ("prompt_tuning", "prefix_tuning", "p_tuning")
LORA = ("lora", "qlora")
MAX_SIZE = 10**6  # tokens, ranks, widths; what the machine's memory allows is checked with the model


@dataclass(frozen=True)
class MethodFlags:
    """The fine-tuning method. Without any of the use_ flags it is full fine-tuning."""

    use_lora: bool = flag(
        False,
        "LoRA: low-rank updates of the linear layers; beside a soft prompt's flag both are trained together",
        chooses="lora",
        joins=SOFT_PROMPTS,
        in_study="decided",
        on_resume="content",
    )
    use_qlora: bool = flag(
        False,
        "LoRA on a base quantised to 4 bits (needs the quant extra)",
        chooses="qlora",
        includes="use_lora",
        joins=SOFT_PROMPTS,
        in_study="decided",
        on_resume="content",
    )
    use_prefix_tuning: bool = flag(
        False,
        "prefix tuning: trained keys and values before every layer's own",
        chooses="prefix_tuning",
        in_study="decided",
        on_resume="content",
    )
    use_prompt_tuning: bool = flag(
        False,
        "prompt tuning: trained embeddings before the input",
        chooses="prompt_tuning",
        in_study="decided",
        on_resume="content",
    )
    use_p_tuning: bool = flag(
        False,
        "P-tuning: prompt tuning whose embeddings come from a small trained network",
        chooses="p_tuning",
        in_study="decided",
        on_resume="content",
    )
    use_ia3: bool = flag(
        False,
        "IA3: trained scaling of keys, values and feed-forward activations",
        chooses="ia3",
        in_study="decided",
        on_resume="content",
    )
    use_vera: bool = flag(
        False,
        "VeRA: trained vectors that scale frozen random matrices beside the linear layers",
        chooses="vera",
        in_study="decided",
        on_resume="content",
    )
    peft_config: str | None = flag(
        None,
        "JSON file with a PEFT configuration (peft_type and its fields, as in adapter_config.json), for the methods of "
        "PEFT that have no flag of their own: OFT, BOFT, MiSS, SHiRA, C3A, RoAd, LoKr … (docs/peft.md)",
        chooses="peft",
        on_resume="content",
    )
    adapter_name_or_path: str | None = flag(
        None,
        "trained adapter in PEFT's format whose training continues; unset: a new adapter. Its method, size and base "
        "are used where no flag names them",
        check=checks.continues_two,
        in_study="decided",
        on_resume="content",
    )
    num_virtual_tokens: int | None = flag(
        None,
        "length of the soft prompt, in tokens; unset or 0: the recipe's",
        at_least=1,
        methods=SOFT_PROMPTS,
        shown=True,
        on_resume="same",
        at_most=MAX_SIZE,
    )
    soft_prompt_at: list[PLACES] | None = flag(
        None,
        "where the soft prompt of an encoder–decoder stands: before the input of the encoder (unset) or of the "
        "decoder; or for prefix tuning before the keys of the decoder's self-attention (unset), of the encoder's, of "
        "the attention across, or of several. What PEFT does not have is saved in a format of our own",
        methods=SOFT_PROMPTS,
        check=checks.bad_places,
        shown=True,
        on_resume="same",
        pairs_only=True,
    )
    prompt_tuning_init: PROMPT_INITS | None = flag(
        None,
        "how a soft prompt starts. text: from the embeddings of a text; sample_vocab: from those of random tokens; "
        "random: from noise; screened: from the text or one of 15 draws of random tokens, whichever has the lowest "
        "loss; unset: the recipe's choice",
        methods=("prompt_tuning",),
        check=checks.starts_from_adapter,
        shown=True,
        on_resume="same",
    )
    prompt_tuning_init_text: str | None = flag(
        None,
        "text that a soft prompt or a prefix starts from",
        methods=("prompt_tuning", "prefix_tuning"),
        check=checks.unused_init_text,
        on_resume="same",
        form="text",
    )
    prefix_init: PREFIX_INITS | None = flag(
        None,
        "how a prefix starts. text: from the keys and values of a text; zero: from zeros; random: from noise; "
        "screened: from those of the text or one of 15 draws of random tokens, whichever has the lowest loss; unset: "
        "the recipe's choice",
        methods=("prefix_tuning",),
        shown=True,
        check=lambda flags: (
            checks.starts_from_adapter(flags)
            or (
                f"{flags.prefix_init} can't start a projected prefix: use zero, or drop --prefix_projection"
                if flags.prefix_projection and flags.prefix_init in ("text", "screened")
                else None
            )
        ),
        on_resume="same",
    )
    prefix_freeze_first: bool = flag(
        False,
        "leave the first virtual token of a prefix as it starts: an anchor that attention can rest on (2506.06266)",
        methods=("prefix_tuning",),
        check=checks.moving_first_token,
        on_resume="same",
    )
    prefix_projection: bool = flag(
        False,
        "compute the prefix by a trained two-layer network (Li and Liang 2021)",
        methods=("prefix_tuning",),
        shown=True,
        on_resume="same",
        causal_only=True,
    )
    encoder_hidden_size: int | None = flag(
        None,
        "width of the network of P-tuning or prefix_projection; unset: the model's hidden size",
        at_least=1,
        methods=("p_tuning", "prefix_tuning"),
        check=lambda flags: (
            "a prefix has a network only with --prefix_projection: add that flag, or remove this one"
            if flags.use_prefix_tuning and not flags.prefix_projection
            else None
        ),
        on_resume="same",
        at_most=MAX_SIZE,
    )
    lora_rank: int = flag(
        64,
        "rank of the LoRA update",
        at_least=1,
        methods=LORA,
        shown=True,
        on_resume="same",
        at_most=MAX_SIZE,
    )
    lora_alpha: float = flag(
        16,
        "LoRA's scale: the update is multiplied by alpha / rank",
        above=0,
        methods=LORA,
        shown=True,
        on_resume="same",
        at_most=10**6,
    )
    lora_dropout: float = flag(
        0.1,
        "dropout on the input of LoRA, a probability",
        at_least=0,
        below=1,
        methods=LORA,
        shown=True,
        on_resume="same",
    )
    lora_target_modules: list[str] | None = flag(
        None,
        "layers that LoRA updates: names as PEFT takes them (q_proj v_proj), or one regular expression on full names, "
        "or attention, mlp (found in the model's structure), or all-linear; unset: all-linear, which is every linear "
        "layer but the head",
        methods=LORA,
        check=lora_checks.bad_targets,
        on_resume="same",
    )
    lora_layers: list[str] | None = flag(
        None,
        "decoder layers that LoRA updates: indices from 0, and ranges with both ends, as in 0-7 12; unset: all",
        methods=LORA,
        check=lora_checks.bad_layers,
        on_resume="same",
    )
    lora_bias: Literal["none", "all", "lora_only"] = flag(
        "none",
        "biases that are trained beside LoRA: none, all of the base's, or those of the layers that LoRA updates",
        methods=LORA,
        check=lora_checks.bad_bias,
        on_resume="same",
    )
    use_rslora: bool = flag(
        False, "multiply LoRA's update by alpha / √rank, not alpha / rank (rsLoRA)", methods=LORA, on_resume="same"
    )
    use_dora: bool = flag(
        False,
        "train the length of each weight's rows apart from their direction, which LoRA updates (DoRA)",
        methods=LORA,
        on_resume="same",
    )
    init_lora_weights: str | None = flag(
        None,
        "how LoRA starts. true: A random, B zero; gaussian: A from a normal distribution, B zero; pissa: from the "
        "weights' largest singular values (pissa_niter_N: computed approximately, in N iterations); olora: from their "
        "QR decomposition. All of them start with the base's own output; unset: true",
        methods=LORA,
        check=lora_checks.bad_init,
        on_resume="same",
    )
    loraplus_ratio: float | None = flag(
        None,
        "learning rate of LoRA's B, as a multiple of that of everything else (LoRA+); unset: the same rate",
        above=0,
        at_most=10**4,
        methods=LORA,
        on_resume="same",
    )
    lora_learning_rate_ratio: float | None = flag(
        None,
        "LoRA's learning rate, as a multiple of the soft prompt's (--learning_rate), where both are trained together; "
        "unset: that of their recipes",
        above=0,
        at_most=10**4,
        methods=LORA,
        check=lora_checks.bad_ratio,
        on_resume="same",
    )
    modules_to_save: list[str] | None = flag(
        None,
        "names of modules that are trained in full beside LoRA, and saved with it, such as lm_head",
        methods=LORA,
        check=lora_checks.bad_full_modules,
        on_resume="same",
    )
    new_tokens: list[str] | None = flag(
        None,
        "tokens that are added to the tokenizer and trained beside LoRA: TOKEN, whose embedding starts as the mean of "
        "all, or TOKEN=TEXT, whose embedding starts as the mean of the text's tokens",
        methods=LORA,
        check=lora_checks.bad_new_tokens,
        in_study="same",
        on_resume="same",
        causal_only=True,
    )
    vera_rank: int = flag(
        256,
        "rank of VeRA's shared random matrices",
        at_least=1,
        methods=("vera",),
        shown=True,
        on_resume="same",
        at_most=MAX_SIZE,
    )
    vera_dropout: float = flag(
        0.0,
        "dropout on the input of VeRA, a probability",
        at_least=0,
        below=1,
        methods=("vera",),
        shown=True,
        on_resume="same",
    )
