"""Flags of the base model and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from open_instruct.flags import combinations as checks
from open_instruct.flags import quantisation
from open_instruct.flags.declare import flag


@dataclass(frozen=True)
class ModelFlags:
    """Base model and tokenizer."""

    model_name_or_path: str | None = flag(
        None, "base model: a local folder or a name on the Hugging Face Hub", in_study="same", on_resume="content"
    )
    config_name: str | None = flag(
        None, "model configuration, if not the one beside the weights", in_study="same", on_resume="content"
    )
    model_revision: str | None = flag(
        None, "branch, tag or commit of the model on the Hub", in_study="same", on_resume="same"
    )
    additional_model_arguments: str | None = flag(
        None,
        "JSON object with attributes of the model's config.json to change, and from_pretrained's attn_implementation; "
        "the adapter's other commands use the same",
        in_study="same",
        check=lambda flags: checks.not_an_object(flags.additional_model_arguments),
        form="json",
        differs="a JSON object",
        on_resume="content",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto",
        "precision of the frozen base; auto: bfloat16 on a GPU that computes it (Ampere or newer), float32 elsewhere. "
        "Adapters are always float32; float16 scales their loss on the way back, and is not for full fine-tuning",
        in_study="same",
        on_resume="same",
        check=checks.float16_weights,
    )
    load_in_4bit: bool = flag(
        False,
        "load the frozen base in 4-bit NormalFloat (needs the quant extra); adapters stay float32",
        check=lambda flags: "it excludes --load_in_8bit: choose one" if flags.load_in_8bit else None,
        on_resume="same",
    )
    load_in_8bit: bool = flag(
        False, "load the frozen base in 8 bits (needs the quant extra); adapters stay float32", on_resume="same"
    )
    quantisation_config: str | None = flag(
        None,
        "quantise the frozen base as a transformers quantisation configuration says: a JSON object, or a file of it; "
        "a probe refuses what passes no right gradient to the base's input",
        check=quantisation.bad_quantisation,
        form="json",
        on_resume="content",
    )
    skip_modules: list[str] | None = flag(
        None,
        "names of modules that are not quantised, besides those that transformers leaves whole (the head)",
        check=quantisation.bad_skip_modules,
        on_resume="same",
    )
    use_flash_attn: bool | None = flag(
        None,
        "use the package flash-attn (needs the flash extra and a GPU); unset: where it is installed; False: never",
        optional_value=True,
        differs="used where it is installed",
        on_resume="content",
        causal_only=True,
    )
    use_liger_kernel: bool = flag(False, "use Liger's fused kernels (needs liger-kernel and a GPU)", on_resume="same")
    allow_pickle: bool = flag(
        False,
        "load weights that exist only as pickle files; loading one can run code that it contains",
        on_resume="free",
    )
    tokenizer_name_or_path: str | None = flag(
        None, "tokenizer, if not the one beside the model", in_study="same", on_resume="content"
    )
    tokenizer_name: str | None = flag(
        None,
        "older name of tokenizer_name_or_path",
        in_study="same",
        check=lambda flags: checks.another_name(flags, "tokenizer_name", "tokenizer_name_or_path"),
        on_resume="content",
    )
    tokenizer_revision: str | None = flag(
        None, "branch, tag or commit of the tokenizer on the Hub", in_study="same", on_resume="content"
    )
    trust_remote_code: bool = flag(False, "run Python code that comes with the model", on_resume="free")
    add_bos: bool = flag(
        False,
        "put the beginning-of-sequence token before every conversation, unless the template does",
        in_study="same",
        on_resume="content",
        causal_only=True,
    )
    chat_template_name: str = flag(
        "tulu",
        "chat template: tulu, chatml, zephyr or simple_chat; tokenizer: the tokenizer's own; or the path of a Jinja "
        "file",
        in_study="same",
        differs="the default of the 2024 snapshot",
        on_resume="content",
    )
